from an2 import *
import itertools
def sl(run,lo,hi):
    q=[(r[0],r[1],r[2],r[4]) for r in run['rows'] if lo<r[0]<=hi+1e-9 and len(r)>4 and all(v is not None and math.isfinite(v) for v in r[4][:3])]
    if len(q)<3: return None
    lenx=run['rows'][0][0]*100
    R,A,E=(np.array([v[3][i] for v in q]) for i in range(3)); L=np.mean([v[2] for v in q]); n=len(q)
    return R.mean()/lenx,A.mean()/lenx,E.mean(),L
def feats(run,lo,hi):
    f=window(run,lo,hi); s=sl(run,lo,hi)
    if s is None: return None
    R,A,E,L=s
    f={k:v for k,v in f.items()}
    f['rA']=R/(abs(R)+abs(A)); f['asRA']=math.asinh(R/abs(A)); f['eA']=E/(abs(E)+abs(A)); f['asEA']=math.asinh(E/abs(A)); f['eL']=math.asinh(10*E/abs(L)); f['rL']=math.asinh(100*R/abs(L)); f['aL']=math.log(max(A/abs(L),1e-5))
    f['cl_asRA']=max(-3.,min(1.,f['asRA']+1.5))
    f['RE']=R/(abs(R)+abs(E)); f['q']=(A-.3*E)/(abs(A)+.3*abs(E)); f['A2E']=(A-2*E)/(abs(A)+2*abs(E))
    return f
def data(lo,hi,xs):
    X=[];
    for (w,x),rs in by.items():
        if x in xs:
            for r in rs:
                f=feats(r,lo,hi)
                if f: X.append((w,-math.log(x),f))
    return X
def fit(D,keys,ridge=1e-3):
    ws_=sorted({d[0] for d in D}); A=np.array([[1]+[d[2][k] for k in keys] for d in D]); y=np.array([d[1] for d in D]); g=np.array([d[0] for d in D])
    cnt={w:(g==w).sum() for w in ws_}; wt=np.array([1/cnt[w] for w in g])**.5
    err={}
    for w in ws_:
        tr=g!=w; c=np.linalg.lstsq(np.vstack([A[tr]*wt[tr,None],ridge*np.eye(A.shape[1])]),np.concatenate([y[tr]*wt[tr],np.zeros(A.shape[1])]),rcond=None)[0]
        e=A[~tr]@c-y[~tr]; err[w]=(e**2).mean()
    c=np.linalg.lstsq(A*wt[:,None],y*wt,rcond=None)[0]
    return math.sqrt(np.mean(list(err.values()))),c,err
if __name__=='__main__':
    xs=(.3333,.5,1.0,2.0,3.0)
    for lo,hi in ((.06,.12),(.1,.2),(.2,.3),(.3,.5)):
        D=data(lo,hi,xs); sd=math.sqrt(np.mean([d[1]**2 for d in D])); print(lo,hi,len(D),len({d[0] for d in D}),'sd y',round(sd,2))
        cand=['med_flr','gm_flr','rms_flr','med_abs','whole_flr','max_flr','med_Dn','med_D','rA','asRA','cl_asRA','eA','asEA','eL','rL','RE','q','A2E','aL']
        one=sorted((fit(D,[k])[0],k) for k in cand); print('  1:',[(round(a,2),b) for a,b in one[:10]])
        two=sorted((fit(D,list(k))[0],k) for k in itertools.combinations(cand,2)); print('  2:',[(round(a,2),b) for a,b in two[:10]])
        three=sorted((fit(D,list(k))[0],k) for k in itertools.combinations(cand,3)); print('  3:',[(round(a,2),b) for a,b in three[:8]])
