"""Packs many tensors into few flat tensors (**wires**), and unpacks them. No communication here.

A converge averages a model bucket by bucket. Tensors are laid end to end into buckets of bounded size; a tensor larger
than what is left of a bucket is split into pieces. Wires are fp32 (fp64 for fp64 tensors) whatever the tensors' own
dtype, and int64 for integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hdet.model.finite import all_finite
from hdet.ops import _unchecked as ops

_PACKABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass
class Bucket:
    """Pieces of tensors that share a wire.

    No piece may be added once the bucket was used.
    """

    device: torch.device
    """Of the wire."""
    dtype: torch.dtype
    """Of the wire."""
    pieces: list[Tensor] = field(default_factory=list)
    """Views into the tensors, in the wire's order."""
    numel: int = 0
    """Elements of the wire."""

    def pack(self, memory: Tensor | None = None, anchor: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Copy the pieces into a wire, and return it.

        Args:
            memory: a 1-D tensor whose first elements become the wire, in its dtype; ``None`` for new memory.
            anchor: flat like the wire; subtracted from the pieces.
            scale: what floating-point pieces are multiplied by.
        """
        return self.pack_counted(memory, anchor, scale)[0]

    def pack_counted(
        self,
        memory: Tensor | None = None,
        anchor: Tensor | None = None,
        scale: float = 1.0,
        limit: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        """The same, and how many elements of the wire are not finite or beyond the limit, as a 0-dim int64 tensor."""
        if memory is None:
            memory = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        wire = memory if memory.numel() == self.numel else memory.narrow(0, 0, self.numel)
        if self.dtype.is_floating_point:
            return wire, ops.pack(wire, self._staged(), scale, anchor, limit)
        torch._foreach_copy_(self._slots(wire), self.pieces)
        return wire, torch.zeros((), dtype=torch.int64)

    def unpack(
        self,
        wire: Tensor,
        divisor: float = 1,
        slow: Tensor | None = None,
        slow_decay: float = 0.0,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Write ``wire / divisor`` into the tensors, in place; returns ``sum((piece - wire / divisor)**2)`` over the
        pieces as they were, as a 0-dim float64 tensor (for integers, which are not divided: 0).

        ``slow``, flat like the wire, moves towards the mean by ``1 - slow_decay``. With an ``anchor``, which becomes
        the mean, ``anchor + wire / divisor`` is written; see :func:`hdet.ops.unpack`."""
        if not self.dtype.is_floating_point:
            torch._foreach_copy_(self.pieces, self._slots(wire))
            return torch.zeros((), dtype=torch.float64, device=self.device)
        staged = self._staged()
        squared_distance = ops.unpack(wire, staged, divisor, anchor, slow, slow_decay)
        if staged is not self.pieces:
            for piece, stage in zip(self.pieces, staged, strict=True):
                if stage is not piece:
                    piece.copy_(stage)
        return squared_distance

    def is_finite(self, limit: float = math.inf) -> bool:
        """Whether all elements of the pieces are finite and within the limit. Integers are."""
        if self._is_direct:
            return bool(ops.all_finite(self.pieces, limit))
        return all_finite(self.pieces, limit)

    def limit(self, count: float) -> float:
        """What no element may be beyond, lest the sum of ``count`` wires overflow; half of it, for rounding."""
        return torch.finfo(self.dtype).max / (2 * count) if self.dtype.is_floating_point else math.inf

    def write(self, wire: Tensor) -> None:
        """Write the wire into the tensors, in place."""
        torch._foreach_copy_(self.pieces, self._slots(wire))

    def add(self, wire: Tensor) -> None:
        """Add the wire to the tensors, in place."""
        slots = self._slots(wire)
        if self._is_direct:
            torch._foreach_add_(self.pieces, slots)
            return
        for piece, slot in zip(self.pieces, slots, strict=True):
            if piece.dtype == torch.bool or (piece.is_floating_point() and piece.element_size() == 1):
                piece.copy_(piece.to(slot.dtype) + slot.to(piece.device))  # they have no addition
            else:
                piece.add_(slot.to(piece.device))

    @cached_property
    def _is_direct(self) -> bool:
        """Whether the ops can take all pieces as they are."""
        return self.dtype.is_floating_point and all(self._can_take(piece) for piece in self.pieces)

    def _can_take(self, piece: Tensor) -> bool:
        return piece.device == self.device and piece.dtype in _PACKABLE and piece.is_contiguous()

    def _staged(self) -> list[Tensor]:
        """The pieces, as contiguous copies where the ops cannot take them: holes, another device, another dtype."""
        if self._is_direct:
            return self.pieces
        return [
            piece
            if self._can_take(piece)
            else piece.to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format)
            for piece in self.pieces
        ]

    def _slots(self, wire: Tensor) -> list[Tensor]:
        """The wire cut into views of the pieces' shapes."""
        slots = wire.split([piece.numel() for piece in self.pieces])
        pairs = zip(slots, self.pieces, strict=True)
        return [slot if piece.dim() == 1 else slot.view(piece.shape) for slot, piece in pairs]


def fill_buckets(
    tensors: Iterable[Tensor], bucket_bytes: int, device_for: Callable[[Tensor], torch.device]
) -> list[Bucket]:
    """Divide ``tensors`` into buckets of at most ``bucket_bytes`` each; each bucket has one device and dtype.

    Every element of every tensor lies in exactly one piece. Only a tensor whose memory has holes (a strided view) is
    kept whole, and may then exceed ``bucket_bytes``. Pieces are views: fill anew when a tensor's storage may have
    changed.

    Args:
        tensors: any mix of dtypes, devices and strides; empty ones have no piece.
        bucket_bytes: size of a wire in bytes, at least one element's.
        device_for: where a tensor's wire must lie.
    """
    closed: list[Bucket] = []
    filling: dict[tuple[torch.device, torch.dtype], Bucket] = {}
    for tensor in tensors:
        kind = (device_for(tensor), wire_dtype(tensor.dtype))
        capacity = max(1, bucket_bytes // kind[1].itemsize)
        for view in _views(tensor):
            start, length = 0, view.numel()
            while start < length:
                bucket = filling.get(kind) or filling.setdefault(kind, Bucket(*kind))
                take = min(length - start, capacity - bucket.numel) if view.dim() == 1 else length
                bucket.pieces.append(view.narrow(0, start, take) if take < length else view)
                bucket.numel += take
                start += take
                if bucket.numel >= capacity:
                    closed.append(filling.pop(kind))
    return closed + list(filling.values())


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the wire in which values of ``dtype`` are sent and summed."""
    if dtype in (torch.float64, torch.complex128):
        return torch.float64
    if dtype.is_floating_point or dtype.is_complex:
        return torch.float32
    return torch.int64


def _views(tensor: Tensor) -> list[Tensor]:
    """Views of the tensor that hold each of its elements once: one flat view where its memory is dense."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:  # expanded: one memory location under many indices
            tensor = tensor.narrow(dim, 0, 1)
    if tensor.numel() == 0:
        return []
    if tensor.is_contiguous() or _is_dense(tensor):  # any order of dimensions, channels_last too
        return [tensor.as_strided((tensor.numel(),), (1,))]
    return [tensor]


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
