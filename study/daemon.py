"""Runs a queue file: lines `spec;xs;seeds;vers`, in order, each run cached. Ends when the file says `end` or the time is over."""
import sys as _s
QUEUE=_s.argv[1]; UNTIL=_s.argv[2]
_s.argv=['e3.py','','one_cycle','1','']
exec(open('e3.py').read().split("which,vs,xs,seeds")[0])
W('K.7',cls=K,kappa=.7); W('K.5',cls=K,kappa=.5); W('K.35',cls=K,kappa=.35)
exec(open('extra.py').read())
import datetime
def over(): return datetime.datetime.now().strftime('%H:%M') >= UNTIL
seen={}
while not over():
    todo=None
    exec(open('extra.py').read())
    for line in open(QUEUE):
        line=line.split('#')[0].strip()
        if line=='end': raise SystemExit
        if not line: continue
        specs,xs,seeds,vers=line.split(';')
        for s in seeds.split(','):
            for w in specs.split(','):
                for x in xs.split(','):
                    for v in vers.split(','):
                        xx=float(eval(x))
                        if w.split('*')[0].split('/')[0] not in BASE20 and '/' not in w:
                            xx*=ref(w,[0])[1]
                        k=(w,xx,int(s),v)
                        if k in done() or (v=='one_cycle' and k[:3] in ref_losses()): continue
                        todo=k; break
                    if todo: break
                if todo: break
            if todo: break
        if todo: break
    if not todo: time.sleep(2); continue
    t=time.time(); c=time.process_time()
    r=run(*todo, VERS.get(todo[3]))
    print(datetime.datetime.now().strftime('%H:%M:%S'),*todo,r['loss'],'gain',r['gains'][-1:],f'{time.time()-t:.1f}s cpu {time.process_time()-c:.1f}',flush=True)
