import sys
exec(open('lensteps.py').read().split("for k,v in sorted")[0])
def F(n,tau): return 1-tau/n*(1-math.exp(-n/tau))
bad=('tumours','diabetes','few_texts')
for tau in (1e-6,2,3,5,7,10):
    K=[k for k in R if k not in bad]; X=np.array([[1,math.log(R[k][0]/700)] for k in K])
    y=np.array([R[k][2]-.5*math.log(F(max(1,R[k][0]//100),tau)) for k in K])
    c,res,*_=np.linalg.lstsq(X,y,rcond=None); se=np.sqrt(res[0]/(len(y)-2)*np.linalg.inv(X.T@X).diagonal())
    print(tau,'slope %.2f +- %.2f'%(c[1],se[1]),'const m^2 %.2f'%math.exp(2*y.mean()),'sd %.3f'%y.std(), 'train %.2f test %.2f'%tuple(math.exp(2*np.mean([a for a,k in zip(y,K) if half(k)==h])) for h in('train','test')))
