"""The controller of hyperparameters other than the learning rate. A pure function of plain floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hdet.observe.slopes import TOO_LARGE
from hdet.steer.checks import require
from hdet.steer.running import HUNDREDTH, Memory, in_errors, recall, remember, significance


class CentreState(NamedTuple):
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

    With ``effect`` the loss's rise from the centre to one spread above it, as a round tells it
    (:mod:`hdet.explore.design`), and ``c`` the round's length in hundredths of the run::

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
        require("step", self.step, self.step > 0, "finite and > 0")
        require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "in [0, 1)")
        require("threshold", self.threshold, self.threshold >= 0, "finite and >= 0")
        require("slack", self.slack, self.slack > 0, "finite and > 0")

    def update(
        self, place: CentreState, effect: float, *, spread: float, height: float = 1.0, share: float = 0.01
    ) -> CentreState:
        """One round. The place does not change in one that said nothing: ``effect`` is NaN.

        Args:
            effect: in units of the loss.
            spread: in the hyperparameter's space.
            height: the schedule's, as a share of its peak: under a small learning rate little can be learned.
            share: the round's length as a share of the run's, > 0.
        """
        if not abs(effect) < TOO_LARGE:
            return place
        rounds = place.rounds + 1
        length = share / HUNDREDTH
        memory = Memory(self.smoothing, 0.9).over(length)
        kept = remember((place.velocity, place.variance), -effect / length, rounds, memory)
        q = significance(in_errors(*recall(kept, rounds, memory)), rounds, self.threshold, self.slack)
        step = self.step * min(1.0, length)
        return CentreState(place.position + step * spread * height * q, kept[0], rounds, kept[1])
