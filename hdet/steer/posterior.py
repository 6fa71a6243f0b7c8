r"""The default controller: what the weights' movement and the losses say of the gain, against the user's own rate.

**Movement.** At the right learning rate the squared relative movements of all rounds (:mod:`hdet.observe.movement`) add
up to 2 over a run that ends at 0, each in proportion to the schedule's height, if a round is many steps. One of ``n``
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

Movement goes with about the power 0.7 of the learning rate. So a round that moved the weights by ``m`` says that the
right log gain is ``r``, and ``c`` averages what recent rounds say::

    r = log gain + log(m* / m) / 0.7
    c <- c + (1 - memory^t) (r - c),     t = 100 share

After ``until`` of the run movement says less about the learning rate than about how far the loss has fallen, and ``c``
stays.

**Losses.** From the paired probe: ``A``, lasting progress per hundredth of the run, and ``E``, what the iterates' noise
costs (:func:`hdet.observe.slopes.slopes_of`). A loss that falls like ``1 / t`` is by ``100 p A`` above
where it will end, at the share ``p`` of the run; at the schedule's peak the noise would cost about ``E / h``. In a
round::

    q = (B - k N) / (|B| + k |N|)  in [-1, 1],     B = 100 p A,     N = (1 + 2.5 final) E / h

Where the learning rate is right, ``q`` is about 0.7 from a tenth of the run on, and it falls by about 0.5 where the
rate is e times higher. So a probe at gain ``g`` says that the right log gain is ``log g + (q - 0.7) / 0.5``, and ``e``
averages what the last probes say; ``heard``, from 0 on and below 1, is how much of a whole average it is::

    heard' = memory heard + 1 - memory
    e      <- (memory heard e + (1 - memory) (log g + (q - 0.7) / 0.5)) / heard'

There is a probe every four hundredths of the run, or every round where rounds are longer. Before a tenth of the run
they say next to nothing, and there are none.

**Together.** The two are independent estimates of the right log gain, of errors that are about normal::

    1 / v = 1 / movement_error^2 + heard / evidence_error^2
    z     = v (c / movement_error^2 + heard e / evidence_error^2)

**The user's rate.** The first rounds say little, so that the variance of ``z`` is ``v'``. Either the user's rate is
right, or any within a factor of 100 is as likely; before the run both are. ``P`` is the probability of the first once
``z`` is known, and the gain follows the posterior mean::

    v' = v + 1 / (100 p)                                               p: share of the run, up to ``until``
    P  = 1 / (1 + sqrt(2 pi v') / (2 log 100) exp(z^2 / (2 v')))
    log gain = (1 - P) z

So a rate is kept that is as good as the estimate can tell, and one that is not is left altogether. The two are even at
a factor of 2.2, and without a probe at one of 2.6. ``P`` is 0 where the user gave no rate, and where it blew up.

The gain rests once the schedule has fallen below :attr:`Posterior.rest_below` of its peak for good: its own annealing
is not fought. Without a probe ``heard`` is 0, and the losses speak through the rollback alone
(:mod:`hdet.steer.recovery`): a gain at which the run blew up is not reached again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hdet.errors import check_bounds, check_field, check_gain, check_instance, check_list, check_number
from hdet.observe.slopes import slopes_of
from hdet.schedules.course import Course
from hdet.steer.observation import Observation, check_observation
from hdet.steer.report import Judgement


class Belief(NamedTuple):
    """What is believed of one learning rate, from round to round; the same on every rank."""

    gain: float = 1.0
    """Dimensionless factor on the base schedule."""
    centre: float = 0.0
    """``c``: the right log gain, as the movement has it."""
    ceiling: float = math.inf
    """Log gain that is known to be too high, less a margin."""
    evidence: float = 0.0
    """``e``: the right log gain, as the probe has it; 0 before the first."""
    heard: float = 0.0
    """How much of a whole average ``e`` is, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The gain follows the posterior mean of what the movement, the probe and the user's rate say.

    Raises:
        TypeError, ValueError: for a value outside the range its field names.
    """

    needs_movement: ClassVar[bool] = True
    needs_length: ClassVar[bool] = True
    probe_every: ClassVar[float] = 0.04
    """Share of the run between probes, or a round if that is longer. Every round gains nothing over every fourth."""

    probe_from: ClassVar[float] = 0.1
    """Share of the run before which there is no probe."""

    memory: float = 0.6
    """In [0, 1): weight, in ``c``, of what was seen a hundredth of the run ago, and in ``e``, of the probe before."""
    until: float = 0.4
    """In [0, 1]: share of the run after which movement is no longer followed."""
    noise_weight: float = 0.3
    """``k`` > 0: how much what the noise costs weighs against how far the loss is above its end."""
    movement_error: float = 0.45
    """> 0: standard deviation of ``c`` from the right log gain, late in a run."""
    evidence_error: float = 0.5
    """> 0: that of ``e``."""
    bounds: tuple[float, float] = (1e-4, 1e4)
    """Smallest and largest gain, ``0 < low <= 1 <= high``."""
    rest_below: float = 0.7
    """In [0, 1]: height of the schedule, as a share of its peak, below which the gain rests."""

    def __post_init__(self) -> None:
        check_field(self, "memory", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
        check_field(self, "until", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_field(self, "noise_weight", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "movement_error", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "evidence_error", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "rest_below", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_field(self, "bounds", check_bounds)

    def begin(self, gain: float) -> Belief:
        """What is believed at the start of a run at this gain."""
        check_gain("gain", gain)
        return Belief(gain, math.log(gain))

    def cut(self, belief: Belief, factor: float) -> Belief:
        """After a rollback: the gain divided by ``factor``, all else forgotten but that it was too high before."""
        check_instance("belief", belief, Belief, "an hdet.controller.Belief")
        _checked("belief", belief)
        check_number("factor", factor, ">= 1", lambda x: x >= 1)
        gain = max(belief.gain / factor, self.bounds[0])
        ceiling = math.log(gain) + math.log(factor) / 2
        return Belief(gain, math.log(gain), min(belief.ceiling, ceiling))

    def restored(self, controller: Sequence[Any]) -> Belief:
        """What is believed, from a saved belief's values.

        Raises:
            TypeError, ValueError: if they are not such as a run can have.
        """
        belief = _checked("controller", check_list("controller", controller, "a list of numbers"))
        check_gain("controller.gain", belief.gain)
        return belief

    def rests_after(self, course: Course) -> float:
        """Share of the run after which the gain rests."""
        check_instance("course", course, Course, "an hdet.schedules.course.Course")
        return course.high_until(self.rest_below)

    def wants_probe(self, progress: float, until: float) -> bool:
        """Whether the losses of a round that ends at ``progress`` may still move the gain."""
        check_number("progress", progress, "a share of the run, or NaN", finite=False)
        check_number("until", until, "a share of the run")
        return progress <= until

    def update(self, belief: Belief, observation: Observation) -> tuple[Belief, float | None]:
        """One round: ``(belief, observation) -> (next belief, q)``.

        ``q`` is ``None`` in a round that brought no evidence. What is unknown moves nothing: a movement that is 0 or
        not finite, a probe with fewer than two finite replicas. Where the run's length is unknown (``progress`` is
        NaN), or the schedule has come to rest, the gain stays as it is."""
        check_instance("belief", belief, Belief, "an hdet.controller.Belief")
        _checked("belief", belief)
        check_observation(observation)
        length = observation.share * 100
        belief, q = self._listen(belief, observation)
        if not observation.progress <= observation.until:
            return belief, q
        low, high = (math.log(bound) for bound in self.bounds)
        centre = belief.centre
        if observation.progress <= self.until and 0 < observation.movement < math.inf:
            right = target(
                observation.height, observation.share, observation.area, observation.final, observation.steps
            )
            here = math.log(belief.gain) + math.log(right / observation.movement) / _POWER
            step = (1 - self.memory**length) * (here - centre)
            centre += min(max(step, -_LARGEST), _LARGEST)
        centre = min(max(centre, low), high, belief.ceiling)
        belief = belief._replace(centre=centre)
        estimate, trust = self._estimate(belief, observation)
        gain = math.exp(min(max((1 - trust) * estimate, low), high, belief.ceiling))
        return belief._replace(gain=min(max(gain, self.bounds[0]), self.bounds[1])), q

    def _estimate(self, belief: Belief, observation: Observation) -> tuple[float, float]:
        """``z`` and ``P``."""
        by_movement, by_evidence = 1 / self.movement_error**2, belief.heard / self.evidence_error**2
        certainty = by_movement + by_evidence
        estimate = (by_movement * belief.centre + by_evidence * belief.evidence) / certainty
        if not observation.given or belief.ceiling < 0:
            return estimate, 0.0
        seen = max(100 * min(observation.progress, self.until), observation.share * 100)
        return estimate, right_as_given(estimate, 1 / certainty + 1 / seen)

    def judge(self, belief: Belief, observation: Observation) -> Judgement:
        """What a round has come to, for the report.

        Args:
            belief: after the round.
            observation: of it.
        """
        check_instance("belief", belief, Belief, "an hdet.controller.Belief")
        _checked("belief", belief)
        check_observation(observation)
        seen = observation
        estimate, trust = self._estimate(belief, seen)
        return Judgement(
            target=target(seen.height, seen.share, seen.area, seen.final, seen.steps),
            centre=math.exp(belief.centre),
            evidence=math.exp(belief.evidence) if belief.heard > 0 else math.nan,
            estimate=math.exp(estimate),
            trust=trust,
            rests=not seen.progress <= seen.until,
        )

    def _listen(self, belief: Belief, observation: Observation) -> tuple[Belief, float | None]:
        """The belief with this round's probe, and its ``q``."""
        q = self._balance(observation)
        if q is None:
            return belief, None
        here = math.log(belief.gain) + (q - USUAL) / FALL
        before, heard = self.memory * belief.heard, self.memory * belief.heard + 1 - self.memory
        evidence = (before * belief.evidence + (heard - before) * here) / heard
        return belief._replace(evidence=evidence, heard=heard), q

    def _balance(self, seen: Observation) -> float | None:
        """``q`` of a round; ``None`` without a probe that is to be listened to."""
        if seen.probe is None or not seen.progress >= self.probe_from:
            return None
        slopes = slopes_of(seen.probe, seen.multipliers, seen.lag)
        if slopes is None:
            return None
        above = seen.progress * slopes.debiased / seen.share
        cost = self.noise_weight * slopes.noise * (1 + _REMAINS * seen.final) / max(seen.height, LOWEST)
        size = abs(above) + abs(cost)
        return (above - cost) / size if size > 0 else 0.0


def _checked(name: str, values: Sequence[Any]) -> Belief:
    """A belief of these values, or TypeError or ValueError if it is none."""
    fields = "[gain, centre, ceiling, evidence, heard]"
    gain, centre, ceiling, evidence, heard = check_list(name, values, fields, length=5)
    return Belief(
        check_number(f"{name}.gain", gain, "> 0", lambda x: x > 0),
        check_number(f"{name}.centre", centre, "a log gain"),
        check_number(f"{name}.ceiling", ceiling, "a log gain, or inf", lambda x: x > -math.inf, finite=False),
        check_number(f"{name}.evidence", evidence, "a log gain, within 100 of 0", lambda x: abs(x) <= 100),
        check_number(f"{name}.heard", heard, "in [0, 1]", lambda x: 0 <= x <= 1),
    )


def right_as_given(estimate: float, variance: float) -> float:
    """``P``, the probability that the user's rate is right.

    Args:
        estimate: of the right log gain, ``z``.
        variance: of its error, > 0.
    """
    exponent = min(estimate**2 / (2 * variance), _FAR)
    return 1 / (1 + math.sqrt(2 * math.pi * variance) / (2 * _WIDE) * math.exp(exponent))


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
    return math.sqrt(_TOTAL * persistent * max(height, LOWEST) * share / (area * (1 + _REMAINS * final)))


_TOTAL = 2.0
"""What the squared movements of a run that ends at 0 add up to."""
_MEMORY = 5.0
"""``tau``: steps within which a walk with momentum 0.9 forgets its direction."""
_POWER = 0.7
"""Of the learning rate, with which movement goes: 0.6 to 0.9 in the mean over workloads, by the time in the run."""
USUAL = 0.7
"""``q`` at the right learning rate."""
FALL = 0.5
"""By how much ``q`` falls where the learning rate is e times higher."""
_WIDE = math.log(100)
"""How far, in log gain, a user's rate that is not right may be off; all of it is as likely."""
_FAR = 600.0
"""An exponent that can still be computed."""
_LARGEST = math.log(4)
"""How far the centre moves in one round at most: the first ones are no measure yet."""
LOWEST = 0.02
"""Height below which the target falls no further."""
_REMAINS = 2.5
"""By how much more than an annealed run's the noise of one at a constant learning rate weighs at its end."""
