import sys; sys.argv=['e3.py','','one_cycle','1','']
from loop import *
D=done();L=ref_losses()
for n in ('PN',)+tuple('B.'+n+e for n in ('follow','until','evidence','noise_weight','smoothing') for e in('.lo','.hi')):
    row=[];tot=[]
    for w in ('mixture','regression','digits_mlp','recommender'):
        for x in (1.,.1):
            r=D.get((w,x,0,n))
            if r: e=100*(r['loss']/L[w,1.0,0]-1); row.append(f"{w} x{x:g} {e:+.1f} ({r['gains'][-1]*x:.2f})")
            if r and D.get((w,x,0,'B.smoothing.hi')): tot.append(e)
    print(n,f"{sum(tot)/max(1,len(tot)):+.2f} n={len(tot)}",'  '.join(row))
