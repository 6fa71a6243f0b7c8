"""Averages or copies values of the optimizer's state over the replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hdet.converge.buckets import Bucket, fill_buckets
from hdet.converge.pending import smaller_scale
from hdet.converge.state_entries import (
    Entry,
    Value,
    by_parameter,
    is_plain,
    is_scalar,
    leaves,
    values_in_group,
    values_of,
    write_scalar,
    zero_state,
)
from hdet.errors import ReplicaMismatchError
from hdet.model.optimizers import group_state
from hdet.model.weights import local
from hdet.ops import _unchecked as ops
from hdet.replicas.agreement import digest
from hdet.replicas.topology import Replicas


class StateSync:
    """Reads the optimizer's state, and writes into it what the replicas have in common.

    A value's **sources** are the replicas from which it is taken. Where some replicas have no state for a parameter
    that others have, since they saw no gradient for it, they get it.

    Args:
        optimizer: whose state.
        replicas: the group.
        bucket_bytes: size of one bucket.
        all_ranks: whether all members of a replica hold copies, which are averaged together.
        explored: keys of the parameter groups in which replicas are to differ.
        own: ids of parameters that are each rank's own; their state is left out.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        replicas: Replicas,
        bucket_bytes: int,
        *,
        all_ranks: bool,
        explored: Collection[str] = (),
        own: frozenset[int] = frozenset(),
    ) -> None:
        self._explored = frozenset(explored)
        self._optimizer, self._replicas, self._bucket_bytes = optimizer, replicas, bucket_bytes
        self._all_ranks, self._own = all_ranks, own
        self.has_quantised = False
        """Whether a quantised value has been seen."""

    def parameters(self) -> list[Tensor]:
        """Of all groups, in their order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def values(self, substitutes: Mapping[int, Any] | None = None) -> Iterator[Value]:
        """Every value in the state, in the same order on every rank.

        Args:
            substitutes: by parameter, a state to read in place of the optimizer's.
        """
        for index, p in enumerate(self.parameters()):
            if id(p) in self._own:
                continue
            own = substitutes is None or index not in substitutes
            state = self._optimizer.state.get(p) if own else substitutes[index]  # type: ignore[index]
            if state:
                values = values_of(index, p, state)
                self.has_quantised |= bool(values) and values[0].entry.kind == "quantised"  # all are, or none
                yield from values
        yield from self.group_values()

    def leaves(self, part: int = 0, parts: int = 1) -> list[tuple[tuple[Any, ...], Any]]:
        """The same values, of the parameters whose index is ``part`` modulo ``parts``: each as its path and what it is.
        To say more of them takes four times as long."""
        own = [p for p in self.parameters()[part::parts] if id(p) not in self._own]
        states = [self._optimizer.state.get(p) or () for p in own]
        found = [(path, value) for state in states for path, _, value in leaves(state)]
        return found + [(value.entry.path, value.current) for value in self.group_values()]

    def group_values(self) -> Iterator[Value]:
        """Those that the optimizer keeps in its parameter groups."""
        groups = self._optimizer.param_groups
        first = sum(len(group["params"]) for group in groups)
        for index, (group, keys) in enumerate(zip(groups, group_state(self._optimizer), strict=True)):
            yield from values_in_group(first + index, group, [key for key in keys if key not in self._explored])

    def buckets(self, values: Iterable[Value]) -> list[Bucket]:
        """Of those values that are plain tensors."""
        tensors = [local(v.current) for v in values if isinstance(v.current, Tensor) and is_plain(v.current)]
        return fill_buckets(tensors, self._bucket_bytes, self._replicas.device_for)

    def run(
        self,
        layouts: Sequence[int] | None,
        sources: Sequence[int],
        selected: Callable[[Entry], bool],
        values: Iterable[Value] | None = None,
        *,
        copy: bool,
    ) -> int:
        """Average the selected values over the sources, into all replicas. Or, to ``copy``, write the first source's
        into the replicas that are no sources. Collective.

        Args:
            layouts: every replica's hash of its entries; ``None`` to gather them here.
            sources: replicas whose state is valid.
            selected: whether an entry is meant.
            values: what :meth:`values` has just returned; ``None`` to ask it.

        Returns:
            The bytes this rank sent.

        Raises:
            ReplicaMismatchError: on every rank, if the sources' state of a parameter differs in keys or shapes.
        """
        if layouts is None:
            layouts = self._gather_layouts()
        sources_of: list[list[int]] | None = None
        substitutes: dict[int, Any] = {}
        if len(set(layouts)) > 1:
            sources_of, substitutes = self._reconcile(sources, copy=copy)
            values = None  # it may have made or dropped some
        by_sources: dict[tuple[int, ...], list[Value]] = {}
        for value in self.values(substitutes) if values is None else values:
            if selected(value.entry):
                own = tuple(sources if sources_of is None else sources_of[value.entry.parameter])
                if own:
                    by_sources.setdefault(own[:1] if copy else own, []).append(value)
        writes = not copy or self._replicas.rank not in sources
        return sum(self._reduce(by_sources[own], own, writes) for own in sorted(by_sources))

    def _reduce(self, values: Sequence[Value], sources: Sequence[int], writes: bool) -> int:
        """Mean or maximum over the sources. Collective, with the same values on every rank; returns the bytes sent."""
        sent = self._reduce_scalars(
            [value for value in values if value.entry.kind in ("counter", "number") or is_scalar(value.current)],
            sources,
            writes,
        )
        for bucket in self.buckets(value for value in values if not is_scalar(value.current)):
            wire = bucket.pack()
            is_mean = bucket.dtype.is_floating_point
            if self._replicas.rank not in sources:
                wire.fill_(0 if is_mean else torch.iinfo(bucket.dtype).min)
            op = dist.ReduceOp.SUM if is_mean else dist.ReduceOp.MAX
            work = self._replicas.all_reduce(wire, op, all_ranks=self._all_ranks)
            if work is not None:
                work.wait()
            count: float = len(sources) * (self._replicas.members if self._all_ranks else 1)
            if is_mean and not bool(ops.all_finite([wire])):  # of finite values the sum has overflowed
                scale = smaller_scale(count)
                wire = bucket.pack().mul_(scale) if self._replicas.rank in sources else torch.zeros_like(wire)
                count *= scale
                if (work := self._replicas.all_reduce(wire, op, all_ranks=self._all_ranks)) is not None:
                    work.wait()
            if writes:
                if is_mean:
                    wire.div_(count)
                bucket.write(wire)
            sent += wire.nbytes
        return sent

    def _reduce_scalars(self, scalars: Sequence[Value], sources: Sequence[int], writes: bool) -> int:
        if not scalars:
            return 0
        gather = self._replicas.all_gather if self._all_ranks else self._replicas.all_gather_peers
        members = self._replicas.members if self._all_ranks else 1
        own = [float(value.current) for value in scalars]
        rows = [row for i, row in enumerate(gather(own)) if i // members in sources]
        for i, value in enumerate(scalars if writes else ()):
            column = [row[i] for row in rows]
            if len(set(column)) == 1:
                write_scalar(value, column[0])
            elif value.entry.kind == "counter":
                write_scalar(value, max(column))
            else:
                write_scalar(value, math.fsum(column) / len(column))
        return 8 * len(own)

    def _gather_layouts(self) -> list[int]:
        own = float(digest([value.entry for value in self.values()]))
        rows = self._replicas.all_gather([own])
        return [digest([row[0] for row in members]) for members in self._replicas.by_replica(rows)]

    def _reconcile(self, sources: Sequence[int], *, copy: bool) -> tuple[list[list[int]], dict[int, Any]]:
        """Where replicas have state for different parameters, make all have the state of the first source that has any.

        Returns:
            By parameter, the sources that have its state; and, when copying, by parameter a zero state that a source
            without one sends in place of its own.
        """
        gathered = self._replicas.all_gather_object([value.entry for value in self.values()])
        parameters, members = self.parameters(), self._replicas.members
        groups = self._optimizer.param_groups
        by_rank = [by_parameter(entries, len(parameters) + len(groups)) for entries in gathered]
        for member in range(members):  # every rank checks all members, so that all raise alike
            for index in range(len(parameters)):
                entries = {r: by_rank[r * members + member][index] for r in sources}
                if not copy and len({repr(own) for own in entries.values() if own}) > 1:
                    raise ReplicaMismatchError(
                        f"The optimizer state of parameter {index} has different shapes or keys on the replicas "
                        f"{sorted(r for r, own in entries.items() if own)}, so it cannot be averaged. Pass "
                        'optimizer_state="keep" or "reset".'
                    )
        own_entries = by_rank[self._replicas.rank * members + self._replicas.member]
        sources_of = []
        substitutes: dict[int, Any] = {}
        owners: list[Any] = [*parameters, *groups]
        for index, p in enumerate(owners):
            peers = [by_rank[r * members + self._replicas.member][index] for r in range(self._replicas.size)]
            having = [r for r in sources if peers[r]]
            reference = peers[having[0]] if having else []
            if own_entries[index] != reference and isinstance(p, dict):
                _fit_group(p, own_entries[index], reference)
            elif own_entries[index] != reference:
                state = zero_state(reference, p)
                if copy and self._replicas.rank in sources:
                    substitutes[index] = state
                else:
                    self._optimizer.state.pop(p, None)
                    if state:
                        self._optimizer.state[p] = state
            sources_of.append([r for r in having if peers[r] == reference])
        return sources_of, substitutes


def _fit_group(group: dict[str, Any], own: Sequence[Entry], reference: Sequence[Entry]) -> None:
    """Let a parameter group have the reference's numbers: zero where it had none, and no others."""
    for entry in own:
        if entry not in reference:
            del group[entry.path[0]]
    for entry in reference:
        if entry not in own:
            is_tensor = entry.dtype.startswith("torch.")
            zero = 0 if entry.dtype == "int" else 0.0
            dtype = getattr(torch, entry.dtype.removeprefix("torch."), None)
            group[entry.path[0]] = torch.zeros(entry.shape, dtype=dtype) if is_tensor else zero
