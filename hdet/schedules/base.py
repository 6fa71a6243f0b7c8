"""The base schedule of an ensemble: stepped, forecast and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from hdet.schedules.forecast import Forecast, forecast
from hdet.schedules.found import FoundSchedule, Recorder

ScheduleLike = LRScheduler | ReduceLROnPlateau | Callable[[int], float] | None
"""What an ensemble takes as its base schedule."""


class BaseSchedule:
    """A torch scheduler, or none, and the record of what came of it.

    Args:
        optimizer: on which it is built.
        schedule: a torch scheduler on ``optimizer``, a function ``step -> factor``, or ``None`` for constant rates.
        every: calls of :meth:`step` to one step of it.
        groups: names of the parameter groups.

    Raises:
        ValueError: for a scheduler on another optimizer, or a bad ``every``.
    """

    def __init__(self, optimizer: Optimizer, schedule: ScheduleLike, every: int, groups: Sequence[str]) -> None:
        if every < 1:
            raise ValueError(f"Invalid schedule_every={every}. Must be >= 1 step.")
        if isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
            if schedule.optimizer is not optimizer:
                raise ValueError("The schedule was built on another optimizer than the one passed to hdet.")
        elif schedule is not None:
            schedule = LambdaLR(optimizer, schedule)
        self.scheduler = schedule
        """torch's scheduler; ``None`` for constant rates."""
        self._optimizer, self._every = optimizer, every
        self._recorder = Recorder(groups)

    def forecast(self, steps: int) -> Forecast:
        """Its course over a run of ``steps`` calls of :meth:`step`."""
        return forecast(self.scheduler, self._optimizer, -(-steps // self._every))

    def step(self, steps: int, mean_loss: float) -> None:
        """Step it, if it is due.

        Args:
            steps: calls so far.
            mean_loss: of the replicas, where a round has just ended; else NaN. ``ReduceLROnPlateau`` goes by it.
        """
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if math.isfinite(mean_loss):
                self.scheduler.step(mean_loss)
        elif self.scheduler is not None and steps % self._every == 0:
            self.scheduler.step()

    def record(self, step: int, lrs: Sequence[float], gains: Sequence[float]) -> None:
        """Remember the base learning rates, schedule x gain, of the update after ``step`` others."""
        self._recorder.add(step, [lr * gain for lr, gain in zip(lrs, gains, strict=True)])

    def found(self) -> FoundSchedule:
        """What was recorded."""
        return self._recorder.schedule()

    def state(self) -> dict[str, Any]:
        """What must be saved, but for the scheduler's own state."""
        return {"found_schedule": [[step, list(lrs)] for step, lrs in self._recorder.knots]}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Any record can be gone on with."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self._recorder.knots = [(step, tuple(lrs)) for step, lrs in state["found_schedule"]]
