from an5 import *
sys.path.insert(0,'.')
import hashlib
half=lambda n: "train" if hashlib.sha256(n.encode()).digest()[0]%2 else "test"
LMS="char_lm,fine_tune,vision_transformer,gpt,masked_lm,gru".split(",")
import an5
def feats2(run,lo,hi):
    f=feats(run,lo,hi)
    if not f: return None
    R,A,E,L=sl(run,lo,hi)
    f['mix']=.5*(f['rms_flr']+f['med_abs']); f['gmix']=.5*(f['gm_flr']+f['med_abs'])
    for k in (.1,.2,.3,.5,1): f[f'q{k}']=(A-k*E)/(abs(A)+k*abs(E))
    return f
xs=(.1,.2,.3333,.5,1.0,2.0,3.0,8.0)
for lo,hi in ((.1,.2),(.2,.3),(.3,.5)):
    D=[(w,-math.log(x),feats2(r,lo,hi)) for (w,x),rs in by.items() if x in (.3333,.5,1.,2.,3.) for r in rs if w in set(LMS)|set(ws)]
    D=[d for d in D if d[2]]
    for name,sel in (('train',lambda w:half(w)=='train'),('all',lambda w:True),('LM',lambda w:w in LMS),('noLM',lambda w:w not in LMS)):
        DD=[d for d in D if sel(d[0])]
        out=[]
        for ks in (['rms_flr'],['med_flr'],['mix'],['gmix'],['q0.1'],['q0.2'],['q0.3'],['q0.5'],['q1'],['rms_flr','q0.3'],['mix','q0.1'],['mix','q0.3'],['mix','q1'],['gmix','q0.3']):
            e,c,err=fit(DD,ks); out.append(f"{'+'.join(ks)} {e:.2f} {[round(v,2) for v in c]}")
        print(lo,hi,name,len({d[0] for d in DD}),' | '.join(out))
