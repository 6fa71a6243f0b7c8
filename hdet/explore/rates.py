"""Learning rates as they stand in an optimizer: floats, or tensors that groups may share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def copied(lr: Any) -> Any:
    """A copy of a learning rate; of a tensor, with memory of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr


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
