"""Residual log(m / m*) at the best constant gain against the run's length."""
import json, math, sys
sys.argv=['e3.py','','one_cycle','1','']
from loop import *
from hdet.observe.movement import movement
import numpy as np
L=ref_losses(); R={}
for line in open(CACHE/'const.jsonl'):
    d=json.loads(line)
    if d['seed']!=0 or '/' in d['w']: continue
    b,bx=ref(d['w'],[0]) if '*' not in d['w'] else (0,1.0)
    if abs(d['x']/bx-1)>.01: continue
    hs=[r[1] for r in d['rows']]; area=sum(hs)/len(hs); own=[s[0]/3 for s in d['shapes']]; share=d['rows'][0][0]
    v=[]
    for r in d['rows']:
        if .1<r[0]<=.35:
            m=movement([[a,b2] for a,b2,*_ in r[3]],own)
            if m>0 and math.isfinite(m): v.append(math.log(m/math.sqrt(r[1]*share/area)))
    w=wl(d['w']); R[d['w']]=(w.steps,w.batch_size,np.mean(v),bx,w.optimizer)
for k,v in sorted(R.items(),key=lambda t:t[1][0]): print(k,v[0],v[1],f"{v[2]:+.2f}",v[3],v[4])
X=np.array([[1,math.log(v[0]/600)] for k,v in R.items() if k not in('tumours','diabetes','few_texts')]); y=np.array([v[2] for k,v in R.items() if k not in('tumours','diabetes','few_texts')])
c,res,*_=np.linalg.lstsq(X,y,rcond=None); s2=res[0]/(len(y)-2); se=np.sqrt(s2*np.linalg.inv(X.T@X).diagonal()); print('slope',c,se,'sd',math.sqrt(s2),len(y))
