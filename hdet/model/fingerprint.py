"""Hashes of tensors' bits, to compare what replicas hold without sending it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Multipliers (of splitmix64 and MurmurHash3) that tell positions in a fingerprint apart.
_COLUMN, _ROW = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64
_SMALL = 2**16
"""Bytes of a tensor up to which it is cheaper copied than hashed by itself."""


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, by value and position: changing any one element always changes it.

    ``sum_ij bits_ij * (c_j + r_i) mod 2**64`` over rows ``i`` and columns ``j``; every ``c_j + r_i`` is odd, and so
    invertible.
    """
    octets = _octets(tensor)
    if octets.storage_offset() % 8:  # the words must lie alike on all ranks
        octets = octets.clone()
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    bits = octets.view(words[math.gcd(octets.numel(), 8)])
    width = min(bits.numel(), 4096)
    body = bits.numel() // width * width
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for rows in (bits[:body].view(-1, width), bits[body:].view(1, -1)):
        total += _mix(rows.sum(0, dtype=torch.int64), _COLUMN, 1) + _mix(rows.sum(1, dtype=torch.int64), _ROW, 0)
    return int(total)


def fingerprint_all(tensors: Sequence[Tensor]) -> list[int]:
    """Of many tensors: of each large one, and of the small ones laid end to end."""
    small: dict[torch.device, list[Tensor]] = {}
    found = []
    for tensor in tensors:
        if tensor.nbytes <= _SMALL:
            small.setdefault(tensor.device, []).append(_octets(tensor))
        else:
            found.append(fingerprint(tensor))
    return found + [fingerprint(torch.cat(octets)) for octets in small.values()]


def _octets(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).reshape(-1)


def _mix(sums: Tensor, multiplier: int, parity: int) -> Tensor:
    weights = torch.arange(1, sums.numel() + 1, device=sums.device).mul_(multiplier)
    return (sums * weights.mul_(2).add_(parity)).sum()
