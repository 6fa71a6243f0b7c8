from an2 import *
def sl(run,lo,hi):
    q=[(r[0],r[1],r[2],r[4]) for r in run['rows'] if lo<r[0]<=hi+1e-9 and len(r)>4 and all(v is not None and math.isfinite(v) for v in r[4][:3])]
    if len(q)<3: return None
    lenx=run['rows'][0][0]*100
    R,A,E=(np.array([v[3][i] for v in q]) for i in range(3)); L=np.mean([v[2] for v in q]); n=len(q)
    return R.mean()/lenx,A.mean()/lenx,E.mean(),R.std()/lenx/n**.5,A.std()/lenx/n**.5,E.std()/n**.5,L
for (lo,hi) in ((.1,.2),(.2,.3),(.3,.5)):
    print(lo,hi)
    for w in ws:
        s=[]
        for x in (.01,.1,.3333,1.0,3.0,8.0):
            if (w,x) in by:
                v=[sl(r,lo,hi) for r in by[w,x]]; v=[q for q in v if q]
                if v:
                    a=np.mean([q[1]/q[2] for q in v]); ta=np.mean([q[1]/q[4] for q in v]); te=np.mean([q[2]/q[5] for q in v]); s.append(f"x{x:g}: A/E {a:6.3f} tA {ta:4.1f} tE {te:4.1f} E/L {np.mean([q[2]/q[6] for q in v]):.3f} R/A {np.mean([q[0]/abs(q[1]) for q in v]):.1f} |")
        print(f"  {w:12s}",' '.join(s))
