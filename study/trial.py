from __future__ import annotations
import math
from dataclasses import dataclass
from typing import NamedTuple
from hdet.controller import Observation, _clamped, slopes_of

class St(NamedTuple):
    gain: float = 1.0
    rounds: int = 0
    centre: float = 0.0
    mem: tuple[float, ...] = (0.0,) * 6

@dataclass(frozen=True, kw_only=True)
class Trial:
    form: str = "med_mix"
    kappa: float = 1.0
    power: float = 0.5       # of the height in the target
    s: float = 0.6           # elasticity of movement
    rate: float = 0.35        # how fast the gain follows
    csmooth: float = 0.5     # memory of the centre per hundredth
    up: float = 1.2
    end: float = 0.56
    pend: float = 0.4        # prior's end
    ev: float = 0.0          # shift of the posterior mean at full evidence
    k: float = 0.2
    smooth: float = 0.8
    user: float = 0.0
    utail: float = 1.0
    N: float = 0.0
    evstart: float = 0.1
    bounds: tuple[float, float] = (1e-4, 1e4)
    rest_below: float = 0.7
    def begin(self, gain): return St(gain, centre=math.log(gain))
    def cut(self, st, f): return St(st.gain / f, centre=math.log(st.gain / f))
    def reach(self, height): return 1.0
    def wants_probe(self, progress, until): return self.ev > 0 and progress <= until
    def update(self, st, o: Observation):
        c = o.share / 0.01
        p = o.progress; lg = math.log(st.gain); centre = st.centre
        if o.movement > 0 and math.isfinite(o.movement) and p <= self.pend:
            target = self.kappa * max(o.height, 0.02) ** self.power * math.sqrt(o.share / o.area)
            here = lg + math.log(target / o.movement) / self.s
            b = self.csmooth ** c if st.rounds else 0.0
            if self.N:
                b = 1 - 1 / max(1.0, min(p * 100, self.N) / c)
            centre = b * centre + (1 - b) * here
        n = p * 100
        u = self.user / (1 + (centre / self.utail) ** 2)
        mean = centre * n / (n + u)
        mem = st.mem; slope = None
        sl = slopes_of(o.probe, o.multipliers, o.lag) if o.probe is not None else None
        if sl is not None and all(math.isfinite(v) for v in sl[:3]):
            b = self.smooth ** c
            A, E, n = mem[0] * b + sl.debiased / c * (1 - b), mem[1] * b + sl.noise * (1 - b), mem[2] * b + 1 - b
            aA, aE = mem[3] * b + abs(sl.debiased) / c * (1 - b), mem[4] * b + abs(sl.noise) * (1 - b)
            mem = (A, E, n, aA, aE, 0.0)
            slope = (A - self.k * E) / (aA + self.k * aE + 1e-30)
        if mem[2] and p > self.evstart:
            mean += self.ev * (mem[0] - self.k * mem[1]) / (mem[3] + self.k * mem[4] + 1e-30)
        change = max(-0.7, min(self.up, self.rate * min(1.0, c) * (mean - lg))) if p <= self.end else 0.0
        return St(_clamped(lg + change, self.bounds), st.rounds + 1, centre, mem), slope
