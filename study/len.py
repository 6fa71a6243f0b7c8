import sys; sys.argv=['e3.py','','one_cycle','1','']
from loop import *
D=done();L=ref_losses()
for w in 'logistic,friedman,photo,denoiser,mixture,gpt,char_lm,digits_mlp,regression,recommender'.split(','):
    for s in ('','*2','*4','*3','*5'):
        for seed in (0,1):
            k=w+s
            if (k,1.0,seed) not in L: continue
            b=L[k,1.0,seed]
            row=[f"x{x:g} {100*(L[k,x,seed]/b-1):+.1f}" for x in (.2,.25,.333,1/3,.5,1.,2.,3.) if (k,x,seed) in L]
            for v in ('PP','PL'):
                for x in (.1,.2,1.):
                    if (k,x,seed,v) in D:
                        d=D[k,x,seed,v]; g=d['gains']; n=len(g); row.append(f"{v} x{x:g} {100*(d['loss']/b-1):+.1f} gains@20,30,end% {g[n//5]*x:.2f} {g[n*3//10]*x:.2f} {g[-1]*x:.2f}")
            print(k,seed,'  '.join(row))
