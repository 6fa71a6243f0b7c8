r"""A wire of fewer bits: replicas send how far they moved, not where they are.

After a converge all replicas are at one point, the anchor ``a``. At the next they send, in bf16::

    d_r = bf16(theta_r - a)        theta <- a + (sum_r d_r) / N

What is rounded is a displacement: it keeps 8 bits, and the sum of N rounds to as many. The mean is thus off by at most
about ``(N + 3) / 2 * 2^-9`` of the largest displacement, and equal on all replicas, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket


class DeltaReference:
    """Where the replicas were one, by bucket, in fp32: one copy of the trained parameters.

    Args:
        dtype: of the wires; ``None`` for buckets' own, without anchors.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._layout: int | None = None
        self._parts: list[Tensor | None] = []

    def of(self, layout: int, index: int) -> Tensor | None:
        """Of bucket ``index`` in a model of this ``layout``; ``None`` where it travels in its own dtype."""
        return self._parts[index] if layout == self._layout else None

    def set(self, layout: int, buckets: Sequence[Bucket]) -> None:
        """The replicas are one, where the buckets are now. fp64 goes on travelling as it is."""
        if self.dtype is not None:
            self._layout = layout
            self._parts = [bucket.pack() if bucket.dtype == torch.float32 else None for bucket in buckets]

    def drop(self) -> None:
        """It is not known any more where they were: the next converge travels in the buckets' own dtype."""
        self._layout, self._parts = None, []

    def keep(self, layout: int, buckets: Sequence[Bucket]) -> None:
        """:meth:`set` them, unless the pass that wrote the mean has moved them already."""
        if layout != self._layout:
            self.set(layout, buckets)
