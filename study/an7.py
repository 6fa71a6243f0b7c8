from an5 import *
LMS="char_lm,fine_tune,vision_transformer,gpt,masked_lm,gru".split(",")
half=lambda n: "train" if hashlib.sha256(n.encode()).digest()[0]%2 else "test"
import hashlib
def F(run,lo,hi):
    acc=defaultdict(list); rows=run['rows']; lenx=rows[0][0]*100; fl=[math.sqrt(s[0]/3) for s in run['shapes']]
    cols=[math.sqrt(s[1]*math.prod(s[2:])/3) for s in run['shapes']]
    num=[math.prod(s) for s in run['shapes']]
    for p,h,loss,row,*_ in rows:
        if not lo<p<=hi+1e-9: continue
        d=[math.sqrt(r[0]/lenx)+1e-12 for r in row]; n=[math.sqrt(r[1]) for r in row]; D=[math.sqrt(r[2]) for r in row]
        N=[max(a,b) for a,b in zip(n,fl)]
        o={'med_mix':med([a/math.sqrt(b*f) for a,b,f in zip(d,N,fl)]),'gm_mix':gm([a/math.sqrt(b*f) for a,b,f in zip(d,N,fl)]),
         'rms_mix':math.sqrt(sum(a*a/(b*f) for a,b,f in zip(d,N,fl))/len(d)),
         'med_half':med([a/math.sqrt((b*b+f*f)/2) for a,b,f in zip(d,n,fl)]),
         'gm_abs':gm([a/f for a,f in zip(d,fl)]), 'rms_abs':math.sqrt(sum((a/f)**2 for a,f in zip(d,fl))/len(d)),
         'med_min':med([a/math.sqrt(math.prod(s)/max(s[0],math.prod(s[1:]))/3) for a,s in zip(d,run['shapes'])]),
         'med_rc':med([a/math.sqrt(f*c) for a,f,c in zip(d,fl,cols)]),
         'wt_mix':math.exp(sum(math.log(a/math.sqrt(b*f))*math.sqrt(k) for a,b,f,k in zip(d,N,fl,num))/sum(math.sqrt(k) for k in num)),
         'med_int':med([a*a/(math.sqrt(b*f)*1) /max(e,1e-6) for a,b,f,e in zip(d,N,fl,D)]),
         'whole_mix':math.sqrt(sum(a*a for a in d)/sum(b*f for b,f in zip(N,fl)))}
        for k,v in o.items(): acc[k].append(math.log(v))
    return {k:np.mean(v) for k,v in acc.items()}
for lo,hi in ((.06,.12),(.1,.2),(.2,.3),(.3,.5)):
    D=[(w,-math.log(x),F(r,lo,hi)) for (w,x),rs in by.items() if x in (.3333,.5,1.,2.,3.) for r in rs if w in best and '*' not in w]
    for name,sel in (('train',lambda w:half(w)=='train'),('all',lambda w:True),('LM',lambda w:w in LMS),('noLM',lambda w:w not in LMS)):
        DD=[d for d in D if sel(d[0])]
        print(lo,hi,name,' '.join(f"{k} {e:.2f} [{math.exp(-c[0]/c[1]):.3f} {c[1]:.2f}]" for k in D[0][2] for e,c,_ in [fit(DD,[k])]))
