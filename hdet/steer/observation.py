"""What a controller of learning rates gets from a round, and its state. No torch here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hdet.errors import check_flag, check_gain, check_instance, check_list, check_number, check_whole
from hdet.observe.slopes import ProbeLosses, check_probe, check_replicas


class ControllerState(NamedTuple):
    """The state of one learning rate under :class:`hdet.steer.Published`, round to round; the same on every rank."""

    gain: float = 1.0
    """Dimensionless factor on the base schedule."""
    velocity: float = 0.0
    """Momentum average of the hypergradient, ``v``."""
    rounds: int = 0
    """Rounds observed so far."""


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
    """Share of the run after which the schedule stays below ``Posterior.rest_below``."""
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
    steps: float = math.inf
    """Of the optimizer in the round, >= 1; infinite if not known."""
    given: bool = True
    """Whether the user gave the learning rate, rather than leave it to be found."""


def clamped(log_gain: float, bounds: tuple[float, float]) -> float:
    """The gain of ``log_gain``, or the nearer of its ``bounds``."""
    low, high = bounds
    # Clamped twice: exp(log(bound)) may round to just outside the bound.
    return min(max(math.exp(min(max(log_gain, math.log(low)), math.log(high))), low), high)


def saved_state(name: str, values: Any) -> ControllerState:
    """A :class:`ControllerState` from the values that were saved of one. Older ones have more values, which are left
    aside.

    Raises:
        TypeError, ValueError: if they are not such as a run can have.
    """
    fields = "[gain, velocity, rounds]"
    known = check_list(name, values, fields)
    gain, velocity, rounds = check_list(name, known[:3], fields, length=3)
    return ControllerState(
        check_gain(f"{name}.gain", gain),
        check_number(f"{name}.velocity", velocity, _RULE, _is_kept),
        check_whole(f"{name}.rounds", rounds, ">= 0", lambda n: n >= 0),
    )


def check_share(name: str, value: Any) -> float:
    """``value`` as a round's length in shares of the run."""
    return check_number(name, value, "> 0, and at least 1e-12 of the run", lambda share: share >= 1e-12)


_RULE = "finite, and at most 1e150"


def _is_kept(x: float) -> bool:
    """Whether it can be squared."""
    return abs(x) <= 1e150


def check_update(state: Any, seen: Any) -> None:
    """Raise TypeError or ValueError for what :class:`hdet.steer.Published` cannot go on from."""
    check_instance("state", state, ControllerState, "an hdet.controller.ControllerState")
    check_number("state.gain", state.gain)
    check_number("state.velocity", state.velocity, _RULE, _is_kept)
    check_whole("state.rounds", state.rounds, ">= 0", lambda n: n >= 0)
    check_observation(seen)


def check_observation(seen: Any) -> None:
    """Raise TypeError or ValueError for what no round can have been."""
    check_instance("observation", seen, Observation, "an hdet.controller.Observation")
    check_replicas("observation.multipliers", seen.multipliers, finite=True)
    check_replicas("observation.losses", seen.losses)
    check_number("observation.schedule", seen.schedule)
    check_number("observation.progress", seen.progress, "a share of the run, or NaN", finite=False)
    check_share("observation.share", seen.share)
    for name in ("height", "until", "final"):
        check_number(f"observation.{name}", getattr(seen, name), "in [0, 1]", lambda x: 0 <= x <= 1)
    check_number("observation.movement", seen.movement, "a relative distance, or NaN", finite=False)
    check_number("observation.area", seen.area, "in (0, 1]", lambda x: 0 < x <= 1)
    check_number("observation.steps", seen.steps, ">= 1, or inf", lambda n: n >= 1, finite=False)
    check_flag("observation.given", seen.given)
    if seen.probe is not None:
        check_probe("observation.probe", seen.probe, seen.multipliers, seen.lag)
