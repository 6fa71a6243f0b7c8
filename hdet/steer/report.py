"""What the controllers did at one converge, as plain values: their part of :class:`hdet.Report`. No torch here."""

from __future__ import annotations

import math
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


class Judgement(NamedTuple):
    """What :class:`hdet.controller.Posterior` makes of one learning rate after a round; NaN where it is not known."""

    target: float = math.nan
    """``m*``: the movement of this round at the right learning rate, in the units of ``Report.movement``."""
    centre: float = math.nan
    """The gain at which the weights would move by the target, ``exp(c)``."""
    evidence: float = math.nan
    """The gain at which the probe would see what it sees at the right learning rate, ``exp(e)``."""
    estimate: float = math.nan
    """The estimate of the right gain, ``exp(z)``, of both."""
    trust: float = math.nan
    """``P``, in [0, 1]: probability that the user's learning rate is right."""
    rests: bool = False
    """Whether the gain no longer moves, since the schedule has begun to fall for good."""


UNKNOWN_JUDGEMENT = Judgement()


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
    judgements: tuple[Judgement, ...] = (UNKNOWN_JUDGEMENT,)
    """What the controller makes of the round."""
    peak_lr: float = math.nan
    """The schedule's highest learning rate, of the first parameter group; NaN where it is not known."""
    cause: str = ""
    """Why the round was undone, if it was."""
