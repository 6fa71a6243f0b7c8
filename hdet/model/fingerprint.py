"""Hashes of tensors' bits, by which ranks compare tensors without sending them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Multipliers for columns and rows, from splitmix64 and MurmurHash3.
_COLUMN, _ROW = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64
SMALL = 2**16
"""Tensors of up to this many bytes are concatenated before hashing, which is faster."""


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, by value and position. A change of any one element always changes it.

    ``sum_ij bits_ij * (c_j + r_i) mod 2**64`` over rows ``i`` and columns ``j``; every ``c_j + r_i`` is odd, and so
    invertible.
    """
    data = _bytes_of(tensor)
    if data.storage_offset() % 8:  # view() as words needs an aligned start
        data = data.clone()
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    bits = data.view(words[math.gcd(data.numel(), 8)])
    width = min(bits.numel(), 4096)
    body = bits.numel() // width * width
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for rows in (bits[:body].view(-1, width), bits[body:].view(1, -1)):
        total += _mix(rows.sum(0, dtype=torch.int64), _COLUMN, 1) + _mix(rows.sum(1, dtype=torch.int64), _ROW, 0)
    return int(total)


def fingerprint_all(tensors: Sequence[Tensor]) -> list[int]:
    """Hashes of many tensors: one for each large tensor, and one for all small ones of a device."""
    small: dict[torch.device, list[Tensor]] = {}
    hashes = []
    for tensor in tensors:
        if tensor.nbytes <= SMALL:
            small.setdefault(tensor.device, []).append(_bytes_of(tensor))
        else:
            hashes.append(fingerprint(tensor))
    return hashes + [fingerprint(torch.cat(data)) for data in small.values()]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The elements as a 1-D uint8 tensor."""
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).reshape(-1)


def _mix(sums: Tensor, multiplier: int, parity: int) -> Tensor:
    """``sum_k sums_k * (2 * multiplier * (k + 1) + parity)``."""
    weights = torch.arange(1, sums.numel() + 1, device=sums.device).mul_(multiplier)
    return (sums * weights.mul_(2).add_(parity)).sum()
