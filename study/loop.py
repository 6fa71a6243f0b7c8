"""Closed-loop runs of trial controllers, cached."""
from common import *
from hdet.controller import ControllerState, _clamped
from typing import NamedTuple
import trial
NOW = {}
class R(S._Replicas):
    def __init__(s, workload, *a, **k):
        super().__init__(workload, *a, **k)
        if getattr(s._setting.controller, 'heldout', False):
            from hdet.bench.regret import data
            val = workload.validation(); s._workload = replace(workload, draw=lambda n, g: data._some(val, n, g))
    def movement(s, mean):
        sq = s._layout.squares([mean], [s._start]).tolist(); NOW.clear()
        fl = [m.own for m in s._layout.matrices]
        ok = all(math.isfinite(v) for r in sq for v in r)
        lr = lambda f: math.log(max(f, 1e-12))
        if not sq or not ok: return math.nan
        rel = [r[0] / max(r[1], f) for r, f in zip(sq, fl)]; ab = [r[0] / f for r, f in zip(sq, fl)]
        med = lambda a: (lambda b: b[len(b)//2] if len(b) % 2 else math.sqrt(b[len(b)//2] * b[len(b)//2-1]))(sorted(a))
        form = getattr(s._setting.controller, 'form', 'lib')
        if form == 'med_flr': v = med(rel)
        elif form == 'rms_flr': v = sum(rel) / len(rel)
        elif form == 'gm_flr': v = math.exp(sum(lr(x) for x in rel) / len(rel))
        elif form == 'med_abs': v = med(ab)
        elif form == 'gm_abs': v = math.exp(sum(lr(x) for x in ab) / len(ab))
        elif form == 'med_mix': v = med([math.sqrt(a * b) for a, b in zip(rel, ab)])
        elif form == 'gm_mix': v = math.exp(sum(.5 * lr(a) + .5 * lr(b) for a, b in zip(rel, ab) if a > 0) / max(1, sum(a > 0 for a in rel)))
        elif form == 'lib': return s._layout.movement(torch.tensor(sq))
        elif form == 'mix': v = math.sqrt(sum(rel) / len(rel) * med(ab))
        elif form == 'gmix': v = math.exp(.5 * sum(lr(x) + lr(y) for x, y in zip(rel, ab)) / len(ab))
        return math.sqrt(v)
S._Replicas = R
OUT = CACHE / "loop.jsonl"
_done = None
def done():
    global _done
    if _done is None:
        _done = {}
        if OUT.exists():
            for line in OUT.open():
                d = json.loads(line); _done[d["w"], d["x"], d["seed"], d["v"]] = d
    return _done
def run(spec, x, seed, ver, setting):
    key = (spec, x, seed, ver)
    if key in done(): return done()[key]
    w = wl(spec); t = time.time()
    if ver == 'one_cycle':
        loss = peers.one_cycle(w, w.tuned * x, seed); d = dict(gains=[])
    else:
        o = S.simulate(w, w.tuned * x, seed, setting); loss = o.loss; d = o.details
    r = dict(w=spec, x=x, seed=seed, v=ver, loss=loss if math.isfinite(loss) else None, sec=round(time.time() - t, 2), gains=d.get("gains", []), roll=d.get("rollbacks", 0))
    with OUT.open("a") as f: f.write(json.dumps(r) + "\n")
    done()[key] = r
    return r
_const = None
def ref_losses():
    """{(w, x, seed): loss} of OneCycle at constant gain."""
    global _const
    if _const is None:
        _const = {}
        for line in open(CACHE / "const.jsonl"):
            i = line.index('"shapes"'); d = json.loads(line[:i].rstrip().rstrip(',') + '}')
            _const[d["w"], d["x"], d["seed"]] = d["loss"] if d["loss"] is not None and math.isfinite(d["loss"]) else math.inf
    for (w, x, s, v), d in done().items():
        if v == 'one_cycle': _const[w, x, s] = d["loss"] if d["loss"] is not None else math.inf
    return _const
def ref(spec, seeds):
    """Loss at the tuned start: the least mean over the sweep's starts that all seeds have."""
    L = ref_losses(); xs = {x for (w, x, s) in L if w == spec}
    rows = {x: [L[spec, x, s] for s in seeds] for x in xs if all((spec, x, s) in L for s in seeds)}
    if spec in BASE20: return sum(rows[1.0]) / len(seeds), 1.0
    x = min(rows, key=lambda x: sum(rows[x])); return sum(rows[x]) / len(seeds), x
BASE20 = set(CHEAP + LMS)
def table(specs, xs, seeds, vers, show=True, cap=60):
    tot = {}
    for spec in specs:
        base, bx = ref(spec, [0])
        for v, setting in vers.items():
            row = []
            for x in xs:
                rs = [run(spec, x * bx if spec not in BASE20 else x, s, v, setting) for s in seeds]
                # paired by seed where known
                L = ref_losses(); b = [L.get((spec, bx, s)) for s in seeds]
                if any(q is None for q in b):
                    for s in seeds: run(spec, bx, s, 'one_cycle', None)
                    L = ref_losses(); b = [L[spec, bx, s] for s in seeds]
                e = min(cap, 100 * (sum(r["loss"] if r["loss"] is not None else 9e9 for r in rs) / sum(b) - 1))
                row.append((e, sum((r["gains"] or [0])[-1] for r in rs) / len(rs) * x))
                tot.setdefault(v, {}).setdefault(x, []).append(e)
            if show: print(f"{spec:18s} {v:26s}", "  ".join(f"{e:+6.1f} ({g:.2f})" for e, g in row), flush=True)
    for v, t in tot.items():
        print(f"MEAN {v:30s}", " ".join(f"x{x:g} {sum(e)/len(e):+.2f}" for x, e in t.items()), f"all {sum(sum(e) for e in t.values())/sum(len(e) for e in t.values()):+.2f} worst {max(max(e) for e in t.values()):.1f} median {sorted(q for e in t.values() for q in e)[sum(map(len,t.values()))//2]:+.2f}", flush=True)
VERS = {'two': S.Setting()}
def V(name, probe=True, **k): VERS[name] = S.Setting(controller=trial.Trial(**k), probe=probe)
