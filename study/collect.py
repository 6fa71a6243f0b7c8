"""Runs at a constant gain: what every round shows (movement of each matrix, slopes), and how the run ends."""
from common import *
@dataclass(frozen=True, kw_only=True)
class Frozen(TwoSlope):
    def update(self, state, o):
        return state, None
class R(S._Replicas):
    log = []
    def __init__(s, *a, **k):
        super().__init__(*a, **k)
        s._init = s._start.clone(); s._prev = None; R.log = rows = []; s._rows = rows
    def end_step(s, step, batch, height):
        if step % s.round_length == 0:
            m = s._bucket.pack(); o = 0; row = []
            for p in s._parameters:
                k = p.numel(); a = m[o:o+k]; b = s._start[o:o+k]; d = a - b
                c = float(d @ s._prev[o:o+k]) if s._prev is not None else 0.0
                if p.dim() >= 2:
                    row.append([float(d @ d), float(a @ a), float((a - s._init[o:o+k]).square().sum()), c])
                o += k
            s._prev = m - s._start
            loss = math.fsum(s._losses) / len(s._losses) / s.round_length
            s._rows.append([step / s._steps, height, loss, row])
        n = len(s.slopes)
        r = super().end_step(step, batch, height)
        if len(s.slopes) > n and step % s.round_length == 0:
            s._rows[-1].append(list(s.slopes[-1][1]))
        return r
S._Replicas = R
OUT = CACHE / "const.jsonl"
done = set()
if OUT.exists():
    for line in OUT.open():
        d = json.loads(line); done.add((d["w"], d["x"], d["seed"]))
def run(spec, x, seed):
    if (spec, x, seed) in done: return
    w = wl(spec); t = time.time()
    o = S.simulate(w, w.tuned * x, seed, S.Setting(controller=Frozen(), rollback=False, keep_slopes=True))
    m = peers.build(w, seed); shapes = [list(p.shape) for p in m.parameters() if p.dim() >= 2]
    r6 = lambda v: float(f"{v:.5g}")
    rows = [[r6(r[0]), r6(r[1]), r6(r[2]), [[r6(v) for v in q] for q in r[3]], *( [[r6(v) for v in r[4]]] if len(r) > 4 else [])] for r in R.log]
    with OUT.open("a") as f:
        f.write(json.dumps(dict(w=spec, x=x, seed=seed, loss=o.loss, sec=round(time.time() - t, 2), shapes=shapes, rows=rows)) + "\n")
    done.add((spec, x, seed)); print(spec, x, seed, round(o.loss, 5), round(time.time() - t, 2), flush=True)
if __name__ == "__main__":
    specs = sys.argv[1].split(","); xs = [float(v) for v in sys.argv[2].split(",")]; seeds = [int(v) for v in sys.argv[3].split(",")]
    for seed in seeds:
        for x in xs:
            for spec in specs: run(spec, x, seed)
