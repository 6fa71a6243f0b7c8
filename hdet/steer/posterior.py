r"""The default controller: a prior from how far the weights move, evidence from the losses, one posterior mean.

**Prior.** At the right learning rate the weights of a net walk about once their own size during a run, in quadrature:
the squared relative movements of all rounds (:mod:`hdet.observe.movement`) add up to 1, each in proportion to the
schedule's height. A round of length ``share`` (of the run), at height ``h``, should therefore move them by ::

    m* = sqrt(h share / (area (1 + 2.5 final))),    area = mean height over the run,  final = height at its end

so that ``sum(m*^2) = 1`` where the schedule ends at 0. Where nothing anneals the noise away, each step is to be
smaller: for convex problems the best peak of the last iterate is ``(D / G) / sqrt(T area B)`` with ::

    B = sum(h^2) / sum(h) + sum_k h_k / sum_{t > k}(h_t) sum_{t >= k}(h_t^2) / sum_{t >= k}(h_t)

over ``T`` steps, which is 2.4 for one cycle and 8.5 for a constant schedule of 1,000 steps (6.1 for 100, 10.8 for
10,000). ``1 + 2.5 final`` is their ratio, and within 0.1 of the factor on ``m*`` of a cosine that ends in between.

The best log gain is normal around a centre ``c``, and each round that moved the weights by ``m`` says where that is::

    c <- c + (1 - (1 - follow)^t) (log gain + log(m* / m) - c),     t = 100 share

Movement goes with a power of the learning rate between 0.5 and 1: ``c`` is approached and not passed. After ``until``
of the run movement says less about the learning rate than about how far the loss has fallen, and ``c`` stays.

**Evidence.** From the paired probe: ``A``, lasting progress per hundredth of the run, and ``E``, what the iterates'
noise costs (:func:`hdet.observe.slopes.slopes_of`). In a round::

    q = (A - k E) / (|A| + k |E|)  in [-1, 1],     > 0: progress outweighs noise, a larger rate would do better

``Q`` is its average over recent rounds, from 0 on: rounds that do not agree say little, whatever their size.

**Posterior.** Unanimous evidence moves the mean by ``w`` from the prior's centre, where the schedule lets it be seen,
and upwards only::

    log gain = c + w h max(Q, 0)

Noise says "less" also on a plateau, and where annealing will remove it; against a learning rate that is too high there
are the prior and the rollback.

It rests once the schedule has fallen below :attr:`Posterior.rest_below` of its peak for good: its own annealing is not
fought. Without a probe ``Q`` is 0, and the losses speak through the rollback alone (:mod:`hdet.steer.recovery`): a
gain at which the run blew up is not reached again.
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
        TypeError, ValueError: for a value outside the range its field names.
    """

    needs_movement: ClassVar[bool] = True
    needs_length: ClassVar[bool] = True

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
        check_field(self, "follow", check_number, "in (0, 1]", lambda x: 0 < x <= 1)
        check_field(self, "until", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_field(self, "evidence", check_number, "finite and >= 0", lambda x: x >= 0)
        check_field(self, "noise_weight", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "smoothing", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
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

    def restored(self, values: Sequence[Any]) -> Belief:
        """What is believed, from a saved belief's values.

        Raises:
            TypeError, ValueError: if they are not such as a run can have.
        """
        belief = _checked("controller", check_list("controller", values, "a list of numbers"))
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
        return self.evidence > 0 and progress <= until

    def update(self, belief: Belief, seen: Observation) -> tuple[Belief, float | None]:
        """One round: ``(belief, observation) -> (next belief, q)``.

        ``q`` is ``None`` in a round that brought no evidence. What is unknown moves nothing: a movement that is 0 or
        not finite, a probe with fewer than two finite replicas. Where the run's length is unknown (``progress`` is
        NaN), or the schedule has come to rest, the gain stays as it is."""
        check_instance("belief", belief, Belief, "an hdet.controller.Belief")
        _checked("belief", belief)
        check_observation(seen)
        length = seen.share * 100
        belief, q = self._listen(belief, seen, length)
        if not seen.progress <= seen.until:
            return belief, q
        low, high = (math.log(bound) for bound in self.bounds)
        centre = belief.centre
        if seen.progress <= self.until and 0 < seen.movement < math.inf:
            right = target(seen.height, seen.share, seen.area, seen.final)
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


def _checked(name: str, values: Sequence[Any]) -> Belief:
    """A belief of these values, or TypeError or ValueError if it is none."""
    gain, centre, ceiling, balance = check_list(name, values, "[gain, centre, ceiling, balance]", length=4)
    return Belief(
        check_number(f"{name}.gain", gain, "> 0", lambda x: x > 0),
        check_number(f"{name}.centre", centre, "a log gain"),
        check_number(f"{name}.ceiling", ceiling, "a log gain, or inf", lambda x: x > -math.inf, finite=False),
        check_number(f"{name}.balance", balance, "in [-1, 1]", lambda x: -1 <= x <= 1),
    )


def target(height: float, share: float, area: float, final: float = 0.0) -> float:
    """``m*``, the movement of a round at the right learning rate; dimensionless.

    Args:
        height: the schedule's, as a share of its peak.
        share: the round's length as a share of the run's, > 0.
        area: mean height over the run, > 0.
        final: the height at the run's end, in [0, 1].
    """
    return math.sqrt(max(height, _LOWEST) * share / (area * (1 + _REMAINS * final)))


_LARGEST = math.log(4)
"""How far the centre moves in one round at most: the first ones are no measure yet."""
_LOWEST = 0.02
"""Height below which the target falls no further."""
_REMAINS = 2.5
"""By how much more than an annealed run's the noise of one at a constant learning rate weighs at its end."""
