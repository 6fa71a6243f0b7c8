"""What is still to come of a schedule: found by running a copy of it ahead."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

_POINTS = 1000


class Forecast(NamedTuple):
    """A schedule's course over a run, for the first parameter group."""

    peak: float
    """Highest learning rate."""
    heights: tuple[float, ...]
    """Learning rates in units of the peak, at even distances from the run's first step to its last."""

    @property
    def final(self) -> float:
        """Height at the end."""
        return self.heights[-1]

    @property
    def area(self) -> float:
        """Mean height over the run."""
        return sum(self.heights) / len(self.heights)

    def high_until(self, height: float) -> float:
        """Share of the run after which the schedule stays below ``height``; 1 if it never does."""
        last = max((i for i, h in enumerate(self.heights) if h >= height), default=0)
        return 1.0 if last == len(self.heights) - 1 else (last + 1) / len(self.heights)


def forecast(schedule: LRScheduler | ReduceLROnPlateau | None, optimizer: Optimizer, steps: int) -> Forecast:
    """The course of a new ``schedule`` over a run of ``steps`` steps. Neither it nor ``optimizer`` is touched.

    ``None`` and ``ReduceLROnPlateau``, of which nothing can be known, count as constant.
    """
    now = float(optimizer.param_groups[0]["lr"])
    if schedule is None or isinstance(schedule, ReduceLROnPlateau):
        return Forecast(now, (1.0,))
    stand_in = SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
    stand_in.param_groups = [
        {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    ahead = copy.deepcopy(schedule, {id(optimizer): stand_in})
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer stepped before it
        if isinstance(schedule, OneCycleLR):  # in closed form: no need to visit every step
            for i in range(_POINTS):
                ahead.last_epoch = (steps - 1) * i // (_POINTS - 1)
                rates.append(float(ahead.get_lr()[0]))
        else:
            wanted = {(steps - 1) * i // (_POINTS - 1) for i in range(_POINTS)}
            for step in range(steps):
                if step in wanted:
                    rates.append(float(stand_in.param_groups[0]["lr"]))
                if step + 1 < steps:
                    ahead.step()
    peak = max(rates)
    return Forecast(peak, tuple(rate / peak if peak else 1.0 for rate in rates))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
