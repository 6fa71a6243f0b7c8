r"""Wires of fewer bits: replicas send by how much their parameters changed since the last mean.

After a converge all replicas have the same parameters, the **anchor** ``a``. At the next converge they send, in bf16::

    d_r = bf16(theta_r - a)        theta <- a + (sum_r d_r) / N

A rounded displacement has 8 significant bits, and so has the sum of N. The mean is thus off by at most
about ``(N + 3) / 2 * 2^-9`` of the largest displacement, and equal on all replicas, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket


class DeltaReference:
    """The anchor, by bucket, in fp32: one copy of the trainable parameters.

    Args:
        dtype: of the wires; ``None`` to send every bucket in its own dtype, without an anchor.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._layout: int | None = None
        self._parts: list[Tensor | None] = []

    def of(self, layout: int, index: int) -> Tensor | None:
        """The anchor of bucket ``index`` in a model of this ``layout``; ``None`` if it is sent in its own dtype."""
        return self._parts[index] if layout == self._layout else None

    def set(self, layout: int, buckets: Sequence[Bucket]) -> None:
        """Make the parameters, which are equal on all replicas, the anchor. fp64 has none, and is sent as it is."""
        if self.dtype is not None:
            self._layout = layout
            self._parts = [bucket.pack() if bucket.dtype == torch.float32 else None for bucket in buckets]

    def drop(self) -> None:
        """Forget the anchor: the next converge sends the buckets in their own dtype."""
        self._layout, self._parts = None, []

    def keep(self, layout: int, buckets: Sequence[Bucket]) -> None:
        """After an average: :meth:`set` the anchor, unless :func:`hdet.ops.unpack` has just set it to the mean."""
        if layout != self._layout:
            self.set(layout, buckets)
