r"""Movement: how far a round took the weights, relative to their size.

For a weight matrix ``W``, with ``m`` the replicas' mean at the round's end and ``m'`` where the round began::

    size(W)     = sqrt(max(||m||_F, own(W)) own(W)),     own(W) = sqrt(fan_out / 3)
    movement(W) = ||m - m'||_F / size(W)
    movement    = geometric mean over weight matrices, none of which counts as more than 4 times, or less than a
                  quarter of, their median

``own`` is the Frobenius norm that torch's default initialisation gives a layer, whose entries are uniform within
``1 / sqrt(fan_in)``: ``fan_in`` is the number of elements to a row, ``fan_out`` that of rows. A matrix that is smaller,
such as one that starts at 0, is measured by that norm. Of one that has grown, half of the growth, on a log scale,
counts: with its norm alone a learning rate far too high would hide itself, since the norm grows with the steps.

A tensor with fewer than two dimensions, a frozen or an empty one has no movement. Rows of an embedding that no batch
has seen stand still; they are a small part of the mean as long as most matrices are no embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_APART = 4.0
"""How far from the median, as a factor, a matrix counts at most."""
_CHUNK_BYTES = 64 * 2**20
"""Memory for the differences of some matrices at once."""


class Matrices:
    """The weight matrices among trained parameters.

    Args:
        tensors: trained parameters as this rank holds them; one that is tied may come twice.
        shapes: [tensor] of the whole tensors, where ``tensors`` are shards of them; default their own.
    """

    def __init__(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None = None) -> None:
        whole = [tuple(t.shape) for t in tensors] if shapes is None else [tuple(shape) for shape in shapes]
        seen: set[tuple[int, int]] = set()
        self.indices: list[int] = []
        """Which of ``tensors`` they are, each once; a shard of one may be empty."""
        for i, (tensor, shape) in enumerate(zip(tensors, whole, strict=True)):
            key = (tensor.data_ptr(), tensor.numel())
            if len(shape) < 2 or math.prod(shape) == 0 or (tensor.numel() and key in seen):
                continue
            seen.add(key)
            self.indices.append(i)
        self.own = [whole[i][0] / 3 for i in self.indices]
        """[matrix] squared norm that default initialisation would give it, ``fan_out / 3``."""

    @torch.no_grad()
    def squares(self, now: Sequence[Tensor], before: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Squared norms of what this rank holds. Reads both once, and waits for the device once.

        Args:
            now, before: [tensor] as in the constructor, at the round's end and where it began; on any device.

        Returns:
            [matrix] of the difference, and of the matrix now. Of shards, those of a replica's members add up.
        """
        moved: list[Tensor] = []
        sizes: list[Tensor] = []
        for chunk in self._chunks(now):
            ends = [now[i] for i in chunk]
            starts = [before[i].to(end.device, end.dtype) for i, end in zip(chunk, ends, strict=True)]
            moved += torch._foreach_norm(torch._foreach_sub(ends, starts), 2, dtype=torch.float32)
            sizes += torch._foreach_norm(ends, 2, dtype=torch.float32)
        if not moved:
            return [(0.0, 0.0)] * len(self.indices)
        both = torch.stack([torch.stack([norm.cpu() for norm in norms]) for norms in (moved, sizes)]).double().square()
        return [(d, s) for d, s in both.T.tolist()]

    def _chunks(self, tensors: Sequence[Tensor]) -> Iterable[list[int]]:
        """Indices of matrices, in order, of one device and dtype and so many bytes."""
        chunk: list[int] = []
        total = 0
        for i in self.indices:
            tensor = tensors[i]
            if chunk:
                first = tensors[chunk[0]]
                same = (tensor.device, tensor.dtype) == (first.device, first.dtype)
                if not same or total + tensor.nbytes > _CHUNK_BYTES:
                    yield chunk
                    chunk, total = [], 0
            chunk.append(i)
            total += tensor.nbytes
        if chunk:
            yield chunk


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
