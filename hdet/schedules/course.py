"""Where a run is: of its rounds, of its length, and of its schedule."""

from __future__ import annotations

import math

from hdet.schedules.forecast import Forecast


class Course:
    """Rounds and shares of a run.

    Args:
        converge_every: ``T``, the round's length in steps.
        total_steps: the run's length in steps; ``None`` if it is not known.
    """

    def __init__(self, converge_every: int, total_steps: int | None) -> None:
        self.converge_every, self.total_steps = converge_every, total_steps
        self.forecast: Forecast | None = None
        """What is to come of the schedule; ``None`` if it is not known."""

    def round(self, steps: int) -> int:
        """Index of the round in progress after ``steps`` steps."""
        return steps // self.converge_every

    def ended_round(self, steps: int) -> int:
        """Index of the round in which the last of ``steps`` steps was taken."""
        return (steps - 1) // self.converge_every

    def progress(self, steps: int) -> float:
        """Share of the run that is over, in [0, 1]; NaN where its length is not known."""
        return steps / self.total_steps if self.total_steps else math.nan

    def passes(self, share: float, steps: int) -> bool:
        """Whether the round that ends after ``steps`` steps passes a multiple of this share of the run, or of a round
        if that is longer. One of a run of unknown length always does."""
        if not self.total_steps:
            return True
        every, slack = max(share, self.share) * self.total_steps, 1e-9
        return math.floor(steps / every + slack) > math.floor((steps - self.converge_every) / every + slack)

    @property
    def share(self) -> float:
        """A round's length as a share of the run's. A run of unknown length counts as one of a hundred rounds."""
        return self.converge_every / self.total_steps if self.total_steps else 0.01

    def height(self, lr: float) -> float:
        """The schedule's learning rate ``lr`` as a share of its peak, in [0, 1]; 1 where that is not known."""
        peak = self.forecast.peak if self.forecast else 0.0
        return min(1.0, max(0.0, lr / peak)) if peak else 1.0

    @property
    def peak(self) -> float:
        """The schedule's highest learning rate; NaN where it is not known."""
        return self.forecast.peak if self.forecast else math.nan

    @property
    def final(self) -> float:
        """The schedule's last value as a share of its peak; 0 where it is not known."""
        return self.forecast.final if self.forecast else 0.0

    @property
    def area(self) -> float:
        """Mean height of the schedule over the run; 1 where it is not known."""
        return self.forecast.area if self.forecast else 1.0

    def high_until(self, height: float) -> float:
        """Share of the run after which the schedule stays below ``height``; 1 where that is not known."""
        return self.forecast.high_until(height) if self.forecast else 1.0
