"""Converge: the replicas' parameters and buffers become their mean, in place, and are bitwise equal afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hdet.converge.buckets import Bucket, fill_buckets
from hdet.converge.delta import DeltaReference
from hdet.converge.pending import Averaged, InFlight, Pending, Point, total
from hdet.converge.piggyback import Piggyback
from hdet.converge.plan import Plan, make_plan, signature_of
from hdet.converge.slow_average import SlowAverage
from hdet.errors import DivergedError
from hdet.model.fingerprint import fingerprint, fingerprint_all
from hdet.model.weights import Weights
from hdet.replicas.agreement import digest
from hdet.replicas.topology import Replicas


class Inspection(NamedTuple):
    """A replica's model in three numbers, each below ``2**53``."""

    layout: int
    """Hash of what will be averaged, equal on two ranks whose models match: shapes, dtypes, strides."""
    finite: bool
    """Whether all trainable parameters are finite, on every member of the replica once its members have been heard."""
    constants: int
    """Hash of the bits of frozen parameters and buffers that are thought to be equal; the same."""


class Averager:
    r"""Averages a model over the replicas: ``theta <- (1/N) sum_r theta_r``.

    Trainable parameters are always averaged. Frozen parameters and buffers are first compared by a fingerprint of their
    bits and, where all replicas agree, left alone: constants stay exactly as they are and cost no traffic. Those that
    once differed are averaged from then on without comparing. Integer buffers that differ become their maximum.

    Sums are taken in fp32 (fp64 for fp64 tensors). Extra memory is two buckets, not a copy of the model: while one is
    being reduced the next is packed. A replica with a non-finite value contributes nothing and receives the mean.

    From the second average on the first bucket travels in the same message as what the replicas tell one another
    (:meth:`gather`). If it turns out that they do not agree, or that one is not finite, it is thrown away.

    Args:
        weights: what is averaged; tied tensors once.
        replicas: the group.
        bucket_bytes: size of one bucket.
        wire_dtype: bf16 for trainable parameters to travel as differences: see :mod:`hdet.converge.delta`.
        rides: whether the first bucket may travel with :meth:`gather`: not where averages are only started there.
        has_virtual: whether even a single process holds several replicas. Their mean is where its parameters are, but
            it must be finite, and slow averages follow it.
    """

    def __init__(
        self,
        weights: Weights,
        replicas: Replicas,
        bucket_bytes: int,
        *,
        wire_dtype: torch.dtype | None = None,
        rides: bool = True,
        has_virtual: bool = False,
    ) -> None:
        self._weights, self._replicas, self._bucket_bytes = weights, replicas, bucket_bytes
        # Members hold different shards, whose buckets only their peers may add up, but all must hear what all say.
        self._rides = rides and replicas.size > 1 and replicas.members == 1
        self._piggyback: Piggyback | None = None
        self._numbers = 0  # that each rank has to say
        self._has_packed = False  # the first bucket of the plan into the piggyback
        self._has_arrived = False  # it has been added up
        self._reference = DeltaReference(wire_dtype if replicas.size > 1 else None)
        self._is_idle = replicas.size == 1 and not has_virtual
        self._plan: Plan | None = None
        # Copies that several ranks of a replica hold are averaged over all ranks, so that they cannot drift apart.
        self.everyone = replicas.members > 1 and replicas.copies and weights.whole
        """Whether averages are over all ranks, not only over those that hold the same part of each replica."""
        self._wires: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    @torch.no_grad()
    def inspect(self) -> Inspection:
        """What the replicas tell one another before they average. Not collective."""
        if self._is_idle:
            return Inspection(0, True, 0)
        plan = self._current_plan()
        self._has_arrived = False
        buckets, finite = plan.buckets, True
        self._has_packed = self._piggyback is not None and self._fits(self._piggyback, plan)
        if self._piggyback is not None and self._has_packed:
            finite = not buckets[0].pack_counted(self._piggyback.wire, self._reference.of(plan.layout, 0))[1]
            buckets = buckets[1:]
        finite = finite and all(bucket.is_finite() for bucket in buckets)
        if not all(bucket.is_finite() for bucket in plan.moving_buckets):
            return Inspection(plan.layout, finite, -1 - self._replicas.rank)  # so that all are compared
        equal = [t for i, t in enumerate(plan.constant) if i not in plan.moving]
        return Inspection(plan.layout, finite, digest((plan.moving, fingerprint_all(equal))))

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's ``numbers``, replica by replica: as :meth:`Replicas.all_gather`. Collective, after
        :meth:`inspect`. Where an earlier average has shown that the replicas agree, it also adds up their first
        buckets."""
        piggyback, self._numbers = self._piggyback, len(numbers)
        if piggyback is None:
            return self._replicas.all_gather(numbers)
        piggyback.write(numbers)
        work = self._replicas.all_reduce(piggyback.memory, dist.ReduceOp.SUM)
        if work is not None:
            work.wait()
        self._has_arrived = self._has_packed
        return piggyback.read()

    def version(self) -> int:
        """A number that grows whenever a trained tensor is written in place. Not collective."""
        return sum([t._version for t in (self._plan or self._current_plan()).trained])

    def restart(self) -> None:
        """The model may be another from here on. On every replica, or on none."""
        self._plan = None
        self._reference.drop()

    @torch.no_grad()
    def moved_on(self) -> None:
        """The replicas went on from the mean together, to where they are now."""
        if self._plan is not None:
            self._reference.set(self._plan.layout, self._plan.buckets)

    @torch.no_grad()
    def average(
        self, seen: Sequence[Inspection], slow: SlowAverage | None = None, *, keep_points: bool = False
    ) -> Averaged:
        """Average now. Collective: every replica must call it, with the same layout.

        Args:
            seen: every replica's :meth:`inspect`, by replica.
            slow: moved towards the mean, in the pass that writes it.
            keep_points: return this replica's :class:`Point` in every bucket: memory for two copies of the parameters.

        Raises:
            DivergedError: on every replica, with nothing changed, if none of them is finite.
        """
        if self._is_idle:
            return Averaged(0.0, (), 0)
        trained, differing, excluded, sent = self._select(seen)
        assert self._plan is not None
        squares: list[Tensor] = []
        points: list[Point] = []

        def land(flight: InFlight) -> None:
            squares.append(self._land(flight, slow))
            if flight.snapshot is not None:
                points.append(self._point(flight, excluded))

        has_arrived, self._has_arrived = self._has_arrived and not excluded, False
        piggyback = self._current_piggyback()
        layout = self._plan.layout
        flying: InFlight | None = None
        for i, bucket in enumerate(trained + differing):
            is_trained = i < len(trained)
            keep = keep_points and is_trained and bucket.dtype.is_floating_point
            snapshot = bucket.pack() if keep else None
            anchor = self._reference.of(layout, i) if is_trained else None
            if i == 0 and piggyback is not None:
                if has_arrived:
                    started = InFlight(bucket, piggyback.wire, None, self._count(excluded), snapshot)
                else:
                    bucket.pack(piggyback.wire, anchor)
                    started = self._launch(bucket, excluded, piggyback.wire, snapshot, piggyback.memory)
            elif anchor is not None:
                wire = bucket.pack(self._wire(bucket, i % 2, self._reference.dtype), anchor)
                started = self._launch(bucket, excluded, wire, snapshot)
            else:
                wire = bucket.pack(None if keep_points else self._wire(bucket, i % 2))
                started = self._launch(bucket, excluded, wire, snapshot)
            started.index = i if is_trained and bucket.dtype.is_floating_point else None
            started.anchor = anchor
            sent += started.wire.nbytes
            if flying:
                land(flying)
            flying = started
        if flying:
            land(flying)
        self._weights.written()
        self._reference.keep(layout, trained)
        self._current_piggyback()  # the next one's
        return Averaged(total(squares), excluded, sent, points)

    @torch.no_grad()
    def start(self, seen: Sequence[Inspection]) -> Pending:
        """Send a snapshot of the model and return at once; :meth:`Pending.finish` applies its mean later. Collective.

        Args, Raises: as :meth:`average`.
        """
        if self._is_idle:
            return Pending([], self._weights, self._replicas, ())
        trained, differing, excluded, sent = self._select(seen)
        flights = []
        for bucket in trained + differing:
            snapshot = bucket.pack()
            flights.append(self._launch(bucket, excluded, snapshot.clone(), snapshot))
            sent += snapshot.nbytes
        return Pending(flights, self._weights, self._replicas, excluded, sent)

    def buckets(self) -> list[Bucket]:
        """Of the trainable parameters, as :meth:`inspect` found them."""
        return [] if self._plan is None else self._plan.buckets

    def _launch(
        self,
        bucket: Bucket,
        excluded: tuple[int, ...],
        wire: Tensor,
        snapshot: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> InFlight:
        """Send the wire, or the ``memory`` that it lies in."""
        is_mean = bucket.dtype.is_floating_point
        if self._replicas.rank in excluded:
            wire.fill_(0 if is_mean else torch.iinfo(bucket.dtype).min)
        op = dist.ReduceOp.SUM if is_mean else dist.ReduceOp.MAX
        work = self._replicas.all_reduce(wire if memory is None else memory, op, everyone=self.everyone)
        return InFlight(bucket, wire, work, self._count(excluded) if is_mean else 0, snapshot)

    def _count(self, excluded: tuple[int, ...]) -> int:
        """How many wires make a mean."""
        return (self._replicas.size - len(excluded)) * (self._replicas.members if self.everyone else 1)

    def _land(self, flight: InFlight, slow: SlowAverage | None) -> Tensor:
        flight.arrive()
        if slow is None or flight.index is None:
            return flight.bucket.unpack(flight.wire, flight.count or 1, anchor=flight.anchor)
        return slow.unpack(flight.index, flight.bucket, flight.wire, flight.count, flight.anchor)

    def _point(self, flight: InFlight, excluded: tuple[int, ...]) -> Point:
        assert flight.snapshot is not None
        mean = flight.wire.div_(flight.count) if flight.anchor is None else flight.anchor.clone()
        displacement = flight.snapshot.sub_(mean)
        if self._replicas.rank in excluded:  # it stood nowhere
            displacement.zero_()
        return Point(flight.bucket, mean, displacement)

    def _wire(self, bucket: Bucket, parity: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for the bucket's wire, kept from converge to converge: new pages would cost as much as the packing."""
        key = (bucket.device, dtype or bucket.dtype, parity)
        wire = self._wires.get(key)
        if wire is None or wire.numel() < bucket.numel:
            wire = self._wires[key] = torch.empty(bucket.numel, dtype=key[1], device=bucket.device)
        return wire

    def _fits(self, piggyback: Piggyback, plan: Plan) -> bool:
        """Whether the plan's first bucket can travel in it."""
        return piggyback.layout == plan.layout and piggyback.wire.dtype == self._first_dtype(plan)

    def _first_dtype(self, plan: Plan) -> torch.dtype:
        anchored = self._reference.of(plan.layout, 0) is not None
        return self._reference.dtype if anchored and self._reference.dtype else plan.buckets[0].dtype

    def _current_piggyback(self) -> Piggyback | None:
        """In which the first bucket of the plan travels, now that the replicas agree on it.

        At the first average too, when it holds nothing else: a backend's order of summation may depend on a message's
        size, and a resumed run must be the uninterrupted one bit for bit."""
        plan = self._plan
        assert plan is not None
        if self._piggyback is None or not self._fits(self._piggyback, plan):
            self._piggyback = None
            self._wires.clear()
            numbers, ranks = self._numbers, self._replicas.size
            # Among very many what all say is better gathered than added up.
            if self._rides and plan.buckets and 0 < 64 * ranks * numbers <= self._bucket_bytes:
                first = plan.buckets[0]
                wire = torch.empty(first.numel, dtype=self._first_dtype(plan), device=first.device)
                self._piggyback = Piggyback(plan.layout, wire, ranks, self._replicas.rank, numbers)
                self._wires[first.device, wire.dtype, 0] = self._piggyback.memory
        return self._piggyback

    def _current_plan(self) -> Plan:
        """The plan, made anew if a tensor is another, lies elsewhere, or was frozen or released since."""
        kinds = list(self._weights.tensors())
        signature = signature_of(kinds)
        if self._plan is None or self._plan.signature != signature:
            self._plan = make_plan(kinds, signature, self._fill)
        return self._plan

    def _fill(self, tensors: list[Tensor]) -> list[Bucket]:
        return fill_buckets(tensors, self._bucket_bytes, self._replicas.device_for)

    def _select(self, seen: Sequence[Inspection]) -> tuple[list[Bucket], list[Bucket], tuple[int, ...], int]:
        """What must be averaged (trainable parameters; others that differ), which replicas to leave out, and the bytes
        it took to find out."""
        plan = self._plan  # inspect() has just made sure of it
        assert plan is not None
        sent = 0
        excluded = {replica for replica, inspection in enumerate(seen) if not inspection.finite}
        if len({inspection.constants for inspection in seen}) > 1:
            mine = [x for t in plan.constant for x in (fingerprint(t), int(_is_finite(t)))]
            gather = self._replicas.all_gather if self.everyone else self._replicas.all_gather_peers
            rows = gather(mine, dtype=torch.int64) if mine else []
            members = self._replicas.members if self.everyone else 1
            sent = 8 * len(mine)
            differing: list[int] = []
            for i in range(len(plan.constant)):
                column = [(row[2 * i], row[2 * i + 1]) for row in rows]
                if len({bits for bits, _ in column}) > 1:
                    differing.append(i)
                    excluded |= {i // members for i, (_, finite) in enumerate(column) if not finite}
            plan.moving, plan.moving_buckets = tuple(differing), self._fill([plan.constant[i] for i in differing])
            if self._replicas.members > 1:  # each knows what its peers hold, and all must leave out the same replicas
                flags = [float(replica in excluded) for replica in range(self._replicas.size)]
                everyone = self._replicas.all_gather(flags)
                excluded = {replica for row in everyone for replica, flag in enumerate(row) if flag}
        if len(excluded) == self._replicas.size:
            raise DivergedError(
                f"All {self._replicas.size} replicas hold non-finite values: the learning rate is too high or the data "
                "is bad. Restore the last checkpoint and lower max_lr."
            )
        return plan.buckets, plan.moving_buckets, tuple(sorted(excluded)), sent


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex()):  # float8 cannot tell
        return True
    return bool(tensor.isfinite().all())
