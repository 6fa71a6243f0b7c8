r"""The optimizer's state at a converge: Adam's moments, momentum, step counts.

By policy::

    verify    it must agree between replicas, and a fingerprint proves it: at the first converges, then rarely
    average   v <- (1/N) sum_r v_r in fp32; counters become their maximum
    keep      each replica's stays its own
    reset     dropped at a round's end, and made anew by the optimizer's next step

Under every policy weights that an optimizer keeps in its state (Schedule-Free's ``z``) are averaged, and a replica that
was not finite gets the state of the others. :mod:`hdet.converge.optimizer_policy` says what ``auto`` comes to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hdet.converge.buckets import Bucket, fill_buckets
from hdet.errors import ReplicaMismatchError
from hdet.model.fingerprint import fingerprint
from hdet.model.weights import local
from hdet.replicas.agreement import digest
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")

ALWAYS_CHECKED = 3
"""Converges at which ``verify`` reads all of the state; after them it is every :data:`CHECKED_EVERY`-th."""
CHECKED_EVERY = 32

_COUNTERS = {"step", "steps", "k"}
_WEIGHTS = {"z", "ax", "slow_buffer", "slow_param", "slow_params", "ema", "master", "master_param", "master_params"}
"""Keys under which optimizers keep weights: Schedule-Free, ASGD, Lookahead, moving averages, fp32 masters."""


class StateSeen(NamedTuple):
    """What a replica tells the others of its optimizer's state; -1 and True where it did not look."""

    layout: int
    """Hash of which parameter has what."""
    finite: bool
    mark: int
    """Hash of all bits."""
    has_weights: bool


NOTHING_SEEN = StateSeen(-1, True, -1, False)


class Entry(NamedTuple):
    """One value in the state: plain facts, which ranks exchange where they differ."""

    parameter: int
    """Its index, in the order of the groups."""
    path: tuple[Any, ...]
    """Keys that lead to the value, from the parameter's state."""
    kind: str
    """``mean``, ``maximum`` (both tensors), ``counter``, ``number`` (both scalars), or ``left``: quantised."""
    shape: tuple[int, ...]
    dtype: str
    beside: bool
    """Whether it lies on the parameter's device."""
    weight: bool
    """Whether it holds weights."""


class _Value(NamedTuple):
    entry: Entry
    holder: Any
    """The dict or list that holds the value."""

    @property
    def now(self) -> Any:
        return self.holder[self.entry.path[-1]]


class OptimizerState:
    """The state of one optimizer, and what a converge makes of it.

    Args:
        optimizer: whose state.
        policy: ``verify``, ``average``, ``keep`` or ``reset``.
        replicas: the group.
        bucket_bytes: size of one bucket.
        everyone: whether all members of a replica hold copies, which are averaged together.
        automatic: whether a ``verify`` that fails turns into ``average`` instead of an error.
        overlapped: whether rounds' averages are applied late. Moments cannot be corrected late (a second moment might
            become negative), so that they are averaged only where training waits: in a ``converge()`` between rounds.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: str,
        replicas: Replicas,
        bucket_bytes: int,
        *,
        everyone: bool = False,
        automatic: bool = False,
        overlapped: bool = False,
    ) -> None:
        self._optimizer, self.policy, self._replicas, self._bucket_bytes = optimizer, policy, replicas, bucket_bytes
        self._everyone, self._automatic, self._overlapped = everyone, automatic, overlapped
        self._is_idle = replicas.size == 1
        self._may_reset = policy == "reset" and not (automatic and self._is_idle)
        self._inspected = 0
        self._has_weights = False
        self._told_left = False

    @torch.no_grad()
    def inspect(self) -> StateSeen:
        """What this rank tells at a converge. Not collective. Reads all of the state under ``average``, and under
        ``verify`` in the first :data:`ALWAYS_CHECKED` converges and every :data:`CHECKED_EVERY`-th."""
        if self._is_idle:
            return NOTHING_SEEN
        checks = self._inspected < ALWAYS_CHECKED or self._inspected % CHECKED_EVERY == 0
        self._inspected += 1
        averages, verifies = self.policy == "average", self.policy == "verify" and checks
        if not (averages or verifies or checks or self._has_weights):
            return NOTHING_SEEN
        values = list(self._values())
        layout = digest([value.entry for value in values])
        finite, mark = True, -1
        if averages or verifies:
            finite = all(bucket.is_finite() for bucket in self._fill(values))
        if verifies:
            mark = digest([layout, *(_fingerprint(value.now) for value in values)])
        return StateSeen(layout, finite, mark, any(value.entry.weight for value in values))

    @torch.no_grad()
    def converge(
        self, seen: Sequence[StateSeen], excluded: Sequence[int], *, complete: bool
    ) -> tuple[tuple[int, ...], int]:
        """Do what the policy says. Collective: every replica must call it.

        Args:
            seen: every replica's :meth:`inspect`, by replica.
            excluded: replicas whose parameters were not finite.
            complete: whether the converge ends a round.

        Returns:
            The replicas that were not finite, in parameters or state, and the bytes this rank sent.

        Raises:
            ReplicaMismatchError: on every rank: the state differs under ``verify``, or cannot be averaged because
                replicas have state of different shapes.
        """
        if self._is_idle:
            if complete and self._may_reset:
                self._reset()
            return tuple(excluded), 0
        self._has_weights = self._has_weights or any(one.has_weights for one in seen)
        good = [r for r in range(self._replicas.size) if r not in excluded and seen[r].finite]
        if not good:  # a state that holds infinities by design, or is lost everywhere: nobody to learn from
            good = [r for r in range(self._replicas.size) if r not in excluded]
        bad = tuple(r for r in range(self._replicas.size) if r not in good)
        if len({seen[r].mark for r in good}) > 1:
            self._disagree()
        late = complete and self._overlapped
        sent = 0
        if self.policy == "average" and not late:
            sent += self._sync(seen, good, lambda entry: entry.kind != "left", copy=False)
        elif self._has_weights:
            sent += self._sync(seen, good, lambda entry: entry.weight, copy=False)
        if complete and self._may_reset:
            self._reset()
        elif bad and not late:
            sent += self.heal(bad)
        return bad, sent

    @torch.no_grad()
    def heal(self, bad: Sequence[int]) -> int:
        """Give replicas that were not finite the state of the first that was; returns the bytes this rank sent. Under
        ``average`` they have the others' mean already. Collective."""
        good = [r for r in range(self._replicas.size) if r not in bad]
        if self._is_idle or not bad or not good:
            return 0
        averaged = self.policy == "average" and not self._overlapped
        return self._sync(None, good, lambda entry: not averaged or entry.kind == "left", copy=True)

    # --------------------------------------------------------------------------------------------------- inner parts

    def _values(self, stand_ins: Mapping[int, Any] | None = None) -> Iterator[_Value]:
        """Everything in the state that is a number, in the same order on every rank."""
        for index, p in enumerate(self._parameters()):
            state = self._optimizer.state.get(p) if stand_ins is None or index not in stand_ins else stand_ins[index]
            if state:
                values = list(_walk(index, (), state, tuple(local(p).shape), p.device))
                if any(value.entry.kind == "left" for value in values):
                    # Codes without their scales, or the reverse, would be nonsense: all of the parameter's, or nothing.
                    values = [_Value(v.entry._replace(kind="left", weight=False), v.holder) for v in values]
                    if not self._told_left and self.policy == "average":
                        self._told_left = True
                        if self._replicas.writer:
                            logger.warning("Quantised optimizer state cannot be averaged: each replica keeps its own.")
                yield from values

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _fill(self, values: Iterable[_Value]) -> list[Bucket]:
        tensors = [local(value.now) for value in values if isinstance(value.now, Tensor) and _is_plain(value.now)]
        return fill_buckets(tensors, self._bucket_bytes, self._replicas.device_for)

    def _sync(
        self, seen: Sequence[StateSeen] | None, good: Sequence[int], wanted: Callable[[Entry], bool], *, copy: bool
    ) -> int:
        """Make what is ``wanted`` the good replicas' mean; or, to ``copy``, the first good one's, and only in the bad
        ones. Returns the bytes sent."""
        layouts = [one.layout for one in seen] if seen is not None else self._gathered_layouts()
        holders: list[list[int]] | None = None
        stand_ins: dict[int, Any] = {}
        if len(set(layouts)) > 1:
            holders, stand_ins = self._reconcile(good, copy=copy)
        by_givers: dict[tuple[int, ...], list[_Value]] = {}
        for value in self._values(stand_ins):
            if wanted(value.entry):
                givers = tuple(good if holders is None else holders[value.entry.parameter])
                if givers:
                    by_givers.setdefault(givers[:1] if copy else givers, []).append(value)
        takes = not copy or self._replicas.rank not in good
        return sum(self._reduce(values, givers, takes) for givers, values in sorted(by_givers.items(), key=_first))

    def _reduce(self, values: Sequence[_Value], givers: Sequence[int], takes: bool) -> int:
        """Mean or maximum over the givers; collective, with the same values everywhere."""
        scalars = [value for value in values if value.entry.kind in ("counter", "number") or _is_scalar(value.now)]
        sent = 0
        if scalars:
            gather = self._replicas.all_gather if self._everyone else self._replicas.all_gather_peers
            members = self._replicas.members if self._everyone else 1
            mine = [float(value.now) for value in scalars]
            rows = [row for i, row in enumerate(gather(mine)) if i // members in givers]
            for i, value in enumerate(scalars if takes else ()):
                column = [row[i] for row in rows]
                most = value.entry.kind == "counter"
                same = len(set(column)) == 1
                _write_scalar(value, column[0] if same else max(column) if most else math.fsum(column) / len(column))
            sent += 8 * len(mine)
        for bucket in self._fill(value for value in values if not _is_scalar(value.now)):
            wire = bucket.pack()
            is_mean = bucket.dtype.is_floating_point
            if self._replicas.rank not in givers:
                wire.fill_(0 if is_mean else torch.iinfo(bucket.dtype).min)
            work = self._replicas.all_reduce(
                wire, dist.ReduceOp.SUM if is_mean else dist.ReduceOp.MAX, everyone=self._everyone
            )
            if work is not None:
                work.wait()
            if takes:
                if is_mean:
                    wire.div_(len(givers) * (self._replicas.members if self._everyone else 1))
                bucket.write(wire)
            sent += wire.nbytes
        return sent

    def _gathered_layouts(self) -> list[int]:
        own = float(digest([value.entry for value in self._values()]))
        rows = self._replicas.all_gather([own])
        return [digest([row[0] for row in members]) for members in self._replicas.by_replica(rows)]

    def _reconcile(self, good: Sequence[int], *, copy: bool) -> tuple[list[list[int]], dict[int, Any]]:
        """Replicas have state for different parameters: some saw no gradient. Make room for what others have, and
        return for each parameter which good replicas hold it; and, by parameter, what a rank that only passes on what
        others copy sends in place of its own."""
        everyone = self._replicas.all_gather_object([value.entry for value in self._values()])
        count = len(self._parameters())
        by_rank = [_by_parameter(entries, count) for entries in everyone]
        members = self._replicas.members
        for member in range(members):  # all look at all of them, so that all raise alike
            for index in range(count):
                held = {r: by_rank[r * members + member][index] for r in good}
                if not copy and len({repr(entries) for entries in held.values() if entries}) > 1:
                    raise ReplicaMismatchError(
                        f"The optimizer state of parameter {index} has different shapes or keys on the replicas "
                        f"{sorted(r for r, e in held.items() if e)}, so it cannot be averaged. Pass "
                        'optimizer_state="keep" or "reset".'
                    )
        mine = by_rank[self._replicas.rank * members + self._replicas.member]
        holders = []
        stand_ins: dict[int, Any] = {}
        for index, p in enumerate(self._parameters()):
            peers = [by_rank[r * members + self._replicas.member][index] for r in range(self._replicas.size)]
            holding = [r for r in good if peers[r]]
            reference = peers[holding[0]] if holding else []
            if mine[index] != reference:
                room = _room_for(reference, p)
                if copy and self._replicas.rank in good:
                    stand_ins[index] = room
                else:
                    self._optimizer.state.pop(p, None)
                    if room:
                        self._optimizer.state[p] = room
            holders.append([r for r in holding if peers[r] == reference])
        return holders, stand_ins

    def _disagree(self) -> None:
        """Under ``verify``, the states differ."""
        if self._automatic:
            self.policy = "average"
            if self._replicas.writer:
                logger.warning(
                    "The replicas' optimizer states differ, though their gradients should be shared and the state made "
                    'of them alone. From now on it is averaged. Pass optimizer_state="average" if that is right.'
                )
            return
        values = self._values()
        marks = [(v.entry.parameter, str(v.entry.path[-1]), _fingerprint(v.now)) for v in values]
        rows = self._replicas.all_gather_object(marks)
        members = self._replicas.members
        where = "its layout"
        for i in range(len(rows)):
            pairs = zip(rows[i], rows[i % members], strict=False)
            differing = [own for own, first in pairs if own != first]
            if differing:
                index, key, _ = differing[0]
                where = f"{key!r} of parameter {index}, {self._replicas.name_of(i)} against {self._replicas.name_of(0)}"
                break
        raise ReplicaMismatchError(
            f'The replicas\' optimizer states differ ({where}), and optimizer_state="verify" says they agree. They do '
            "if gradients are shared, and neither weight decay that is added to the gradient nor explored momentum or "
            'betas enter the state. Else pass optimizer_state="average", or "keep" or "reset".'
        )

    def _reset(self) -> None:
        """Drop everything but weights."""
        if type(self._optimizer).__name__ == "Adagrad":  # makes its state in the constructor, and never again
            for group in self._optimizer.param_groups:
                for p in group["params"]:
                    self._optimizer.state[p]["sum"].fill_(group["initial_accumulator_value"])
                    self._optimizer.state[p]["step"].zero_()
            return
        weights = {value.entry.parameter for value in self._values() if value.entry.weight}
        for index, p in enumerate(self._parameters()):
            state = self._optimizer.state
            if index not in weights:
                state.pop(p, None)
                continue
            for value in _walk(index, (), state[p], tuple(local(p).shape), p.device):
                now = value.now
                if not value.entry.weight and isinstance(now, Tensor):
                    now.zero_()


def _walk(index: int, path: tuple[Any, ...], holder: Any, shape: tuple[int, ...], device: Any) -> Iterator[_Value]:
    """The numbers in a parameter's state, at any depth; None, flags, names and foreign objects are passed over."""
    items = sorted(holder.items(), key=lambda item: str(item[0])) if isinstance(holder, dict) else enumerate(holder)
    for key, value in items:
        at = (*path, key)
        if isinstance(value, (dict, list, tuple)):
            yield from _walk(index, at, value, shape, device)
        elif isinstance(value, Tensor):
            here = local(value)
            if here.dtype == torch.bool:
                continue
            kind = _kind(here, key)
            weight = key in _WEIGHTS and tuple(here.shape) == shape and kind == "mean"
            beside = value.device == device
            yield _Value(Entry(index, at, kind, tuple(here.shape), str(here.dtype), beside, weight), holder)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not isinstance(holder, tuple):
            kind = "counter" if isinstance(value, int) or key in _COUNTERS else "number"
            yield _Value(Entry(index, at, kind, (), type(value).__name__, False, False), holder)


def _kind(tensor: Tensor, key: Any) -> str:
    if not _is_plain(tensor):
        return "left"
    floats = tensor.is_floating_point() or tensor.is_complex()
    if tensor.dim() == 0 and not tensor.is_complex():
        return "number" if floats and key not in _COUNTERS else "counter"
    if tensor.element_size() == 1:
        return "left"
    return "mean" if floats else "maximum"


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is torch's own kind: not one of a library's, with codes and scales inside."""
    here = local(tensor)
    return type(here) in (Tensor, torch.nn.Parameter) and here.layout == torch.strided


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.dim() == 0 and not value.is_complex())


def _write_scalar(value: _Value, new: float) -> None:
    now = value.now
    if isinstance(now, Tensor):
        now.fill_(new)
    else:
        value.holder[value.entry.path[-1]] = type(now)(new)


def _fingerprint(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    here = local(value)
    return fingerprint(here) if _is_plain(here) and here.numel() else 0


def _first(item: tuple[tuple[int, ...], Any]) -> tuple[int, ...]:
    return item[0]


def _by_parameter(entries: Iterable[Entry], count: int) -> list[list[Entry]]:
    lists: list[list[Entry]] = [[] for _ in range(count)]
    for entry in entries:
        lists[entry.parameter].append(Entry(*entry))
    return lists


def _room_for(entries: Iterable[Entry], p: Tensor) -> dict[Any, Any]:
    """A parameter's state as another replica has it, still zero."""
    state: dict[Any, Any] = {}
    for entry in entries:
        holder = state
        for key in entry.path[:-1]:
            holder = holder.setdefault(key, {})
        device = p.device if entry.beside else torch.device("cpu")
        if not entry.dtype.startswith("torch."):
            holder[entry.path[-1]] = 0 if entry.dtype == "int" else 0.0
        elif entry.shape == tuple(local(p).shape):
            dtype = getattr(torch, entry.dtype.removeprefix("torch."))
            holder[entry.path[-1]] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        else:
            dtype = getattr(torch, entry.dtype.removeprefix("torch."))
            holder[entry.path[-1]] = torch.zeros(entry.shape, dtype=dtype, device=device)
    return state
