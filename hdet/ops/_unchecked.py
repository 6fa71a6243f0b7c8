"""The ops as the public functions of :mod:`hdet.ops` call them once they have looked at the arguments.

Without them is who makes the arguments itself, and calls often: for hundreds of small tensors looking takes as long as
the kernel. The kernels check dtypes, devices, sizes and shared memory all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(
    wire: Tensor, pieces: Sequence[Tensor], scale: float = 1.0, anchor: Tensor | None = None, limit: float = math.inf
) -> Tensor:
    """See :func:`hdet.ops.pack`."""
    with torch.no_grad():
        beyond: Tensor = torch.ops.hdet.pack(wire, pieces, scale, anchor, limit)
    torch.autograd.graph.increment_version(wire)
    return beyond


def unpack(
    wire: Tensor,
    pieces: Sequence[Tensor],
    divisor: float = 1.0,
    anchor: Tensor | None = None,
    slow: Tensor | None = None,
    slow_decay: float = 0.8,
    lrs: Sequence[Tensor] = (),
    schedule: Tensor | None = None,
    gain: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """See :func:`hdet.ops.unpack`."""
    with torch.no_grad():
        squared_distance: Tensor = torch.ops.hdet.unpack(
            wire, pieces, divisor, anchor, slow, slow_decay, lrs, schedule, gain, multiplier
        )
    torch.autograd.graph.increment_version([*pieces, *lrs, *(t for t in (anchor, slow) if t is not None)])
    return squared_distance


def scale_rates(
    lrs: Sequence[Tensor], schedule: Sequence[float], gain: Sequence[float], multiplier: Sequence[float]
) -> None:
    """See :func:`hdet.ops.scale_rates`."""
    with torch.no_grad():
        torch.ops.hdet.scale_rates(lrs, schedule, gain, multiplier)
    torch.autograd.graph.increment_version(lrs)


def all_finite(pieces: Sequence[Tensor], limit: float = math.inf) -> Tensor:
    """See :func:`hdet.ops.all_finite`."""
    with torch.no_grad():
        finite: Tensor = torch.ops.hdet.all_finite(pieces, limit)
    return finite
