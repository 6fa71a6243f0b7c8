"""The learning rates that a torch scheduler will set over a run, found by stepping a copy of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

_POINTS = 1000
"""Steps of the run at which a forecast keeps the learning rate."""


class Forecast(NamedTuple):
    """A schedule over a whole run, for the first parameter group."""

    peak: float
    """Highest learning rate."""
    heights: tuple[float, ...]
    """Learning rates in units of the peak, at evenly spaced steps from the first to the last."""

    @property
    def final(self) -> float:
        """Height at the end."""
        return self.heights[-1]

    @property
    def area(self) -> float:
        """Mean height over the run, in (0, 1]."""
        return sum(self.heights) / len(self.heights)

    def high_until(self, height: float) -> float:
        """Share of the run after which the schedule stays below ``height``; 1 if it never does."""
        last = max((i for i, h in enumerate(self.heights) if h >= height), default=0)
        return 1.0 if last == len(self.heights) - 1 else (last + 1) / len(self.heights)


def forecast(schedule: LRScheduler | ReduceLROnPlateau | None, optimizer: Optimizer, steps: int) -> Forecast:
    """What a new ``schedule`` sets over a run of ``steps`` steps. Changes neither it nor ``optimizer``.

    ``None`` counts as constant, and so does ``ReduceLROnPlateau``, whose rates depend on losses.
    """
    now = float(optimizer.param_groups[0]["lr"])
    if schedule is None or isinstance(schedule, ReduceLROnPlateau):
        return Forecast(now, (1.0,))
    dummy = SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
    dummy.param_groups = [
        {key: _clone(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    copied = copy.deepcopy(schedule, {id(optimizer): dummy})
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no optimizer has stepped before it
        if isinstance(schedule, OneCycleLR):  # computes any step in closed form
            for i in range(_POINTS):
                copied.last_epoch = (steps - 1) * i // (_POINTS - 1)
                rates.append(float(copied.get_lr()[0]))
        else:
            kept = {(steps - 1) * i // (_POINTS - 1) for i in range(_POINTS)}
            for step in range(steps):
                if step in kept:
                    rates.append(float(dummy.param_groups[0]["lr"]))
                if step + 1 < steps:
                    copied.step()
    peak = max(rates)
    return Forecast(peak, tuple(rate / peak if peak else 1.0 for rate in rates))


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
