# q by round-mean at const x for various definitions: mean and LOWO
from an5 import *
def F(run,lo,hi):
    o=defaultdict(list); lenx=run['rows'][0][0]*100
    for r in run['rows']:
        if lo<r[0]<=hi+1e-9 and len(r)>4 and all(v is not None and math.isfinite(v) for v in r[4][:3]):
            A=r[4][1]/lenx; E=r[4][2]; R=r[4][0]/lenx; n=r[0]*100
            for k in (.05,.1,.2,.4): o[f'k{k}'].append((A-k*E)/(abs(A)+k*abs(E)+1e-30))
            for k in (2,5,10): o[f'n{k}'].append((A*n-k*E)/(abs(A)*n+k*abs(E)+1e-30))
            for k in (1,2,5): o[f'R{k}'].append((k*A+R)/(k*abs(A)+abs(R)+1e-30))
    return {k:np.mean(v) for k,v in o.items()} if len(o['k0.1'])>2 else None
from an7 import F as MF
if __name__=='__main__':
  opt={'spiral':2.5,'diabetes':.25,'residual':4.,'factors':.6,'few_texts':.2,'contrast':.5,'mixture_adam':.25,'patches':1.}
  for lo,hi in ((.1,.2),(.2,.3),(.3,.4),(.4,.55)):
    D=[]
    for (w,x),rs in by.items():
        if '*' in w or w in('few_texts','diabetes','tumours'): continue
        z=x/opt.get(w,1.)
        if .25<z<4.1:
            for r in rs:
                f=F(r,lo,hi)
                if f: f.update({'M':MF(r,lo,hi)['gm_mix']}); D.append((w,-math.log(z),f))
    print(lo,hi,len(D),'M %.2f'%fit(D,['M'])[0],' '.join(f"{k}: {fit(D,[k])[0]:.2f}/{e:.2f} [q0 {-c[0]/c[2] if abs(c[2])>.01 else 0:+.2f} c {c[2]:.2f} m {c[1]:.2f}]" for k in D[0][2] if k!='M' for e,c,_ in [fit(D,['M',k])]))
