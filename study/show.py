from loop import *
import fnmatch
# show cached only
def show(vers=None, xs=(.01,.1,.3333,1.,3.,8.), specs=None, seeds=(0,1,2,3), per=True, cap=60, base='x1'):
    D=done(); L=ref_losses()
    tot={}
    for (w,x,s,v) in D:
        if v=='one_cycle' or (vers and v not in vers) or (specs and w not in specs): continue
        tot.setdefault(v,{}).setdefault(w,{}).setdefault(x,[]).append(s)
    return tot
if __name__=='__main__':
    vers=sys.argv[1].split(',') if len(sys.argv)>1 else None
    tot=show(vers); L=ref_losses(); D=done(); M={}
    for v in tot:
        for w in tot[v]:
            row=[]
            bx=ref(w,[0])[1]
            for x in sorted(tot[v][w]):
                ss=[s for s in tot[v][w][x] if (w,bx,s) in L]
                if not ss: continue
                a=np=sum((D[w,x,s,v]["loss"] or 9e9) for s in ss)/len(ss); b=sum(L[w,bx,s] for s in ss)/len(ss)
                e=min(60,100*(a/b-1)); g=sum((D[w,x,s,v]["gains"] or [0])[-1] for s in ss)/len(ss)*x/bx
                row.append(f"x{x/bx:g} {e:+.1f} ({g:.2f})"); M.setdefault(v,{}).setdefault(round(x/bx,4),{})[w]=e
            if len(sys.argv)>2: print(f"{w:18s} {v:20s}",'  '.join(row))
    common=None
    for v in M:
        ks={(w,x) for x in M[v] for w in M[v][x]}; common=ks if common is None else common&ks
    for v in M:
        print(f"{v:20s} n={len(common)}",' '.join(f"x{x:g} {sum(e for w,e in M[v][x].items() if (w,x) in common)/max(1,len([1 for w in M[v][x] if (w,x) in common])):+.2f}" for x in sorted(M[v])), 'all %.2f'%(sum(M[v][x][w] for w,x in common)/max(1,len(common))), 'worst %.1f'%max([M[v][x][w] for w,x in common] or [0]))
