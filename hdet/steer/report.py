"""What the controllers did at one converge, as plain values: their part of :class:`hdet.Report`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hdet.observe.slopes import Slopes


@dataclass(frozen=True, kw_only=True)
class HyperparameterReport:
    """One hyperparameter beside the learning rate, in one converge."""

    name: str
    """As passed, or the default."""
    centre: float
    """Its centre in the round."""
    values: tuple[float, ...]
    """[r] each replica's value."""
    effect: float
    """By how much the probe's loss rises from the centre to one spread above it; NaN where it is not known."""
    error: float
    """Standard error of ``effect``; NaN with no more replicas than factors."""
    next_centre: float
    """The centre from here on."""


class ControllerReport(NamedTuple):
    """All controllers in one converge. Tuples are by learning rate: one for all parameter groups, or one for each."""

    multipliers: tuple[tuple[float, ...], ...]
    """[learning rate][replica] ``rho`` in the round."""
    gain: tuple[float, ...]
    """In force in the round."""
    next_gain: tuple[float, ...]
    """From here on."""
    velocity: tuple[float, ...]
    """The controller's momentum after the round."""
    hypergradient: tuple[float, ...]
    """> 0 where a larger learning rate did better; NaN where it is not known."""
    slopes: Slopes
    """The paired probe's, of all learning rates together; NaN where they are not known."""
    movement: tuple[float, ...]
    """How far the round took the weights, relative to their size; NaN where it was not measured."""
    hyperparameters: tuple[HyperparameterReport, ...]
    """The other hyperparameters."""
