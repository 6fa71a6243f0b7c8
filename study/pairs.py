"""Exponent of movement in the round's length: |d1 + d2|^2 over the mean of |d1|^2, |d2|^2, at the best constant gain."""
import sys; sys.argv=['e3.py','','one_cycle','1','']
from loop import *
import numpy as np
out=[]
for line in open(CACHE/'const.jsonl'):
    d=json.loads(line)
    if d['seed']!=0 or '/' in d['w']: continue
    bx=ref(d['w'],[0])[1] if '*' not in d['w'] else 1.0
    if abs(d['x']/bx-1)>.01: continue
    rows=[r for r in d['rows'] if .1<r[0]<=.4]; v=[]
    for p,q in zip(rows,rows[1:]):
        for a,b in zip(p[3],q[3]):
            if a[0]>0 and b[0]>0: v.append(.5*math.log2((a[0]+b[0]+2*b[3])/((a[0]+b[0])/2)) if a[0]+b[0]+2*b[3]>0 else 0)
    w=wl(d['w']); n=max(1,w.steps//100); out.append((d['w'],n,w.steps,np.median(v)))
for o in sorted(out,key=lambda o:o[1]): print(*o[:3],f"{o[3]:.2f}",end='; ')
print(); a=[o[3] for o in out]; print('mean',np.mean(a),'sd',np.std(a)); print('by n',{n:round(float(np.mean([o[3] for o in out if o[1]==n])),2) for n in sorted({o[1] for o in out})})
