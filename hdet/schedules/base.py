"""The base schedule of an ensemble: stepped, forecast and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from hdet.errors import check_item, check_list, check_number, check_whole, shown
from hdet.schedules.forecast import Forecast, forecast
from hdet.schedules.found import FoundSchedule, Recorder
from hdet.transaction import AllOrNothing

ScheduleLike = LRScheduler | ReduceLROnPlateau | Callable[[int], float] | None
"""What an ensemble takes as its base schedule."""


_CLOSED_FORM = (LambdaLR, OneCycleLR, CyclicLR, CosineAnnealingWarmRestarts)


class BaseSchedule:
    """A torch scheduler, or none, and the record of what came of it.

    Args:
        optimizer: on which it is built.
        schedule: a torch scheduler on ``optimizer``, a function ``step -> factor``, or ``None`` for constant rates.
        every: calls of :meth:`step` to one step of it.
        groups: names of the parameter groups.

    Raises:
        TypeError, ValueError: for what is no schedule, a scheduler on another optimizer, or a bad ``every``; the
            optimizer is then as it was.
    """

    def __init__(self, optimizer: Optimizer, schedule: ScheduleLike, every: int, groups: Sequence[str]) -> None:
        every = check_whole("schedule_every", every, ">= 1 step", lambda steps: steps >= 1)
        if isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
            # An optimizer and its wrapper, such as accelerate's, have their groups in common.
            if schedule.optimizer.param_groups is not optimizer.param_groups:
                raise ValueError("The schedule was built on another optimizer than the one passed to hdet.")
        elif schedule is not None:
            schedule = _from_function(optimizer, schedule)
        self.scheduler = schedule
        """torch's scheduler; ``None`` for constant rates."""
        self._optimizer, self._every = optimizer, every
        self._recorder = Recorder(groups)

    def forecast(self, steps: int) -> Forecast:
        """Its course over a run of ``steps`` calls of :meth:`step`."""
        optimizer = self._optimizer if self.scheduler is None else self.scheduler.optimizer
        return forecast(self.scheduler, optimizer, -(-steps // self._every))

    @property
    def overwrites(self) -> str:
        """Its name, if it computes learning rates from the step alone; empty if it goes on from the last ones."""
        return type(self.scheduler).__name__ if isinstance(self.scheduler, _CLOSED_FORM) else ""

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
        """Raise TypeError or ValueError if :meth:`load` cannot."""
        groups, before = len(self._optimizer.param_groups), -1
        rule = "[[step, [learning rate of each parameter group]], ...], with steps that increase"
        for knot in check_list("found_schedule", check_item("The saved state", state, "found_schedule"), rule):
            step, lrs = check_list("found_schedule", knot, rule, length=2)
            before = check_whole("found_schedule step", step, rule, lambda step, before=before: step > before)  # type: ignore[misc]
            for lr in check_list("found_schedule", lrs, rule, length=groups):
                check_number("found_schedule learning rate", lr, "finite and >= 0", lambda lr: lr >= 0)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self._recorder.knots = [(int(step), tuple(map(float, lrs))) for step, lrs in state["found_schedule"]]


def _from_function(optimizer: Optimizer, function: Any) -> LambdaLR:
    rule = (
        "a torch scheduler built on the optimizer, a function step -> factor such as "
        "hdet.schedules.cosine(total_steps=...), or None"
    )
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"Invalid schedule={shown(function)}. Must be {rule}.")
    with AllOrNothing(optimizer):
        built = LambdaLR(optimizer, function)
        for lr in built.get_last_lr():
            value = lr.item() if isinstance(lr, Tensor) else lr
            check_number("schedule(0) times the learning rate", value, "finite and >= 0", lambda lr: lr >= 0)
        return built
