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
has seen stand still; they are a small part of the mean as long as most matrices are no embeddings. Where a framework
keeps weights in flat partitions (DeepSpeed from ZeRO 1 on) there are no matrices: all weights under one learning rate
count as one, and their own norm as its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hdet.model.weights import Weights, local
from hdet.replicas.topology import Replicas

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
            key = (tensor.data_ptr() if tensor.numel() else id(tensor), tensor.numel())
            if len(shape) < 2 or math.prod(shape) == 0 or key in seen:
                continue
            seen.add(key)
            self.indices.append(i)
        self.own = [whole[i][0] / 3 for i in self.indices]
        """[matrix] squared norm that default initialisation would give it, ``fan_out / 3``; 0 where that is unknown."""
        self.flat = not self.indices
        """Whether there are none: then all tensors take their place."""
        if self.flat:
            self.indices = [i for i, shape in enumerate(whole) if math.prod(shape) > 1]
            self.own = [0.0] * len(self.indices)

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
            moved += _norms(torch._foreach_sub(ends, starts))
            sizes += _norms(ends)
        if not moved:
            return []
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


def _norms(tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[tensor] norm, in fp32 at least; tensors of one dtype."""
    return torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32))


def movement(squares: Sequence[Sequence[float]], own: Sequence[float]) -> float:
    """Geometric mean over matrices of the relative movement, each clipped to be near the median; dimensionless.

    Args:
        squares: [matrix] squared norms of the difference and of the matrix.
        own: [matrix] the squared norm that default initialisation would give it; 0 where that is unknown.

    Returns:
        NaN if there are no matrices, or one is not finite. 0 if most of them stood still.
    """
    if not squares or not all(math.isfinite(x) for pair in squares for x in pair):
        return math.nan
    sizes = [math.sqrt(max(size, o) * o) if o else size for (_, size), o in zip(squares, own, strict=True)]
    ratios = sorted(moved / size if size else 0.0 for (moved, _), size in zip(squares, sizes, strict=True))
    half = len(ratios) // 2
    median = ratios[half] if len(ratios) % 2 else math.sqrt(ratios[half - 1] * ratios[half])
    if median == 0:
        return 0.0
    logs = [math.log(min(max(ratio / median, 1 / _APART**2), _APART**2)) for ratio in ratios]
    return math.sqrt(median * math.exp(math.fsum(logs) / len(logs)))


class MovementMeter:
    """Measures the movement of every round, at the replicas' mean.

    Args:
        weights: what is trained.
        optimizer: whose parameter groups have the learning rates.
        replicas: who takes part.
        per_group: whether each parameter group has a learning rate of its own, and so a movement.
        starts: where the weights were when the round began: copies by the originals' address, from what is kept
            anyway; ``None`` to keep copies of the matrices here.
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: Optimizer,
        replicas: Replicas,
        *,
        per_group: bool,
        starts: Callable[[], Mapping[int, Tensor]] | None,
    ) -> None:
        self._weights, self._optimizer, self._replicas = weights, optimizer, replicas
        self._rates = len(optimizer.param_groups) if per_group else 1
        self._starts = starts
        self._own: dict[int, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """The weights are where a round begins."""
        if self._starts is None:
            self._own = {t.data_ptr(): t.detach().clone() for t, _ in self._trained()}

    def restart(self) -> None:
        """It is not known where the round began."""
        self._own = {}

    def measure(self, rounds: int) -> tuple[float, ...]:
        """How far the last round took the weights. Collective; the same on every rank.

        Args:
            rounds: how many rounds ago the starts were kept: over several the weights walk like the square root.

        Returns:
            [learning rate] NaN where it is not known.
        """
        starts = self._own if self._starts is None else self._starts()
        trained = self._trained()
        now = [t for t, _ in trained]
        matrices = Matrices(now, [shape for _, shape in trained])
        squares = matrices.squares(now, [starts.get(t.data_ptr(), t) for t in now])
        for k, i in enumerate(matrices.indices):
            if now[i].numel() and now[i].data_ptr() not in starts:
                squares[k] = (math.nan, math.nan)
        rates, own = self._rate_of([now[i] for i in matrices.indices]), matrices.own
        if matrices.flat:  # members' partitions are not parts of the same tensors
            squares = [_sums(squares, [rate == r for rate in rates]) for r in range(self._rates)]
            rates, own = list(range(self._rates)), [0.0] * self._rates
        if not self._weights.whole and self._replicas.members > 1:
            rows = self._replicas.all_gather_members([x for pair in squares for x in pair])
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
            squares = list(zip(sums[::2], sums[1::2], strict=True))
        all_of_them = movement(squares, own)
        found = []
        for rate in range(self._rates):
            mine = [i for i, of in enumerate(rates) if of == rate]
            picked = movement([squares[i] for i in mine], [own[i] for i in mine]) if mine else all_of_them
            found.append(picked / math.sqrt(max(1, rounds)))
        # The means are equal on all ranks; sums on different devices need not be, to the last bit.
        return tuple(self._replicas.all_gather(found)[0])

    def _trained(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Trained tensors as this rank holds them, and the shapes of the whole ones."""
        wholes = {
            local(p).data_ptr(): tuple(p.shape) for group in self._optimizer.param_groups for p in group["params"]
        }
        kinds = self._weights.tensors()
        return [(t, wholes.get(t.data_ptr(), tuple(t.shape))) for t, trained in kinds if trained]

    def _rate_of(self, tensors: Sequence[Tensor]) -> list[int]:
        """[matrix] index of its learning rate."""
        if self._rates == 1:
            return [0] * len(tensors)
        groups = self._optimizer.param_groups
        index = {local(p).data_ptr(): g for g, group in enumerate(groups) for p in group["params"]}
        return [index.get(t.data_ptr(), -1) for t in tensors]


def _sums(pairs: Sequence[tuple[float, float]], which: Sequence[bool]) -> tuple[float, float]:
    """Of the pairs that are picked."""
    picked = [pair for pair, is_picked in zip(pairs, which, strict=True) if is_picked]
    return math.fsum(moved for moved, _ in picked), math.fsum(size for _, size in picked)
