r"""The published controller (arXiv 2604.24708), on the replicas' training losses. A pure function of plain floats.

With ``h_r`` the replicas' values and ``L_r`` their losses::

    w     = softmax((mean(L) - L_r) / sigma)
    Delta = sum(w * h_r) - mean(h_r)            the hypergradient: > 0 where replicas with larger values did better
    v     = beta * v + (1 - beta) * Delta       the velocity
    h     = h * (1 - gamma) + lambda * v

:class:`Published` computes this with its faults corrected, or with ``literal=True`` as it stands;
``docs/controller.md`` lists every deviation and its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hdet.errors import (
    check_bounds,
    check_field,
    check_flag,
    check_gain,
    check_instance,
    check_list,
    check_number,
    check_whole,
)
from hdet.observe.slopes import TOO_LARGE
from hdet.schedules.course import Course
from hdet.steer.observation import ControllerState, Observation, check_update, clamped, saved_state


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's momentum controller on the replicas' training losses.

    Raises:
        TypeError, ValueError: for a value outside the range its field names.
    """

    needs_movement: ClassVar[bool] = False
    needs_length: ClassVar[bool] = False
    probe_every: ClassVar[float] = 0.0
    probe_from: ClassVar[float] = 0.0

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
        check_field(self, "meta_lr", check_number, "finite and >= 0", lambda x: x >= 0)
        check_field(self, "momentum", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
        check_field(self, "temperature", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "literal", check_flag)
        if self.literal:
            check_field(self, "decay", check_number, "< 1", lambda x: x < 1)
        else:
            check_field(self, "decay", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
        check_field(self, "bounds", check_bounds)
        check_field(self, "warmup_rounds", check_whole, ">= 0", lambda n: n >= 0)

    def wants_probe(self, progress: float, until: float) -> bool:
        """No: it uses training losses only."""
        check_number("progress", progress, "a share of the run, or NaN", finite=False)
        check_number("until", until, "a share of the run")
        return False

    def begin(self, gain: float) -> ControllerState:
        """The state at the start of a run at this gain."""
        check_gain("gain", gain)
        return ControllerState(gain)

    def cut(self, state: ControllerState, factor: float) -> ControllerState:
        """After a rollback: the gain divided by ``factor``, all else forgotten."""
        check_instance("state", state, ControllerState, "an hdet.controller.ControllerState")
        check_number("state.gain", state.gain)
        check_number("factor", factor, ">= 1", lambda x: x >= 1)
        return ControllerState(state.gain / factor)

    def restored(self, controller: Sequence[Any]) -> ControllerState:
        """A saved state."""
        return saved_state("controller", controller)

    def rests_after(self, course: Course) -> float:
        """It never rests."""
        check_instance("course", course, Course, "an hdet.schedules.course.Course")
        return 1.0

    def update(self, state: ControllerState, observation: Observation) -> tuple[ControllerState, float | None]:
        """One round: ``(state, observation) -> (next state, hypergradient)``.

        The hypergradient is ``None``, and the state unchanged, when fewer than two replicas have a finite loss.
        In units: ``Delta`` and ``v`` are relative (fractions of the base learning rate); with ``literal`` they are
        learning rates, as published.
        """
        check_update(state, observation)
        if not self.literal:
            check_number("state.gain", state.gain, "> 0", lambda gain: gain > 0)
        replicas = len(observation.multipliers)
        check_list(
            "observation.losses", observation.losses, f"a number for each of {replicas} replicas", length=replicas
        )
        return (_literal_update if self.literal else _update)(self, state, observation)


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
    check_number("temperature", temperature, "> 0", lambda x: x > 0)
    rule = "numbers, one for each replica"
    known = check_list("values", values, rule)
    values = tuple(check_number("values", x, rule, lambda x: abs(x) <= TOO_LARGE) for x in known)
    losses = tuple(
        check_number("losses", x, rule, finite=False) for x in check_list("losses", losses, rule, length=len(values))
    )
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
    return ControllerState(clamped(log_gain, config.bounds), velocity, rounds), delta


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
