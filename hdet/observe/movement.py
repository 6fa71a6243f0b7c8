r"""Movement: how far a round took the weights, relative to their size. One number per round, the same on every rank.

For a weight matrix ``W``, with ``m`` the replicas' mean at the round's end and ``m'`` at its start::

    size(W)     = sqrt(max(||m||_F, own(W)) own(W)),     own(W) = sqrt(fan_out / 3)
    movement(W) = ||m - m'||_F / size(W)
    movement    = geometric mean over weight matrices, none of which counts as more than 4 times, or less than a
                  quarter of, their median

``own`` is the Frobenius norm that torch's default initialisation gives a layer, whose entries are uniform within
``1 / sqrt(fan_in)``: ``fan_in`` is the number of elements to a row, ``fan_out`` that of rows. A matrix that is smaller
(one that starts at 0, say, or at 0.02) has no size of its own yet; of one that has grown, by half of that growth the
same step is smaller. With the norm alone, a learning rate far too high hides itself: the norm grows with the steps.

A tensor with fewer than two dimensions, a frozen or an empty one has no movement. Rows of an embedding that no batch
has seen stand still, and are a small part of the mean as long as most matrices are no embeddings.

:class:`Layout` finds the matrices in flat buckets once; :meth:`Layout.squares` then takes one pass over each bucket
per round. It returns sums of squares: of a sharded matrix, those of the shards are to be added first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A weight matrix as a whole, whatever part of it this rank holds."""

    rows: int
    """``fan_out``: size of the first dimension."""
    own: float
    """Squared norm that default initialisation would give it, ``fan_out / 3``."""


class Segment(NamedTuple):
    """Elements of one matrix that lie together in a bucket."""

    matrix: int
    start: int
    length: int


class Layout:
    """Where the weight matrices lie in flat buckets.

    Args:
        tensors: the trained parameters, as this rank holds them (of a sharded one its shard), in any order; one that is
            tied may come twice.
        buckets: [bucket] the views that are laid end to end in its wire; each lies within one of ``tensors``.
        shapes: [tensor] of the whole tensors, where ``tensors`` are shards of them.

    Raises:
        ValueError: if ``shapes`` are not as many as ``tensors``.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        buckets: Iterable[Sequence[Tensor]],
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if shapes is not None and len(shapes) != len(tensors):
            raise ValueError(f"{len(shapes)} shapes for {len(tensors)} tensors. Must be as many.")
        self.matrices: list[Matrix] = []
        """In the order of ``tensors``, each once: also one of which this rank holds nothing."""
        begins: dict[int, int | None] = {}  # address -> matrix
        seen: set[tuple[int, int]] = set()
        for i, tensor in enumerate(tensors):
            shape = tensor.shape if shapes is None else shapes[i]
            key = (tensor.data_ptr(), tensor.numel())
            if tensor.numel() and key in seen:
                continue
            seen.add(key)
            counts = len(shape) >= 2 and math.prod(shape) > 0
            if tensor.numel():
                begins[tensor.data_ptr()] = len(self.matrices) if counts else None
            if counts:
                self.matrices.append(Matrix(int(shape[0]), shape[0] / 3))
        addresses = sorted(begins)
        self.segments: list[list[Segment]] = []
        """[bucket]"""
        for pieces in buckets:
            found: list[Segment] = []
            start = 0
            for piece in pieces:
                length = piece.numel()
                at = bisect_right(addresses, piece.data_ptr()) - 1
                matrix = begins[addresses[at]] if at >= 0 else None
                if matrix is not None:
                    found += (
                        Segment(matrix, start + at, min(_TOGETHER, length - at)) for at in range(0, length, _TOGETHER)
                    )
                start += length
            self.segments.append(found)

    def squares(self, now: Iterable[Tensor], before: Iterable[Tensor]) -> Tensor:
        """Sums of squares of what this rank holds.

        Args:
            now, before: [bucket] the flat means at the round's end and at its start.

        Returns:
            ``(matrices, 2)``, float64, on the CPU: of the differences, and of the means now.
        """
        total = torch.zeros(len(self.matrices), 2, dtype=torch.float64)
        for segments, mean, start in zip(self.segments, now, before, strict=True):
            if not segments:
                continue
            difference = mean - start
            for column, flat in enumerate((difference, mean)):
                parts = [flat.narrow(0, segment.start, segment.length) for segment in segments]
                norms = torch.stack(torch._foreach_norm(parts)).cpu().double()
                total[:, column].index_add_(0, torch.tensor([segment.matrix for segment in segments]), norms.square())
        return total

    def movement(self, squares: Tensor) -> float:
        """The round's movement from :meth:`squares`, summed over a replica's members."""
        return movement(squares.tolist(), [matrix.own for matrix in self.matrices])


def movement(squares: Sequence[Sequence[float]], own: Sequence[float]) -> float:
    """Geometric mean over matrices of the relative movement, each clipped to be near the median; dimensionless.

    Args:
        squares: [matrix] squared norms of the difference and of the matrix.
        own: [matrix] the squared norm that default initialisation would give it, > 0.

    Returns:
        NaN if there are no matrices, or one is not finite. 0 if most of them stood still.
    """
    if not squares or not all(math.isfinite(x) for pair in squares for x in pair):
        return math.nan
    ratios = sorted(moved / math.sqrt(max(size, o) * o) for (moved, size), o in zip(squares, own, strict=True))
    half = len(ratios) // 2
    median = ratios[half] if len(ratios) % 2 else math.sqrt(ratios[half - 1] * ratios[half])
    if median == 0:
        return 0.0
    logs = [math.log(min(max(ratio / median, 1 / _APART**2), _APART**2)) for ratio in ratios]
    return math.sqrt(median * math.exp(math.fsum(logs) / len(logs)))


_TOGETHER = 2**20
"""Elements whose squares are added in the bucket's own precision."""
_APART = 4.0
"""How far from the median, as a factor, a matrix counts at most."""
