"""Whether tensors are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hdet.ops import _unchecked as ops

_DIRECT = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def all_finite(tensors: Iterable[Tensor], limit: float = math.inf) -> bool:
    """Whether all elements of tensors of any dtype, device and strides are finite and within ``[-limit, limit]``.
    Integers are. Waits for the devices."""
    direct: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dtype in _DIRECT and tensor.is_contiguous():
            direct.setdefault(tensor.device, []).append(tensor)
        elif is_float(tensor) and not _within(wide(tensor), limit):
            return False
    return all(bool(ops.all_finite(of, limit)) for of in direct.values())


def _within(tensor: Tensor, limit: float) -> bool:
    if limit == math.inf:
        return bool(tensor.isfinite().all())
    return bool((tensor.abs().double() <= limit).all())


def is_float(tensor: Tensor) -> bool:
    """Whether it may hold NaN and infinities."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: Tensor) -> Tensor:
    """The same values in a dtype that ``isfinite()`` takes, which float8 is not."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
