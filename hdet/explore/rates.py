"""Learning rates as they stand in an optimizer: floats, or tensors that groups may share."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdet.ops import _unchecked as ops


def copied(lr: Any) -> Any:
    """A copy of a learning rate; of a tensor, with memory of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def like(lr: Any, value: Any) -> Any:
    """A learning rate of this value: a tensor like ``lr``, with memory of its own, where that is one."""
    return torch.full_like(lr, value) if isinstance(lr, Tensor) and not isinstance(value, Tensor) else copied(value)


def put(group: dict[str, Any], lr: Any) -> None:
    """Write a parameter group's learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def version_of(lr: Any) -> int:
    """A number that grows when a tensor is written in place; 0 for a float."""
    return lr._version if isinstance(lr, Tensor) else 0


def share_memory(one: Any, other: Any) -> bool:
    """Whether two learning rates are tensors of the same memory: writing one writes the other."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.device == other.device and one.data_ptr() == other.data_ptr() != 0)


class Write(NamedTuple):
    """What is to be written into learning rates that are tensors, each with memory of its own."""

    lrs: list[Tensor]
    schedule: list[float]
    gain: list[float]
    multiplier: list[float]

    def now(self) -> None:
        """Write it, in one launch where an op can."""
        if self.is_for_ops:
            ops.scale_rates(*self)
            return
        for lr, schedule, gain, multiplier in zip(*self, strict=True):
            lr.fill_(schedule * gain * multiplier)

    @property
    def is_for_ops(self) -> bool:
        """Whether the ops can write it."""
        devices = {lr.device for lr in self.lrs}
        return len(devices) == 1 and not self.lrs[0].is_meta and all(lr.dtype in _DTYPES for lr in self.lrs)

    def is_same(self, other: Write | None) -> bool:
        """Whether it is the same as another one."""
        return other is not None and self[1:] == other[1:] and all(map(operator.is_, self.lrs, other.lrs))

    def factors(self) -> Tensor:
        """fp64 [schedule, gain, multiplier][learning rate] on their device."""
        return torch.tensor(self[1:], dtype=torch.float64).to(self.lrs[0].device, non_blocking=True)


_DTYPES = (torch.float32, torch.float64)
