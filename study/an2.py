from an import *
runs=load(); by=defaultdict(list)
for r in runs: by[r['w'],r['x']].append(r)
best={}
ws=[w for w in dict.fromkeys(r['w'] for r in runs)]
fin=lambda v: v if v is not None and math.isfinite(v) else 9e9
for w in ws:
    L={x:np.mean([fin(r['loss']) for r in by[w,x]]) for (ww,x) in by if ww==w}
    b=1.0
    best[w]=(b,L)
W={'early':(.02,.05),'p.1':(.05,.1),'p.15':(.1,.2),'p.25':(.2,.3),'p.4':(.3,.5)}
X=[1/3,1.0,3.0]
if __name__=='__main__':
  for name,(lo,hi) in W.items():
    M={}
    for w in ws:
        for x in (0.01,.1,.3333,1.0,3.0,8.0):
            if (w,x) in by:
                q=[window(r,lo,hi) for r in by[w,x]]
                M[w,x]={k:np.mean([a[k] for a in q]) for k in q[0]}
    full=[w for w in ws if all((w,x) in M for x in (.1,.3333,1.0,3.0,8.0))]
    print(name,len(full),'workloads; slope .1-.33, .33-1, 1-3, 3-8; sd at 1; sd in log LR')
    for k in M[full[0],1.0]:
        A=np.array([[M[w,x][k] for x in (.1,.3333,1.0,3.0,8.0)] for w in full]); lx=np.log([.1,.3333,1,3,8])
        s=np.diff(A.mean(0))/np.diff(lx)
        # invert: per workload, the x at which measure equals the mean at 1 (interpolate own curve)
        t=A[:,2].mean(); inv=[]
        for a in A:
            aa=np.maximum.accumulate(a+1e-6*np.arange(5)); inv.append(np.interp(t,aa,lx))
        print(f"  {k:9s} target {math.exp(t):.3f}", ' '.join(f'{v:+.2f}' for v in s), f"sd {A[:,2].std():.2f} slope.33-3 {(A[:,3]-A[:,1]).mean()/math.log(9):.2f} -> {A[:,2].std()/((A[:,3]-A[:,1]).mean()/math.log(9)):.2f}; inverted sd {np.std(inv):.2f} mean {np.mean(inv):+.2f}")
