"""What a controller of learning rates gets from a round, and its state. No torch here."""

from __future__ import annotations

import math
from typing import NamedTuple

from hdet.observe.slopes import ProbeLosses


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
