r"""The default controller: a prior from how far the weights move, evidence from the losses, one posterior mean.

**Prior.** At the right learning rate the squared relative movements of all rounds (:mod:`hdet.observe.movement`) add up
to 2 over a run that ends at 0, each in proportion to the schedule's height, if a round is many steps. One of ``n``
steps and length ``share`` (of the run), at height ``h``, should move the weights by ::

    m* = sqrt(2 F(n) h share / (area (1 + 2.5 final)))
    F(n) = 1 - (tau / n) (1 - exp(-n / tau)),     tau = 5

    area = mean height over the run,  final = height at its end

``F`` is for short rounds: with momentum, steps that are near in time point alike, and a walk that forgets its velocity
within ``tau`` steps has ``E |d_n|^2 ~ n F(n)``. Optimizers with a momentum of 0.9 were measured to do so.

Where nothing anneals the noise away at the end, each step is to be smaller. For convex problems the best peak of the
last iterate is ``(D / G) / sqrt(T area B)`` with ::

    B = sum(h^2) / sum(h) + sum_k h_k / sum_{t > k}(h_t) sum_{t >= k}(h_t^2) / sum_{t >= k}(h_t)

over ``T`` steps, which is 2.4 for one cycle and 8.5 for a constant schedule of 1,000 steps (6.1 for 100, 10.8 for
10,000). ``1 + 2.5 final`` is their ratio, and within 0.1 of the factor on ``m*`` of a cosine that ends in between.

The best log gain is normal around a centre ``c``, and each round that moved the weights by ``m`` says where that is::

    c <- c + (1 - (1 - follow)^t) (log gain + log(m* / m) - c),     t = 100 share

Movement goes with a power of the learning rate between 0.5 and 1: ``c`` is approached and not passed. After ``until``
of the run movement says less about the learning rate than about how far the loss has fallen, and ``c`` stays.

**Evidence.** From the paired probe: ``A``, lasting progress per hundredth of the run, and ``E``, what the iterates'
noise costs (:func:`hdet.controller.slopes_of`). In a round::

    q = (A - k E) / (|A| + k |E|)  in [-1, 1],     > 0: progress outweighs noise, a larger rate would do better

``Q`` is its average over recent rounds, from 0 on: rounds that do not agree say little, whatever their size.

**Posterior.** Unanimous evidence moves the mean by ``w`` from the prior's centre, where the schedule lets it be seen,
and upwards only::

    log gain = c + w h max(Q, 0)

Noise says "less" also on a plateau, and where annealing will remove it; against a learning rate that is too high there
are the prior and the rollback.

It rests once the schedule has fallen below :attr:`Posterior.rest_below` of its peak for good: its own annealing is not
fought. Without a probe ``Q`` is 0, and the losses speak through the rollback alone (:mod:`hdet.recovery`): a gain at
which the run blew up is not reached again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from hdet.controller import Observation, slopes_of


class Belief(NamedTuple):
    """What is believed of one learning rate, from round to round; the same on every rank."""

    gain: float = 1.0
    """Dimensionless factor on the base schedule."""
    centre: float = 0.0
    """``c``: the log gain at which the movement would be right."""
    ceiling: float = math.inf
    """Log gain that is known to be too high, less a margin."""
    balance: float = 0.0
    """``Q``, in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Joins the movement prior and the probe's evidence in one posterior mean, which the gain follows.

    Raises:
        ValueError: for a value outside the range its field names.
    """

    follow: float = 0.5
    """In (0, 1]: weight of a hundredth of the run in the centre."""
    until: float = 0.4
    """In [0, 1]: share of the run after which movement is no longer followed."""
    evidence: float = 0.35
    """``w`` >= 0: how far, in log gain, unanimous evidence for more takes the mean from the prior's centre."""
    noise_weight: float = 0.2
    """``k`` > 0, in hundredths of the run: how much of it progress must make up for what the noise costs."""
    smoothing: float = 0.8
    """In [0, 1): weight in ``Q`` of what was seen a hundredth of the run ago."""
    bounds: tuple[float, float] = (1e-4, 1e4)
    """Smallest and largest gain, ``0 < low <= 1 <= high``."""
    rest_below: float = 0.7
    """In [0, 1]: height of the schedule, as a share of its peak, below which the gain rests."""

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("follow", 0 < self.follow <= 1, "in (0, 1]"),
            ("until", 0 <= self.until <= 1, "in [0, 1]"),
            ("evidence", 0 <= self.evidence < math.inf, "finite and >= 0"),
            ("noise_weight", 0 < self.noise_weight < math.inf, "finite and > 0"),
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
            ("rest_below", 0 <= self.rest_below <= 1, "in [0, 1]"),
            ("bounds", 0 < self.bounds[0] <= 1 <= self.bounds[1] < math.inf, "0 < low <= 1 <= high < inf"),
        ):
            if not ok:
                raise ValueError(f"Invalid {name}={getattr(self, name)}. Must be {rule}.")

    def begin(self, gain: float) -> Belief:
        """What is believed at the start of a run at this gain."""
        return Belief(gain, math.log(gain))

    def cut(self, belief: Belief, factor: float) -> Belief:
        """After a rollback: the gain divided by ``factor``, all else forgotten but that it was too high before."""
        gain = max(belief.gain / factor, self.bounds[0])
        ceiling = math.log(gain) + math.log(factor) / 2
        return Belief(gain, math.log(gain), min(belief.ceiling, ceiling))

    def wants_probe(self, progress: float, until: float) -> bool:
        """Whether the losses of a round that ends at ``progress`` may still move the gain."""
        return self.evidence > 0 and progress <= until

    def reach(self, height: float) -> float:
        """It has no use for a far point."""
        return 1.0

    def update(self, belief: Belief, seen: Observation) -> tuple[Belief, float | None]:
        """One round: ``(belief, observation) -> (next belief, q)``.

        ``q`` is ``None`` in a round that brought no evidence. What is unknown moves nothing: a movement that is 0 or
        not finite, a probe with fewer than two finite replicas. Where the run's length is unknown (``progress`` is
        NaN), or the schedule has come to rest, the gain stays as it is."""
        length = seen.share * 100
        belief, q = self._listen(belief, seen, length)
        if not seen.progress <= seen.until:
            return belief, q
        low, high = (math.log(bound) for bound in self.bounds)
        centre = belief.centre
        if seen.progress <= self.until and 0 < seen.movement < math.inf:
            right = target(seen.height, seen.share, seen.area, seen.final, seen.steps)
            here = math.log(belief.gain) + math.log(right / seen.movement)
            step = (1 - (1 - self.follow) ** length) * (here - centre)
            centre += min(max(step, -_LARGEST), _LARGEST)
        centre = min(max(centre, low), high, belief.ceiling)
        mean = centre + self.evidence * seen.height * max(belief.balance, 0.0)
        gain = math.exp(min(max(mean, low), high, belief.ceiling))
        return belief._replace(gain=min(max(gain, self.bounds[0]), self.bounds[1]), centre=centre), q

    def _listen(self, belief: Belief, seen: Observation, length: float) -> tuple[Belief, float | None]:
        """The belief with this round's probe, and its ``q``."""
        if seen.probe is None or (slopes := slopes_of(seen.probe, seen.multipliers, seen.lag)) is None:
            return belief, None
        progress, noise = slopes.debiased / length, self.noise_weight * slopes.noise
        size = abs(progress) + abs(noise)
        q = (progress - noise) / size if size > 0 else 0.0
        kept = self.smoothing**length
        return belief._replace(balance=kept * belief.balance + (1 - kept) * q), q


def target(height: float, share: float, area: float, final: float = 0.0, steps: float = math.inf) -> float:
    """``m*``, the movement of a round at the right learning rate; dimensionless.

    Args:
        height: the schedule's, as a share of its peak.
        share: the round's length as a share of the run's, > 0.
        area: mean height over the run, > 0.
        final: the height at the run's end, in [0, 1].
        steps: of the optimizer in the round, >= 1.
    """
    persistent = 1 + math.expm1(-steps / _MEMORY) * _MEMORY / steps
    return math.sqrt(_TOTAL * persistent * max(height, _LOWEST) * share / (area * (1 + _REMAINS * final)))


_TOTAL = 2.0
"""What the squared movements of a run that ends at 0 add up to."""
_MEMORY = 5.0
"""``tau``: steps within which a walk with momentum 0.9 forgets its direction."""
_LARGEST = math.log(4)
"""How far the centre moves in one round at most: the first ones are no measure yet."""
_LOWEST = 0.02
"""Height below which the target falls no further."""
_REMAINS = 2.5
"""By how much more than an annealed run's the noise of one at a constant learning rate weighs at its end."""
