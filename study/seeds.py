"""Excess and harm of one version, on cells that all versions named share."""
import sys; vers=sys.argv[1].split(','); sel=sys.argv[2].split(','); sys.argv=['e3.py','','one_cycle','1','']
from loop import *
import statistics as st
D=done();L=ref_losses()
for x in (.01,.1,1.,8.):
    rows={v:[] for v in vers}; hs={v:[] for v in vers}; names=[]
    for w in sel:
        b,bx=ref(w,[0]); xx=x*bx if w not in BASE20 else x
        seeds=[s for s in (0,1,2) if (w,bx,s) in L and all((w,xx,s,v) in D for v in vers)]
        if not seeds: continue
        names.append(w)
        for v in vers:
            a=[D[w,xx,s,v]['loss'] or 9e9 for s in seeds]; B=sum(L[w,bx,s] for s in seeds)
            e=min(60,100*(sum(a)/B-1)); rows[v].append(e)
            oc=[next((L[q] for q in L if q[0]==w and q[2]==s and abs(q[1]/xx-1)<.01),None) for s in seeds]
            if all(o is not None for o in oc): hs[v].append(max(0,100*(sum(a)/sum(oc)-1)))
    for v in vers:
        e=rows[v]
        if len(e)>1: print(f"x{x:g} {v:5s} n={len(e)} {sum(e)/len(e):+.2f} +- {st.stdev(e)/len(e)**.5:.2f} harm {sum(hs[v])/max(1,len(hs[v])):.2f} ({len(hs[v])})", ' '.join(f"{w} {q:+.1f}" for w,q in zip(names,e)))
