"""Whether tensors are finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hdet import ops

_DIRECT = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements of tensors of any dtype, device and strides are finite. Waits for the devices."""
    direct: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dtype in _DIRECT and tensor.is_contiguous():
            direct.setdefault(tensor.device, []).append(tensor)
        elif is_float(tensor) and not bool(wide(tensor).isfinite().all()):
            return False
    return all(bool(ops.all_finite(of)) for of in direct.values())


def is_float(tensor: Tensor) -> bool:
    """Whether it may hold NaN and infinities."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: Tensor) -> Tensor:
    """The same values in a dtype that ``isfinite()`` takes, which float8 is not."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
