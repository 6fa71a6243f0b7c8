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

from hdet.model.step_hook import BeforeStep
from hdet.model.weights import Weights, groups_of
from hdet.replicas.topology import Replicas

_APART = 4.0
"""How far from the median, as a factor, a matrix counts at most."""
_CHUNK_BYTES = 64 * 2**20
"""Memory for the differences of some matrices at once."""
_TOGETHER = 2**20
"""Elements whose squares are added in their own precision. One sum of 5e7 equal squares in fp32 is percents off."""


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
            moved.append(_norms(torch._foreach_sub(ends, starts)))
            sizes.append(_norms(ends))
        if not moved:
            return []
        both = torch.stack([torch.cat([norms.cpu() for norms in chunks]) for chunks in (moved, sizes)])
        return [(d, s) for d, s in both.square().T.tolist()]

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


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """[tensor] norm, fp64; tensors of one device and dtype."""
    parts = [t.reshape(-1).split(_TOGETHER) if t.numel() > _TOGETHER else (t,) for t in tensors]
    flat = [part for of_one in parts for part in of_one]
    norms = torch.stack(torch._foreach_norm(flat, 2, dtype=torch.promote_types(flat[0].dtype, torch.float32))).double()
    if len(flat) == len(parts):
        return norms
    by_tensor = norms.split([len(of_one) for of_one in parts])
    return torch.stack([of_one[0] if len(of_one) == 1 else of_one.clone().norm() for of_one in by_tensor])


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
        kept: copies of the weights by the originals' address, which a rollback keeps anyway, of before the optimizer's
            first step and of the rounds named in :meth:`begin`; ``None`` for none. Copies of the matrices are made
            where a round began elsewhere.
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: Optimizer,
        replicas: Replicas,
        *,
        per_group: bool,
        kept: Callable[[], Mapping[int, Tensor]] | None,
    ) -> None:
        self._weights, self._optimizer, self._replicas = weights, optimizer, replicas
        self._rates = len(optimizer.param_groups) if per_group else 1
        self._kept = kept
        self._part = 1.0
        self._is_kept = False
        self._own: dict[int, Tensor] = {}
        self._before_step = BeforeStep(optimizer, self.begin)
        self.restart()

    def restart(self, part: float = 1.0) -> None:
        """At the start of a run, and after a resume: the round begins where the weights are before the optimizer's next
        step. By then everything has been loaded, in whatever order.

        Where a framework keeps the weights and its step may be in several parts, this round's movement is not known.

        Args:
            part: of the round that is still to come."""
        self._own, self._part, self._is_kept = {}, part, self._kept is not None
        if self._kept is None and type(self._weights) is Weights:
            self._before_step.arm()

    def begin_inside(self, part: float) -> None:
        """The weights have converged inside a round, of which this ``part`` is still to come: it is measured from here,
        as in a run that goes on from a state saved here."""
        if type(self._weights) is Weights:
            self.begin()
        else:
            self._own, self._is_kept = {}, False
        self._part = part

    def begin_late(self) -> None:
        """A first step is over: the weights are where its round began if AMP skipped it, so that no hook ran."""
        if self._before_step.is_armed:
            self.begin()

    @torch.no_grad()
    def begin(self, *, is_kept: bool = False) -> None:
        """The weights are where a round begins, and a rollback keeps them or not."""
        self._before_step.disarm()
        before, self._own, self._is_kept = self._own, {}, is_kept
        if is_kept:
            return
        tensors, shapes = self._trained()
        for i in Matrices(tensors, shapes).indices:
            tensor = tensors[i].detach()
            kept = before.get(tensor.data_ptr())
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                self._own[tensor.data_ptr()] = tensor.clone()
            else:
                self._own[tensor.data_ptr()] = kept.copy_(tensor)

    def measure(self) -> tuple[float, ...]:
        """[learning rate] How far the last round took the weights; NaN where it is not known. Collective; the same on
        every rank. A part of a round counts for the whole: the weights walk like the square root of the steps."""
        part, self._part = self._part, 1.0
        starts = self._kept() if self._is_kept and self._kept is not None else self._own
        tensors, shapes = self._trained() if starts else ([], [])
        matrices = Matrices(tensors, shapes)
        squares = matrices.squares(tensors, [starts.get(t.data_ptr(), t) if t.numel() else t for t in tensors])
        groups = groups_of([tensors[i] for i in matrices.indices], self._optimizer)
        rates, own = groups if self._rates > 1 else [0] * len(groups), matrices.own
        if matrices.flat:  # members' partitions are not parts of the same tensors
            squares = [
                _sums([s for s, rate in zip(squares, rates, strict=True) if rate == r]) for r in range(self._rates)
            ]
            rates, own = list(range(self._rates)), [0.0] * self._rates
        if not self._weights.whole and self._replicas.members > 1:
            rows = self._replicas.all_gather_members([x for pair in squares for x in pair])
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
            squares = list(zip(sums[::2], sums[1::2], strict=True))
        all_of_them = movement(squares, own) if starts else math.nan
        found = []
        for rate in range(self._rates):
            mine = [i for i, of in enumerate(rates) if of == rate]
            picked = movement([squares[i] for i in mine], [own[i] for i in mine]) if mine else all_of_them
            found.append(picked / math.sqrt(part) if starts else math.nan)
        # The means are equal on all ranks; sums on different devices need not be, to the last bit.
        return tuple(self._replicas.all_gather(found)[0])

    def _trained(self) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        """Trained tensors as this rank holds them, and the shapes of the whole ones."""
        both = zip(self._weights.tensors(), self._weights.shapes(), strict=True)
        trained = [(t, shape) for (t, is_trained), shape in both if is_trained]
        return [t for t, _ in trained], [shape for _, shape in trained]

    def close(self) -> None:
        """Keep nothing any more."""
        self._before_step.remove()
        self._own = {}


def _sums(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(moved for moved, _ in pairs), math.fsum(size for _, size in pairs)
