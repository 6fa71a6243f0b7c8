"""The default controller: two slopes of the loss, weighed. A pure function of plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hdet.errors import check_bounds, check_field, check_instance, check_list, check_number
from hdet.observe.slopes import TOO_LARGE, Slopes, loss_near, mean_of, slopes_of
from hdet.schedules.course import Course
from hdet.steer.observation import ControllerState, Observation, check_update, clamped
from hdet.steer.running_average import (
    HUNDREDTH,
    MIN_ROUNDS,
    Decay,
    mean_and_error,
    significance,
    t_statistic,
    update_average,
    weighted_sum,
)

_OUTLIER = 3.0
"""Standard deviations of ``R`` below its average; a round further below widens its error only by as much."""
_LOWEST = 0.02
"""Height of the schedule below which the far point goes no farther."""


@dataclass(frozen=True, kw_only=True)
class TwoSlope:
    r"""Weighs two slopes of the loss over the log learning rate, both from the paired probe.

    With ``z_r = rho_r - 1``, ``lag`` the rounds between the slow average and its trail, and ``c`` a round's length in
    hundredths of the run::

        R = -sum_r(sign(z_r) (above_r - below_r) / 2) / sum_r(|z_r|) / c    raw slope
        A = -mean_r(slow_above_r - slow_below_r) / (2 lag) / c              debiased slope
        E = mean_r((above_r + below_r) / 2 + mirror_r - slow_above_r - slow_below_r) / 2     noise
        F = mean_r(far_r - slow_above_r)      at reach = far / height: is a rate so much higher still too low?
        x = (1 - u) R + u (A - K E),  K = k + 2 final s^2
        u = min(1, progress / ramp),  s = clip((progress - ramp) / (until - ramp), 0, 1),  k: noise_weight[0] -> [1]
        t = x(means) / sqrt((1 - u)^2 var(R) + u^2 var(A) + (u K)^2 var(E))      of means over recent rounds, decay
                                                                                 ``smoothing^c``, and their variances
        t = the same of R / l, A / l, E / l, if that is larger         l: the training loss, averaged over a few rounds
        t = 0, if t < 0 and F < overshoot L
        q = sign(t) clip((|t| - threshold) / slack, 0, 1)                inside the noise nothing moves
        log gain += step * min(1, c) * (down q if q < 0 else climb q if F < 0, up to ramp, else height q)
        log gain -= step * down  instead, if the training loss, averaged over recent rounds, is ``rise`` times its
                                 lowest, by a standard error

    The raw slope shows at once that a learning rate is too high, but favours a low one: that damps the iterates' noise,
    and the progress that it gives up shows only later. So it decides in the warm-up, as in a learning-rate range test.
    The debiased slope does not contain noise, and lasting progress is positive until the learning rate is so high that
    none is left. From it a little of the noise is subtracted, ``k``, and more where no annealing will remove it: under
    a constant schedule ``x`` ends as the raw slope again (in expectation ``R = A - 2 E`` with ``c = 1``), and the gain
    anneals.

    Time is counted in hundredths of the run, however many rounds there are: what a learning rate gains in a round, and
    how far the gain should move, go with the round's length; the noise does not. A step is not longer in a longer
    round.

    Where the loss has fallen far, the slopes are small, and their errors are those of the earlier rounds, in which they
    were larger. Relative to the training loss of their time, all rounds count alike. The gain rises if either form of
    ``t`` is positive and falls only if both are negative. (With a loss that is not positive there is only the first.)

    On a plateau there is no lasting progress, and the noise makes ``t`` negative although a large learning rate does no
    harm. There the gain falls only if the far point overshoots (``L`` is the loss beside it, ``L(e + (e - f))``).

    A training loss that rises lowers the gain by itself: up to the best learning rate, its average over a few rounds
    stays within 1.25 times its lowest, at four times that rate it mostly does not. Where it has risen to ``rise`` times
    its lowest, the gain falls by a whole step, however short the round, and the lowest is counted from there.

    The slopes have a sign, and no size. By the line identity a run at ``n`` times the learning rate is, to first order,
    ``n`` times as far along: where ``far`` times the progress that there would be at the schedule's peak still does not
    overshoot, the gain climbs ``climb`` steps at once, whatever the schedule's height; up to ``ramp`` only, since one
    batch may show this by chance. A round whose losses are not finite moves the log gain down by ``step``. Once the
    schedule has fallen below ``rest_below`` for good, after ``until``, the gain rests, and does not undo
    the annealing.

    Raises:
        TypeError, ValueError: for a value outside the range its field names.
    """

    needs_probe: ClassVar[bool] = True

    step: float = 0.2
    """> 0: how far the log gain rises in a round, and in a hundredth of the run, at most, unless it climbs."""
    ramp: float = 0.2
    """In (0, 1]: share of the run over which the debiased slope takes over from the raw one."""
    noise_weight: tuple[float, float] = (0.7, 0.06)
    """``k``, > 0, up to ``ramp`` and at ``until``; in between on a log scale."""
    rise: float = 1.3
    """> 1: by how many times its lowest the training loss may rise over a few rounds before the gain falls."""
    smoothing: float = 0.5
    """In [0, 1): weight of what was a hundredth of the run ago, in the averages over recent rounds."""
    overshoot: float = 0.5
    """>= 0: by how many times the loss the far point must be worse if slopes are to argue for less. With a loss that is
    not positive it need not be."""
    threshold: float = 1.0
    """>= 0: standard errors from zero up to which nothing moves."""
    slack: float = 2.0
    """> 0: standard errors beyond ``threshold`` at which the step is whole."""
    down: float = 2.0
    """> 0: how much faster the gain falls than it rises."""
    far: float = 8.0
    """>= 1: by how much a learning rate must be too low for the gain to climb."""
    climb: float = 6.0
    """> 0: steps by which it then rises, up to ``ramp``."""
    rest_below: float = 0.7
    """In [0, 1]: height of the schedule, as a share of its peak, below which the gain rests. OneCycle with torch's
    defaults gets there after 56% of the run."""
    bounds: tuple[float, float] = (1e-3, 1e3)
    """Smallest and largest gain, ``0 < low <= 1 <= high``."""

    def __post_init__(self) -> None:
        check_field(self, "step", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "ramp", check_number, "in (0, 1]", lambda x: 0 < x <= 1)
        check_field(self, "noise_weight", _noise_weight)
        check_field(self, "rise", check_number, "> 1; inf: any", lambda x: x > 1, finite=False)
        check_field(self, "smoothing", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
        check_field(self, "overshoot", check_number, "finite and >= 0", lambda x: x >= 0)
        check_field(self, "threshold", check_number, "finite and >= 0", lambda x: x >= 0)
        check_field(self, "slack", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "down", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "far", check_number, "finite and >= 1", lambda x: x >= 1)
        check_field(self, "climb", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "rest_below", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_field(self, "bounds", check_bounds)

    def wants_probe(self, progress: float, until: float) -> bool:
        """Whether a round that ends at ``progress`` may still move the gain."""
        check_number("progress", progress, "a share of the run, or NaN", finite=False)
        check_number("until", until, "a share of the run")
        return progress <= until

    def rests_after(self, course: Course) -> float:
        """Share of the run after which the gain rests."""
        check_instance("course", course, Course, "an hdet.schedules.course.Course")
        return course.high_until(self.rest_below)

    def reach(self, height: float) -> float:
        """How far the far point is to be from the slow average, in units of ``e - f``."""
        check_number("height", height, "a share of the schedule's peak")
        return self.far / max(height, _LOWEST)

    def update(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, float | None]:
        """One round: ``(state, observation) -> (next state, x)``, ``x`` in units of the loss per hundredth of the run.

        In a round without a probe ``x`` is ``None``, and the state unchanged."""
        check_update(state, observation)
        check_number("state.gain", state.gain, "> 0", lambda gain: gain > 0)
        if observation.probe is None or not self.wants_probe(observation.progress, observation.until):
            return state, None
        slopes = slopes_of(observation.probe, observation.multipliers, observation.lag)
        if slopes is None:
            return state._replace(gain=clamped(math.log(state.gain) - self.step, self.bounds)), -math.inf
        if math.isnan(slopes.raw) and observation.progress < self.ramp:
            return state, None  # learning rates did not differ in this round, and the raw slope still counts
        length = observation.share / HUNDREDTH
        slopes = slopes._replace(raw=slopes.raw / length, debiased=slopes.debiased / length)
        weights = self._weights(observation.progress, observation.until, observation.final)
        rounds = state.rounds + 1
        level, has_risen = self._updated_level(state.level, observation.losses, length)
        decay = Decay(self.smoothing, 0.95).over(length)
        kept = _update_all(state.slopes or ((0.0, 0.0),) * 6, slopes, _loss_unit(level, length), rounds, decay)
        known = [mean_and_error(one, rounds, decay) for one in kept]
        mean, error = weighted_sum(weights, known[:3])
        t = max(t_statistic(mean, error), t_statistic(*weighted_sum(weights, known[3:])))
        if t < 0 and slopes.further < self.overshoot * loss_near(observation.probe):
            t = 0.0  # a plateau
        moved = ControllerState(state.gain, mean, rounds, kept, level)
        q = significance(t, rounds, self.threshold, self.slack)
        far_too_low = slopes.further < 0 and observation.progress <= self.ramp
        rise = self.climb if far_too_low else observation.height
        change = self.step * min(1.0, length) * (self.down if q < 0 else rise) * q
        if has_risen:
            change = -self.step * self.down
        if change:
            moved = moved._replace(gain=clamped(math.log(state.gain) + change, self.bounds))
        return moved, _weighed(slopes, weights)

    def _updated_level(
        self, level: tuple[float, float, int, float], losses: Sequence[float], length: float
    ) -> tuple[tuple[float, float, int, float], bool]:
        """``ControllerState.level`` with this round's losses, and whether it has risen too far; its lowest then counts
        from where it is now."""
        known = [loss for loss in losses if abs(loss) < TOO_LARGE]
        if not known:
            return level, False
        average, variance, rounds, lowest = level
        rounds += 1
        recent = _RECENT.over(length)
        kept = update_average((average, variance), mean_of(known), rounds, recent)
        mean, error = mean_and_error(kept, rounds, recent)
        if rounds * length <= 1:  # too few to count from
            return (*kept, rounds, mean), False
        risen = mean - lowest
        has_risen = rounds > MIN_ROUNDS and risen > error and risen > (self.rise - 1) * abs(lowest)
        return (*kept, rounds, mean if has_risen else min(mean, lowest)), has_risen

    def evidence(self, slopes: Slopes, progress: float, until: float, final: float) -> float:
        """``x`` of one round: > 0 for "a larger learning rate would do better"."""
        check_instance("slopes", slopes, Slopes, "an hdet.controller.Slopes")
        for name, slope in slopes._asdict().items():
            check_number(f"slopes.{name}", slope, "a slope, or NaN", finite=False)
        for name, share in (("progress", progress), ("until", until), ("final", final)):
            check_number(name, share, "in [0, 1]", lambda share: 0 <= share <= 1)
        return _weighed(slopes, self._weights(progress, until, final))

    def _weights(self, progress: float, until: float, final: float) -> tuple[float, float, float]:
        """Of ``R``, ``A`` and ``E`` in ``x``."""
        u = min(1.0, progress / self.ramp)
        first, last = self.noise_weight
        late = min(1.0, max(0.0, progress - self.ramp) / max(until - self.ramp, 1e-9))
        return 1 - u, u, -u * (first * (last / first) ** late + 2 * final * late**2)


def _noise_weight(name: str, value: object) -> tuple[float, ...]:
    rule = "a pair of numbers > 0, finite"
    pair = check_list(name, value, rule, length=2)
    return tuple(check_number(name, weight, rule, lambda x: x > 0) for weight in pair)


def _weighed(slopes: Slopes, weights: Sequence[float]) -> float:
    """The sum, to which a slope without weight adds nothing, even if it is NaN."""
    return math.fsum(weight * x for weight, x in zip(weights, slopes[:3], strict=True) if weight)


def _update_all(
    kept: tuple[tuple[float, float], ...], slopes: Slopes, level: float, rounds: int, decay: Decay
) -> tuple[tuple[float, float], ...]:
    """``ControllerState.slopes`` with the latest of ``rounds``, in units of the loss and of ``level``."""
    lowest = (_OUTLIER, None, None)
    latest = [(x / unit, low) for unit in (1.0, level) for x, low in zip(slopes[:3], lowest, strict=True)]
    return tuple(
        update_average(old, x, rounds, decay, low) if math.isfinite(x) else old
        for old, (x, low) in zip(kept, latest, strict=True)
    )


def _loss_unit(level: tuple[float, float, int, float], length: float) -> float:
    """The training loss that ``ControllerState.level`` remembers, or 1 where that is none to divide by."""
    rounds, recent = level[2], _RECENT.over(length)
    loss = mean_and_error(level[:2], rounds, recent)[0] if rounds else 0.0
    return loss if loss > 0 else 1.0


_RECENT = Decay(0.6, 0.8)
"""Of the training loss."""
