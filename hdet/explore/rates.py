"""Learning rates as they stand in an optimizer: floats, or tensors that groups may share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdet.ops import _unchecked as ops

_PACKABLE = (torch.float32, torch.float64)


def copied(lr: Any) -> Any:
    """A copy of a learning rate; of a tensor, with memory of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def like(lr: Any, value: Any) -> Any:
    """A copy of a learning rate of this value: a tensor like ``lr``, where that is one."""
    if isinstance(lr, Tensor) and not isinstance(value, Tensor):
        return torch.full_like(lr, value)
    return copied(value)


def put(group: dict[str, Any], lr: Any) -> None:
    """Write a parameter group's learning rate, in place where it is a tensor."""
    own = group["lr"]
    if not isinstance(own, Tensor):
        group["lr"] = lr
    elif isinstance(lr, Tensor):
        own.copy_(lr.view_as(own))
    else:
        own.fill_(lr)


def scale(lrs: Sequence[Tensor], base: Sequence[float], gains: Sequence[float], multipliers: Sequence[float]) -> None:
    """Write ``base * gain * multiplier`` into each, in place; each has memory of its own. In one launch, where they are
    on one device and of a dtype that the ops take."""
    is_for_ops = len({lr.device for lr in lrs}) == 1 and all(lr.dtype in _PACKABLE for lr in lrs)
    if is_for_ops and not lrs[0].is_meta:
        ops.scale_rates(lrs, base, gains, multipliers)
        return
    for lr, factor, gain, multiplier in zip(lrs, base, gains, multipliers, strict=True):
        lr.fill_(factor * gain * multiplier)


def version_of(lr: Any) -> int:
    """A number that grows when a tensor is written in place; 0 for a float."""
    return lr._version if isinstance(lr, Tensor) else 0


def share_memory(one: Any, other: Any) -> bool:
    """Whether two learning rates are tensors of the same memory: writing one writes the other."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.device == other.device and one.data_ptr() == other.data_ptr() != 0)
