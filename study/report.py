"""Tables of excess and harm, from the caches. report.py VERS [XS] [only seeds]"""
from loop import *
import statistics as st
def excess(spec,x,v,seeds):
    """[(excess over tuned, harm vs one_cycle from the same start or None)] by seed"""
    D=done(); L=ref_losses(); b,bx=ref(spec,[0]); out=[]
    for s in seeds:
        k=(spec,x*bx if spec not in BASE20 else x,s,v)
        r=D.get(k); base=L.get((spec,bx,s))
        if v=='one_cycle': loss=next((L[q] for q in L if q[0]==spec and q[2]==s and abs(q[1]/(x*bx)-1)<.01),None)
        else: loss=(r["loss"] if r["loss"] is not None else math.inf) if r else None
        if loss is None or base is None: continue
        oc=next((L[q] for q in L if q[0]==spec and q[2]==s and abs(q[1]/(x*bx)-1)<.01),None)
        out.append((loss,base,oc))
    if not out: return None
    B=sum(o[1] for o in out); e=min(60,100*(sum(o[0] for o in out)/B-1))
    oc=[o for o in out if o[2] is not None]
    h=None if not oc else max(0,min(60,100*(sum(o[0] for o in oc)/sum(o[2] for o in oc)-1))) if math.isfinite(sum(o[2] for o in oc)) else 0.0
    return e,h,len(out)
if __name__=='__main__':
    vers=sys.argv[1].split(','); xs=[float(eval(x)) for x in (sys.argv[2] if len(sys.argv)>2 else '.01,.1,1/3,1,3,8').split(',')]
    seeds=range(5); byheart={'tumours','diabetes','few_texts'}; LIM=sys.argv[3].split(',') if len(sys.argv)>3 else None
    specs=[w for w in sorted({k[0] for k in done()}) if '/' not in w and '*' not in w]
    cell={}
    for v in vers:
        for w in specs:
            try: 
                for x in xs:
                    r=excess(w,x,v,seeds)
                    if r: cell[v,w,x]=r
            except Exception as e: pass
    for g,sel in (('train',lambda w:half(w)=='train' and w not in byheart),('test',lambda w:half(w)=='test' and w not in byheart),('all',lambda w:w not in byheart),('LM',lambda w:w.split('*')[0] in ('char_lm','fine_tune','gpt','masked_lm','gru','lstm','char_lm_b8','gpt_other')),('by heart',lambda w:w in byheart)):
        for v in vers:
            line=[];allx=[]
            for x in xs:
                ws=[w for w in specs if sel(w) and all((u,w,x) in cell for u in vers)]
                if not ws: line.append('-'); continue
                e=[cell[v,w,x][0] for w in ws]; h=[cell[v,w,x][1] for w in ws if cell[v,w,x][1] is not None]
                se=st.stdev(e)/len(e)**.5 if len(e)>1 else 0
                line.append(f"x{x:.3g}: {sum(e)/len(e):+.2f}±{se:.2f} harm {sum(h)/max(1,len(h)):.2f} (n={len(e)})"); allx+=e
            if allx: print(f"{g:9s} {v:8s}",'  '.join(line),f" mean {sum(allx)/len(allx):+.2f} worst {max(allx):.1f}")
