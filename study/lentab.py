import sys; sys.argv=['e3.py','','one_cycle','1','']
from loop import *
import numpy as np
D=done();L=ref_losses(); T={}
for w in sorted({k[0] for k in D if '*' in k[0]}):
    xs=sorted(x for (a,x,s) in L if a==w and s==0)
    if len(xs)<2: continue
    b=min(L[w,x,0] for x in xs); bx=min(xs,key=lambda x:L[w,x,0])
    if len(xs)>=3 and 0<xs.index(bx)<len(xs)-1:  # parabola through three
        i=xs.index(bx); c=np.polyfit([math.log(x) for x in xs[i-1:i+2]],[math.log(L[w,x,0]) for x in xs[i-1:i+2]],2); bx=math.exp(-c[1]/2/c[0])
    row=[]
    for v in ('PP','K.71','K.5','K1.41','K2','PL','PN'):
        r=D.get((w,1.0,0,v))
        if r: e=100*(r['loss']/b-1); row.append(f"{v} {e:+.1f} ({r['gains'][-1]:.2f})"); T.setdefault((w.partition('*')[2],v),[]).append(min(e,60))
    print(w,f"best x {bx:.2f}",'  '.join(row))
for k,e in sorted(T.items()): print(k,f"{sum(e)/len(e):+.2f} median {sorted(e)[len(e)//2]:+.1f} n={len(e)}")
