import json, math, statistics as st, sys
from collections import defaultdict
import numpy as np
def load(path="runs/const.jsonl"):
    return [json.loads(l) for l in open(path)]
def gm(a): return math.exp(sum(math.log(max(v,1e-12)) for v in a)/len(a))
def med(a):
    a=sorted(a); h=len(a)//2
    return a[h] if len(a)%2 else math.sqrt(a[h-1]*a[h]+1e-30)
def forms(row, shapes, lenx):
    """row: matrices [d2,n2,D2,c]; returns measure forms scaled to a hundredth (sqrt)."""
    fl=[s[0]/3 for s in shapes]
    d=[math.sqrt(r[0]/lenx) for r in row]; n=[math.sqrt(r[1]) for r in row]
    num=[math.prod(s) for s in shapes]
    f=[math.sqrt(x) for x in fl]
    # floor for true scale: fan_in std 1/sqrt(3 fan_in) -> sqrt(rows/3)
    N=[max(a,b) for a,b in zip(n,f)]
    out={}
    out['med_rel']=med([a/(b+1e-9) for a,b in zip(d,n)])
    out['med_flr']=med([a/b for a,b in zip(d,N)])
    out['med_abs']=med([a/b for a,b in zip(d,f)])
    out['gm_flr']=gm([a/b for a,b in zip(d,N)])
    out['max_flr']=max(a/b for a,b in zip(d,N))
    out['whole']=math.sqrt(sum(a*a for a in d)/sum(b*b for b in n))
    out['whole_flr']=math.sqrt(sum(a*a for a in d)/sum(b*b for b in N))
    out['rms_flr']=math.sqrt(sum((a/b)**2 for a,b in zip(d,N))/len(d))
    out['gmw']=math.sqrt(out['med_flr']*out['whole_flr'])
    D=[math.sqrt(r[2]) for r in row]
    out['med_D']=med([a/(b+1e-9) for a,b in zip(d,D)])
    out['med_Dn']=med([a/b for a,b in zip(D,N)])
    return out
def window(run, lo, hi, keys=None):
    acc=defaultdict(list); rows=run['rows']; lenx=rows[0][0]*100
    for r in rows:
        if lo<r[0]<=hi+1e-9:
            h=max(r[1],1e-3)
            for k,v in forms(r[3],run['shapes'],lenx).items(): acc[k].append(math.log(max(v,1e-9)))
    return {k:sum(v)/len(v) for k,v in acc.items()}
if __name__=='__main__':
    runs=load(); by=defaultdict(list)
    for r in runs: by[r['w'],r['x']].append(r)
    ws=[w for w in dict.fromkeys(r['w'] for r in runs)]
    for lo,hi in ((.02,.05),(.05,.1),(.1,.2),(.2,.3),(.3,.5)):
        acc=defaultdict(dict)
        for w in ws:
            if (w,1.0) in by:
                m=[window(r,lo,hi) for r in by[w,1.0]]
                for k in m[0]: acc[k][w]=sum(q[k] for q in m)/len(m)
        print(f'p {lo}-{hi}:',' '.join(f"{k} {math.exp(np.mean(list(v.values()))):.3f} sd {np.std(list(v.values())):.2f};" for k,v in acc.items()))
        if lo==.2:
            for w in ws:
                if w in acc['med_rel']: print(f"   {w:20s}",' '.join(f"{k} {math.exp(acc[k][w]):.3f}" for k in acc), 'n', len(by[w,1.0][0]['shapes']))
