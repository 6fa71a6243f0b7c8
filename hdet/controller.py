r"""Controllers: what the replicas' losses say about the base schedule. Pure functions over plain floats, no torch.

A controller moves the **gain** ``g`` of one hyperparameter: replica ``r`` trains under ``schedule * g * rho_r``. The
state is a tuple of floats, the observation is the same on every rank, so every rank computes the same next state.

:class:`TwoSlope` is ours; it needs the paired probe (:mod:`hdet.probe`) and states its equations itself.

The published controller (arXiv 2604.24708), with ``h_r`` the replicas' values and ``L_r`` their losses::

    w     = softmax((mean(L) - L_r) / sigma)
    Delta = sum(w * h_r) - mean(h_r)            the hypergradient: > 0 where replicas with larger values did better
    v     = beta * v + (1 - beta) * Delta       the velocity
    h     = h * (1 - gamma) + lambda * v

:class:`Published` computes this with its faults corrected, or with ``literal=True`` as it stands;
``docs/controller.md`` lists every deviation and its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ControllerState(NamedTuple):
    """What a controller remembers of one hyperparameter from round to round; the same on every rank."""

    gain: float = 1.0
    """Dimensionless factor on the base schedule."""
    velocity: float = 0.0
    """Momentum average of the hypergradient, ``v``."""
    rounds: int = 0
    """Rounds observed so far."""
    slopes: tuple[tuple[float, float], ...] = ()
    """Average and variance over recent rounds, of ``R``, ``A``, ``E`` and of these relative to the training loss;
    :class:`TwoSlope` only."""
    level: tuple[float, float, int, float] = (0.0, 0.0, 0, math.inf)
    """Of the training loss: average and variance over recent rounds, their number, and what the average has been at
    least since the gain last fell because of it; :class:`TwoSlope` only."""


class ProbeLosses(NamedTuple):
    """The paired probe's losses, by replica; :mod:`hdet.probe` says of which points."""

    above: tuple[float, ...]
    below: tuple[float, ...]
    slow_above: tuple[float, ...]
    slow_below: tuple[float, ...]
    mirror: tuple[float, ...]
    far: tuple[float, ...]


class Observation(NamedTuple):
    """One round as the controller sees it. Index ``r`` of both tuples is replica ``r``."""

    losses: tuple[float, ...]
    """Mean training loss of each replica over the round; NaN where a replica reported none."""
    multipliers: tuple[float, ...]
    """``rho_pi(r)``: each replica's multiplier in the round."""
    schedule: float
    """The base schedule's own value (before the gain) at the round's last step; only ``literal=True`` reads it."""
    progress: float = math.nan
    """Share of the run that is over, in [0, 1]."""
    share: float = 0.01
    """The round's length as a share of the run's, > 0."""
    height: float = 1.0
    """The schedule's value as a share of its peak, in [0, 1]."""
    until: float = 1.0
    """Share of the run after which the schedule stays below ``TwoSlope.rest_below``."""
    final: float = 0.0
    """The schedule's last value as a share of its peak, in [0, 1]: 0 if it anneals, 1 if it is constant."""
    probe: ProbeLosses | None = None
    """``None`` in a round without a probe."""
    lag: float = 1.0
    """Rounds of progress between the probe's slow average and its trail."""
    movement: float = math.nan
    """How far the round took the weights, relative to their size (:mod:`hdet.observe.movement`); NaN if not known."""
    area: float = 1.0
    """Mean height of the schedule over the whole run, in (0, 1]."""
    steps: float = math.inf
    """Of the optimizer in the round, >= 1; infinite if not known."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's momentum controller on the replicas' training losses.

    Raises:
        ValueError: for a value outside the range its field names.
    """

    meta_lr: float = 1.0
    """``lambda`` >= 0: how far the log gain moves per unit of velocity and round."""
    momentum: float = 0.8
    """``beta`` in [0, 1): how slowly the velocity follows the hypergradient."""
    temperature: float = 1.0
    """``sigma`` > 0, in units of the standard deviation of the replicas' losses (``literal``: in units of the loss)."""
    decay: float = 0.0
    """``gamma`` in [0, 1): how fast the log gain returns to 0, the user's own schedule (``literal``: how fast the
    learning rate itself decays; negative values give the published code's sign, with which it grows)."""
    bounds: tuple[float, float] = (1e-3, 1e3)
    """Smallest and largest gain, ``0 < low <= 1 <= high``. ``literal`` has none."""
    warmup_rounds: int = 2
    """Rounds at the start that feed the velocity but do not move the gain. ``literal`` has none."""
    literal: bool = False
    """Compute the published update word for word, for comparison."""

    def __post_init__(self) -> None:
        _require("meta_lr", self.meta_lr, self.meta_lr >= 0, "finite and >= 0")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _require("temperature", self.temperature, self.temperature > 0, "finite and > 0")
        decay_ok = self.decay < 1 if self.literal else 0 <= self.decay < 1
        _require("decay", self.decay, decay_ok, "< 1" if self.literal else "in [0, 1)")
        _check_bounds(self.bounds)
        if self.warmup_rounds < 0 or self.warmup_rounds != int(self.warmup_rounds):
            raise ValueError(f"Invalid warmup_rounds={self.warmup_rounds}. Must be a whole number >= 0.")

    def begin(self, gain: float) -> ControllerState:
        """The state of a run, or of one that was taken back, at this gain."""
        return ControllerState(gain)

    def cut(self, state: ControllerState, factor: float) -> ControllerState:
        """After a rollback: the gain divided by ``factor``, all else forgotten."""
        return ControllerState(state.gain / factor)

    def wants_probe(self, progress: float, until: float) -> bool:
        """It has no use for one."""
        return False

    def reach(self, height: float) -> float:
        """Nor for a far point."""
        return 1.0

    def update(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, float | None]:
        """One round: ``(state, observation) -> (next state, hypergradient)``.

        The hypergradient is ``None``, and the state unchanged, when fewer than two replicas have a finite loss.
        In units: ``Delta`` and ``v`` are relative (fractions of the base learning rate); with ``literal`` they are
        learning rates, as published.
        """
        return (_literal_update if self.literal else _update)(self, state, observation)


class Slopes(NamedTuple):
    """What one probe says, in units of the loss."""

    raw: float
    """``R``: by how much a round at a relatively larger learning rate would have ended lower, per unit of log LR."""
    debiased: float
    """``A``: the same, once the noise of the iterates is averaged out: lasting progress per round."""
    noise: float
    """``E``: how far above the slow average the iterates' noise keeps the loss."""
    further: float
    """``F``: by how much the loss at the far point is above that at ``e + (e - f)``. Below 0, the learning rate is far
    too low. NaN if the far point's loss is not finite."""


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
        t = x(means) / sqrt((1 - u)^2 var(R) + u^2 var(A) + (u K)^2 var(E))      of means over recent rounds, memory
                                                                                 ``smoothing^c``, and their variances
        t = the same of R / l, A / l, E / l, if that is larger         l: the training loss, averaged over a few rounds
        t = 0, if t < 0 and F < overshoot L
        q = sign(t) clip((|t| - threshold) / slack, 0, 1)                inside the noise nothing moves
        log gain += step * min(1, c) * (down q if q < 0 else climb q if F < 0, up to ramp, else height q)
        log gain -= step * down  instead, if the training loss, averaged over recent rounds, is ``rise`` times its
                                 lowest, by a standard error

    The raw slope sees at once that a learning rate is too high, but prefers a low one: that damps the iterates' noise,
    and what it gives up only shows later. So it rules the warm-up, as in a learning-rate range test. The debiased slope
    cannot see noise, and lasting progress is positive until the learning rate is so high that none is left; a little of
    the noise is held against it, ``k``, and more where no annealing will remove it: under a constant schedule ``x``
    ends as the raw slope again (in expectation ``R = A - 2 E`` with ``c = 1``), and the gain anneals.

    It counts in hundredths of the run, however many rounds there are: what a learning rate gains in a round, and how
    far the gain should move, go with the round's length; the noise does not. A step is not longer in a longer round.

    Too high is loud, too low is quiet. Where the loss has fallen far, the slopes are small, and their errors are those
    of the livelier rounds before. Relative to the loss of their time, rounds count alike. Either may argue for more;
    for less both must. (With a loss that is not positive there is but the first.)

    On a plateau there is no lasting progress either, and what noise there is says "less". But there it costs nothing to
    go far: too high is only what overshoots (``L`` is the loss beside the far point, ``L(e + (e - f))``).

    A loss that rises says "less" by itself: up to the best learning rate the training loss, averaged over a few rounds,
    stays within 1.25 times its lowest, at four times it mostly does not. Where it has risen to ``rise`` times its
    lowest, the gain falls by a whole step, however short the round, and the lowest is counted from there.

    The slopes say "more", not how much. By the line identity a run at ``n`` times the learning rate is, to first order,
    ``n`` times as far along: where ``far`` times the progress that there would be at the schedule's peak still does not
    overshoot, the gain climbs ``climb`` steps at once, whatever the schedule's height; up to ``ramp`` only, for a
    batch may say so by chance. A round whose losses are not finite moves the log gain down by ``step``. Once the
    schedule has fallen below ``rest_below`` for good, after ``until``, the gain rests: its own annealing is not fought.

    Raises:
        ValueError: for a value outside the range its field names.
    """

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
        _require("step", self.step, self.step > 0, "finite and > 0")
        _require("ramp", self.ramp, 0 < self.ramp <= 1, "in (0, 1]")
        for weight in self.noise_weight:
            _require("noise_weight", weight, weight > 0, "finite and > 0")
        if not self.rise > 1:
            raise ValueError(f"Invalid rise={self.rise}. Must be > 1; inf: any.")
        _require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "in [0, 1)")
        _require("overshoot", self.overshoot, self.overshoot >= 0, "finite and >= 0")
        _require("threshold", self.threshold, self.threshold >= 0, "finite and >= 0")
        _require("slack", self.slack, self.slack > 0, "finite and > 0")
        _require("down", self.down, self.down > 0, "finite and > 0")
        _require("far", self.far, self.far >= 1, "finite and >= 1")
        _require("climb", self.climb, self.climb > 0, "finite and > 0")
        _require("rest_below", self.rest_below, 0 <= self.rest_below <= 1, "in [0, 1]")
        _check_bounds(self.bounds)

    def begin(self, gain: float) -> ControllerState:
        """The state of a run, or of one that was taken back, at this gain."""
        return ControllerState(gain)

    def cut(self, state: ControllerState, factor: float) -> ControllerState:
        """After a rollback: the gain divided by ``factor``, all else forgotten."""
        return ControllerState(state.gain / factor)

    def wants_probe(self, progress: float, until: float) -> bool:
        """Whether a round that ends at ``progress`` may still move the gain."""
        return progress <= until

    def reach(self, height: float) -> float:
        """How far the far point is to be from the slow average, in units of ``e - f``."""
        return self.far / max(height, _LOWEST)

    def update(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, float | None]:
        """One round: ``(state, observation) -> (next state, x)``, ``x`` in units of the loss per hundredth of the run.

        In a round without a probe ``x`` is ``None``, and the state unchanged."""
        if observation.probe is None or not self.wants_probe(observation.progress, observation.until):
            return state, None
        slopes = slopes_of(observation.probe, observation.multipliers, observation.lag)
        if slopes is None:
            return state._replace(gain=_clamped(math.log(state.gain) - self.step, self.bounds)), -math.inf
        if math.isnan(slopes.raw) and observation.progress < self.ramp:
            return state, None  # learning rates did not differ in this round, and the raw slope still counts
        length = observation.share / _HUNDREDTH
        slopes = slopes._replace(raw=slopes.raw / length, debiased=slopes.debiased / length)
        weights = self._weights(observation.progress, observation.until, observation.final)
        rounds = state.rounds + 1
        level, has_risen = self._watched(state.level, observation.losses, length)
        memory = _Memory(self.smoothing, 0.95).over(length)
        kept = _remember_all(state.slopes or ((0.0, 0.0),) * 6, slopes, _positive(level, length), rounds, memory)
        known = [_recall(one, rounds, memory) for one in kept]
        mean, error = _sum(weights, known[:3])
        t = max(_in_errors(mean, error), _in_errors(*_sum(weights, known[3:])))
        if t < 0 and slopes.further < self.overshoot * _loss_near(observation.probe):
            t = 0.0  # a plateau
        moved = ControllerState(state.gain, mean, rounds, kept, level)
        q = _significance(t, rounds, self.threshold, self.slack)
        far_too_low = slopes.further < 0 and observation.progress <= self.ramp
        rise = self.climb if far_too_low else observation.height
        change = self.step * min(1.0, length) * (self.down if q < 0 else rise) * q
        if has_risen:
            change = -self.step * self.down
        if change:
            moved = moved._replace(gain=_clamped(math.log(state.gain) + change, self.bounds))
        return moved, _weighed(slopes, weights)

    def _watched(
        self, level: tuple[float, float, int, float], losses: Sequence[float], length: float
    ) -> tuple[tuple[float, float, int, float], bool]:
        """``ControllerState.level`` with this round's losses, and whether it has risen too far. Then it counts from
        where it is now: it has had its answer."""
        known = [loss for loss in losses if abs(loss) < _TOO_LARGE]
        if not known:
            return level, False
        average, variance, rounds, lowest = level
        rounds += 1
        recent = _RECENT.over(length)
        kept = _remember((average, variance), _mean(known), rounds, recent)
        mean, error = _recall(kept, rounds, recent)
        if rounds * length <= 1:  # too few to count from
            return (*kept, rounds, mean), False
        risen = mean - lowest
        has_risen = rounds > _FEWEST and risen > error and risen > (self.rise - 1) * abs(lowest)
        return (*kept, rounds, mean if has_risen else min(mean, lowest)), has_risen

    def evidence(self, slopes: Slopes, progress: float, until: float, final: float) -> float:
        """``x`` of one round: > 0 for "a larger learning rate would do better"."""
        return _weighed(slopes, self._weights(progress, until, final))

    def _weights(self, progress: float, until: float, final: float) -> tuple[float, float, float]:
        """Of ``R``, ``A`` and ``E`` in ``x``."""
        u = min(1.0, progress / self.ramp)
        first, last = self.noise_weight
        late = min(1.0, max(0.0, progress - self.ramp) / max(until - self.ramp, 1e-9))
        return 1 - u, u, -u * (first * (last / first) ** late + 2 * final * late**2)


def _weighed(slopes: Slopes, weights: Sequence[float]) -> float:
    """The sum, to which a slope without weight adds nothing, even if it is NaN."""
    return math.fsum(weight * x for weight, x in zip(weights, slopes[:3], strict=True) if weight)


class Place(NamedTuple):
    """Where the centre of a hyperparameter is, and what its controller remembers; the same on every rank."""

    position: float = 0.0
    """Of the centre, from its start, in the hyperparameter's space."""
    velocity: float = 0.0
    """Average of the evidence."""
    rounds: int = 0
    """Rounds observed so far."""
    variance: float = 0.0
    """Of the evidence from round to round, around its average."""


@dataclass(frozen=True, kw_only=True)
class OneSlope:
    r"""Moves the centre of a hyperparameter other than the learning rate down the slope of the probe's loss.

    With ``effect`` the loss's rise from the centre to one spread above it, as a round tells it (:mod:`hdet.design`),
    and ``c`` the round's length in hundredths of the run::

        t = mean(-effect / c) / standard error          over recent rounds, memory ``smoothing^c``
        q = sign(t) clip((|t| - threshold) / slack, 0, 1)
        position += step * min(1, c) * spread * height * q

    What it sees is the effect of a round. One that comes later, it cannot see.

    Raises:
        ValueError: for a value outside the range its field names.
    """

    step: float = 0.25
    """> 0: how far the centre moves in a round, and in a hundredth of the run, at most, in spreads."""
    smoothing: float = 0.8
    """In [0, 1): weight of what was a hundredth of the run ago, in the average of the evidence."""
    threshold: float = 1.0
    """>= 0: standard errors from zero up to which nothing moves."""
    slack: float = 2.0
    """> 0: standard errors beyond ``threshold`` at which the step is whole."""

    def __post_init__(self) -> None:
        _require("step", self.step, self.step > 0, "finite and > 0")
        _require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "in [0, 1)")
        _require("threshold", self.threshold, self.threshold >= 0, "finite and >= 0")
        _require("slack", self.slack, self.slack > 0, "finite and > 0")

    def update(self, place: Place, effect: float, *, spread: float, height: float = 1.0, share: float = 0.01) -> Place:
        """One round. The place does not change in one that said nothing: ``effect`` is NaN.

        Args:
            effect: in units of the loss.
            spread: in the hyperparameter's space.
            height: the schedule's, as a share of its peak: under a small learning rate little can be learned.
            share: the round's length as a share of the run's, > 0.
        """
        if not abs(effect) < _TOO_LARGE:
            return place
        rounds = place.rounds + 1
        length = share / _HUNDREDTH
        memory = _Memory(self.smoothing, 0.9).over(length)
        kept = _remember((place.velocity, place.variance), -effect / length, rounds, memory)
        q = _significance(_in_errors(*_recall(kept, rounds, memory)), rounds, self.threshold, self.slack)
        step = self.step * min(1.0, length)
        return Place(place.position + step * spread * height * q, kept[0], rounds, kept[1])


class _Memory(NamedTuple):
    """Weights of the past, in a running average and in its variance."""

    mean: float
    variance: float
    length: float = 1.0
    """Of a round, in hundredths of the run."""

    def over(self, length: float) -> _Memory:
        """The same for rounds of another length."""
        return _Memory(self.mean**length, self.variance**length, length)


def _remember(
    kept: tuple[float, float], x: float, rounds: int, memory: _Memory, lowest: float | None = None
) -> tuple[float, float]:
    """Running average and variance with the latest of ``rounds`` values: both from 0, as in Adam.

    A value further below the average than ``lowest`` standard deviations adds no more to the variance than one there:
    it is not to hide itself."""
    mean, variance = kept
    if rounds > 1:
        away = x - mean / (1 - memory.mean ** (rounds - 1))
        if lowest is not None and rounds > 3:
            away = max(away, -lowest * math.sqrt(variance / (1 - memory.variance ** (rounds - 2))))
        variance = memory.variance * variance + (1 - memory.variance) * away**2
    return memory.mean * mean + (1 - memory.mean) * x, variance


def _remember_all(
    kept: tuple[tuple[float, float], ...], slopes: Slopes, level: float, rounds: int, memory: _Memory
) -> tuple[tuple[float, float], ...]:
    """``ControllerState.slopes`` with the latest of ``rounds``, in units of the loss and of ``level``."""
    lowest = (_LOUDEST, None, None)
    latest = [(x / unit, low) for unit in (1.0, level) for x, low in zip(slopes[:3], lowest, strict=True)]
    return tuple(
        _remember(old, x, rounds, memory, low) if math.isfinite(x) else old
        for old, (x, low) in zip(kept, latest, strict=True)
    )


def _positive(level: tuple[float, float, int, float], length: float) -> float:
    """The training loss that ``ControllerState.level`` remembers, or 1 where that is none to divide by."""
    rounds, recent = level[2], _RECENT.over(length)
    loss = _recall(level[:2], rounds, recent)[0] if rounds else 0.0
    return loss if loss > 0 else 1.0


def _recall(kept: tuple[float, float], rounds: int, memory: _Memory) -> tuple[float, float]:
    """What :func:`_remember` has kept: the average, and its standard error."""
    mean, variance = kept
    share = (1 - memory.mean) / (1 + memory.mean)  # variance of the average, in variances of one round
    share = share if rounds * memory.length > 6 else max(1 / rounds, share)
    deviation2 = variance / (1 - memory.variance ** max(1, rounds - 1))
    return mean / (1 - memory.mean**rounds), math.sqrt(deviation2 * share)


def _sum(weights: Sequence[float], known: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of averages and their standard errors, weighed."""
    parts = [(weight * mean, weight * error) for weight, (mean, error) in zip(weights, known, strict=True)]
    return math.fsum(mean for mean, _ in parts), math.sqrt(math.fsum(error**2 for _, error in parts))


def _in_errors(mean: float, error: float) -> float:
    """``t``: a mean in units of its standard error."""
    return mean / (error + _TINY)


def _significance(t: float, rounds: int, threshold: float, slack: float) -> float:
    """``q``, in [-1, 1]. 0 in the first rounds."""
    return math.copysign(min(1.0, max(0.0, (abs(t) - threshold) / slack)), t) if rounds >= _FEWEST else 0.0


_RECENT = _Memory(0.6, 0.8)
"""Of the training loss."""
_HUNDREDTH = 0.01
"""Of the run: what averages and steps are counted in."""
_FEWEST = 3
"""Rounds before which nothing moves."""
_LOUDEST = 3.0
"""Standard deviations of ``R`` below its average, beyond which a round does not widen its error any more."""
_TINY = 1e-12
_LOWEST = 0.02
"""Height of the schedule below which the far point goes no farther."""
_TOO_LARGE = 1e100
"""A loss whose square would be no number any more is none itself."""


def slopes_of(probe: ProbeLosses, multipliers: tuple[float, ...], lag: float) -> Slopes | None:
    """The slopes that :class:`TwoSlope` weighs, from the replicas whose losses are finite, ``far`` aside.

    ``None`` if fewer than two are left, or only such as trained at the base learning rate while others did not. If all
    did, the raw slope is NaN."""
    rows = [
        (rho - 1, losses)
        for rho, *losses in zip(multipliers, *probe, strict=True)
        if all(abs(loss) < _TOO_LARGE for loss in losses[:-1])
    ]
    spread = math.fsum(abs(z) for z, _ in rows)
    if len(rows) < 2 or (spread == 0 and any(rho != 1 for rho in multipliers)):
        return None
    known = ProbeLosses(*zip(*(losses for _, losses in rows), strict=True))
    pairs = zip(rows, known.above, known.below, strict=True)
    odd = math.fsum((above - below) * ((z > 0) - (z < 0)) / 2 for (z, _), above, below in pairs)
    high, low = _mean(known.slow_above), _mean(known.slow_below)
    reached = [far - near for far, near in zip(known.far, known.slow_above, strict=True)]
    return Slopes(
        -odd / spread if spread else math.nan,
        -(high - low) / (2 * lag),
        level_of(known) - (high + low) / 2,
        _mean(reached) if all(abs(further) < _TOO_LARGE for further in reached) else math.nan,
    )


def _loss_near(probe: ProbeLosses) -> float:
    """``L``, the loss beside the far point. Where there are slopes, some replicas know it."""
    return _mean([loss for loss in probe.slow_above if abs(loss) < _TOO_LARGE])


def level_of(probe: ProbeLosses) -> float:
    """The mean loss at ``m`` and at its mirror image in the slow average."""
    return (_mean(probe.above) + _mean(probe.below)) / 4 + _mean(probe.mirror) / 2


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def hypergradient(losses: tuple[float, ...], values: tuple[float, ...], temperature: float) -> float | None:
    r"""``sum(w * h_r) - mean(h_r)`` with ``w = softmax((mean(L) - L_r) / (temperature * std(L)))``.

    Replicas whose loss is not finite are left out of both sums. With equal losses all weights are equal and the result
    is 0. It is invariant to shifting and scaling the losses, and lies within ``[min(h) - mean(h), max(h) - mean(h)]``.

    Args:
        losses: the replicas' losses ``L_r``.
        values: the replicas' values ``h_r`` of the hyperparameter.
        temperature: ``sigma`` in standard deviations of the losses.

    Returns:
        The hypergradient in the units of ``values``, or ``None`` if fewer than two losses are finite.
    """
    pairs = [(loss, value) for loss, value in zip(losses, values, strict=True) if math.isfinite(loss)]
    if len(pairs) < 2:
        return None
    # In units of the largest magnitude, the differences of any two floats are finite.
    scale = max(abs(loss) for loss, _ in pairs) or 1.0
    scaled = [loss / scale for loss, _ in pairs]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1))
    if std <= 1e-12:  # equal but for rounding: no evidence either way
        return 0.0
    return _weighted_shift([(mean - x) / (temperature * std) for x in scaled], [value for _, value in pairs])


def _update(config: Published, state: ControllerState, seen: Observation) -> tuple[ControllerState, float | None]:
    delta = hypergradient(seen.losses, seen.multipliers, config.temperature)
    if delta is None:
        return state, None
    velocity = config.momentum * state.velocity + (1 - config.momentum) * delta
    rounds = state.rounds + 1
    if rounds <= config.warmup_rounds:
        return ControllerState(state.gain, velocity, rounds), delta
    log_gain = math.log(state.gain) * (1 - config.decay) + config.meta_lr * velocity
    low, high = (math.log(bound) for bound in config.bounds)
    if not low <= log_gain <= high:  # at a bound the velocity must not wind up against it
        velocity = 0.0
    return ControllerState(_clamped(log_gain, config.bounds), velocity, rounds), delta


def _literal_update(
    config: Published, state: ControllerState, seen: Observation
) -> tuple[ControllerState, float | None]:
    base = seen.schedule * state.gain
    if base == 0 or not all(map(math.isfinite, seen.losses)):
        return state, None  # the one departure: the published softmax of a NaN would end the run
    rates = [base * rho for rho in seen.multipliers]
    mean = math.fsum(seen.losses) / len(seen.losses)
    delta = _weighted_shift([(mean - loss) / config.temperature for loss in seen.losses], rates)
    velocity = config.momentum * state.velocity + (1 - config.momentum) * delta
    gain = (base * (1 - config.decay) + config.meta_lr * velocity) / seen.schedule
    return ControllerState(gain, velocity, state.rounds + 1), delta


def _weighted_shift(scores: list[float], values: list[float]) -> float:
    """``sum(softmax(scores) * values) - mean(values)``."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    centre = math.fsum(values) / len(values)
    return math.fsum(w / total * (value - centre) for w, value in zip(weights, values, strict=True))


def _clamped(log_gain: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    # Clamped twice: exp(log(bound)) may round to just outside the bound.
    return min(max(math.exp(min(max(log_gain, math.log(low)), math.log(high))), low), high)


def _check_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not (0 < low <= 1 <= high < math.inf):
        raise ValueError(f"Invalid {bounds=}. Must satisfy 0 < low <= 1 <= high < inf.")


def _require(name: str, value: float, ok: bool, rule: str) -> None:
    if not (math.isfinite(value) and ok):
        raise ValueError(f"Invalid {name}={value}. Must be {rule}.")


Controller = Published | TwoSlope
