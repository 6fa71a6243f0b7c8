"""What a controller of learning rates gets from a round, and its state. No torch here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hdet.errors import check_gain, check_instance, check_list, check_number, check_whole
from hdet.observe.slopes import ProbeLosses, check_probe, check_replicas


class ControllerState(NamedTuple):
    """The state of one learning rate's controller, from round to round; the same on every rank."""

    gain: float = 1.0
    """Dimensionless factor on the base schedule."""
    velocity: float = 0.0
    """Momentum average of the hypergradient, ``v``."""
    rounds: int = 0
    """Rounds observed so far."""
    slopes: tuple[tuple[float, float], ...] = ()
    """Running averages (mean, variance) of ``R``, ``A``, ``E``, and of these relative to the training loss;
    :class:`hdet.steer.TwoSlope` only."""
    level: tuple[float, float, int, float] = (0.0, 0.0, 0, math.inf)
    """Of the training loss: running average (mean, variance), number of rounds in it, and its lowest mean since the
    gain last fell because of it; :class:`hdet.steer.TwoSlope` only."""


class Observation(NamedTuple):
    """One round, for one learning rate. Both tuples are [replica]."""

    losses: tuple[float, ...]
    """Mean training loss of each replica over the round; NaN where a replica reported none."""
    multipliers: tuple[float, ...]
    """``rho_pi(r)``: each replica's multiplier in the round."""
    schedule: float
    """The base schedule's learning rate (before the gain) at the round's last step; only ``literal=True`` reads it."""
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
    """Mean height of the schedule over the run, in (0, 1]."""


def clamped(log_gain: float, bounds: tuple[float, float]) -> float:
    """The gain of ``log_gain``, or the nearer of its ``bounds``."""
    low, high = bounds
    # Clamped twice: exp(log(bound)) may round to just outside the bound.
    return min(max(math.exp(min(max(log_gain, math.log(low)), math.log(high))), low), high)


def saved_state(name: str, values: Any) -> ControllerState:
    """A :class:`ControllerState` from the values that were saved of one.

    Raises:
        TypeError, ValueError: if they are not such as a run can have.
    """
    fields = "[gain, velocity, rounds, slopes, level]"
    gain, velocity, rounds, slopes, level = check_list(name, values, fields, length=5)
    if len(check_list(f"{name}.slopes", slopes, "a list")) not in (0, 6):
        raise ValueError(f"Invalid {name}.slopes={slopes}. Must have 6 averages, or none.")
    average, variance, count, lowest = check_list(f"{name}.level", level, "[mean, variance, rounds, lowest]", length=4)
    return ControllerState(
        check_gain(f"{name}.gain", gain),
        check_number(f"{name}.velocity", velocity, _RULE, _is_kept),
        check_whole(f"{name}.rounds", rounds, ">= 0", lambda n: n >= 0),
        tuple(_average(f"{name}.slopes", *check_list(f"{name}.slopes", one, "pairs", length=2)) for one in slopes),
        (
            *_average(f"{name}.level", average, variance),
            check_whole(f"{name}.level.rounds", count, ">= 0", lambda n: n >= 0),
            check_number(f"{name}.level.lowest", lowest, "above -inf", lambda x: x > -math.inf, finite=False),
        ),
    )


def check_share(name: str, value: Any) -> float:
    """``value`` as a round's length in shares of the run."""
    return check_number(name, value, "> 0, and at least 1e-12 of the run", lambda share: share >= 1e-12)


_RULE = "finite, and at most 1e150"


def _is_kept(x: float) -> bool:
    """Whether it can be squared."""
    return abs(x) <= 1e150


def _average(name: str, mean: object, variance: object) -> tuple[float, float]:
    return (
        check_number(f"{name}.mean", mean, _RULE, _is_kept),
        check_number(f"{name}.variance", variance, ">= 0", lambda x: x >= 0),
    )


def check_update(state: Any, seen: Any) -> None:
    """Raise TypeError or ValueError for what a controller of learning rates cannot go on from."""
    check_instance("state", state, ControllerState, "an hdet.controller.ControllerState")
    check_instance("observation", seen, Observation, "an hdet.controller.Observation")
    check_number("state.gain", state.gain)
    check_number("state.velocity", state.velocity, _RULE, _is_kept)
    check_whole("state.rounds", state.rounds, ">= 0", lambda n: n >= 0)
    if state.slopes:
        for one in check_list("state.slopes", state.slopes, "six averages (mean, variance)", length=6):
            _average("state.slopes", *check_list("state.slopes", one, "pairs (mean, variance)", length=2))
    level = check_list("state.level", state.level, "(mean, variance, rounds, lowest)", length=4)
    _average("state.level", *level[:2])
    check_whole("state.level", level[2], ">= 0", lambda n: n >= 0)
    check_number("state.level", level[3], "above -inf", lambda x: x > -math.inf, finite=False)
    check_replicas("observation.multipliers", seen.multipliers, finite=True)
    check_replicas("observation.losses", seen.losses)
    check_number("observation.schedule", seen.schedule)
    check_number("observation.progress", seen.progress, "a share of the run, or NaN", finite=False)
    check_share("observation.share", seen.share)
    for name in ("height", "until", "final"):
        check_number(f"observation.{name}", getattr(seen, name), "in [0, 1]", lambda x: 0 <= x <= 1)
    if seen.probe is not None:
        check_probe("observation.probe", seen.probe, seen.multipliers, seen.lag)
