"""Converge: the replicas' parameters and buffers become their mean, in place, and are bitwise equal afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hdet.converge.buckets import Bucket, fill_buckets
from hdet.converge.comparison import compare_untrained
from hdet.converge.delta import DeltaReference
from hdet.converge.finiteness import Design
from hdet.converge.pending import Averaged, InFlight, Pending, Point, smaller_scale, total
from hdet.converge.plan import Plan, make_plan, signature_of
from hdet.converge.slow_average import SlowAverage
from hdet.converge.wire_memory import WireMemory
from hdet.errors import DivergedError
from hdet.model.fingerprint import fingerprint_all
from hdet.model.weights import Weights
from hdet.replicas.agreement import digest
from hdet.replicas.topology import Replicas

LARGE = 0.5
"""Between finite and not: see :class:`Inspection`."""


class Inspection(NamedTuple):
    """A replica's model in three numbers, which replicas exchange; each below ``2**53``."""

    layout: int
    """Hash of the tensors' shapes, dtypes and strides, which must be equal on all replicas."""
    finite: float
    """1 if all trainable parameters are finite, 0 if one is not, and :data:`LARGE` if they are, but so large that the
    sum over the replicas may overflow. Once gathered, the least of the replica's members."""
    untrained: int
    """Hash of the bits of the frozen parameters and buffers that were equal so far. Once gathered, of all members'."""
    untrained_finite: bool = True
    """Whether the frozen parameters and buffers are finite, but for what is infinite by design
    (:mod:`hdet.converge.finiteness`); on every member."""


class Averager:
    r"""Averages a model over the replicas: ``theta <- (1/N) sum_r theta_r``.

    Trainable parameters are always averaged. Frozen parameters and buffers are first compared by a fingerprint of their
    bits and, where all replicas agree, left alone: constants stay exactly as they are and cost no traffic. Those that
    once differed are averaged from then on without comparing. Integer buffers that differ become their maximum.

    Sums are taken in fp32 (fp64 for fp64 tensors). Extra memory is two buckets, not a copy of the model: while one is
    being reduced the next is packed. A replica with a non-finite value contributes nothing and receives the mean. Where
    a sum of finite values could overflow it is taken in a smaller scale. Of buffers that are infinite by design the
    finite elements are averaged, each over the replicas that have one.

    From the second average on the first bucket is reduced together with the numbers that the ranks exchange
    (:meth:`gather`). If these say that a replica is not finite, or too large, or that the replicas do not agree, the
    result is not used.

    Args:
        weights: what is averaged; tied tensors once.
        replicas: the group.
        bucket_bytes: size of one bucket.
        wire_dtype: bf16 to send trainable parameters as differences: see :mod:`hdet.converge.delta`.
        piggyback: whether the first bucket may be sent with :meth:`gather`. Not with :meth:`start`, which sends all.
        has_virtual: whether even a single process holds several replicas. Their mean is what its parameters are, but
            it must be finite, and slow averages follow it.
        watches: whether :meth:`inspect` reads the model of a single replica too.
    """

    def __init__(
        self,
        weights: Weights,
        replicas: Replicas,
        bucket_bytes: int,
        *,
        wire_dtype: torch.dtype | None = None,
        piggyback: bool = True,
        has_virtual: bool = False,
        watches: bool = False,
    ) -> None:
        self._weights, self._replicas, self._bucket_bytes = weights, replicas, bucket_bytes
        self._reference = DeltaReference(wire_dtype if replicas.size > 1 else None)
        # With several members the numbers go to all ranks, and a bucket to the peers alone: two groups, two messages.
        may_piggyback = piggyback and replicas.size > 1 and replicas.members == 1
        self._memory = WireMemory(replicas, bucket_bytes, self._reference, may_piggyback=may_piggyback)
        self._numbers = 0  # that each rank passes to gather()
        self._is_first_packed = False  # inspect() has packed the first bucket into the piggyback
        self._is_first_reduced = False  # gather() has reduced it
        self._is_idle = replicas.size == 1 and not has_virtual
        self._inspects = watches or not self._is_idle
        self._design = Design()
        self._plan: Plan | None = None
        # Where the members of a replica hold copies, averages over all ranks keep these equal.
        self.all_ranks = replicas.members > 1 and replicas.members_are_copies and weights.whole
        """Whether averages are over all ranks, not only over those that hold the same part of each replica."""

    @torch.no_grad()
    def inspect(self) -> Inspection:
        """What this rank tells the others before an average. Not collective."""
        if not self._inspects:
            return Inspection(0, 1.0, 0)
        plan = self._current_plan()
        self._is_first_reduced = False
        buckets, fits = plan.buckets, True
        piggyback = self._memory.piggyback
        self._is_first_packed = self._memory.fits(plan)
        if piggyback is not None and self._is_first_packed:
            first, *buckets = buckets
            anchor = self._reference.of(plan.layout, 0)
            fits = not first.pack_counted(piggyback.wire, anchor, limit=first.limit(self._ranks))[1]
        fits = fits and all(bucket.is_finite(bucket.limit(self._ranks)) for bucket in buckets)
        finite = 1.0 if fits else LARGE if all(bucket.is_finite() for bucket in plan.buckets) else 0.0
        untrained = list(zip(plan.positions, plan.untrained, strict=True))
        equal = [own for i, own in enumerate(untrained) if i not in plan.differing]
        hashes = fingerprint_all([t for _, t in equal])
        is_good = self._design.allows_all(equal, hashes)
        if not self._design.allows_all([untrained[i] for i in plan.differing]):
            return Inspection(plan.layout, finite, -1 - self._replicas.rank, False)  # unequal: all are compared
        return Inspection(plan.layout, finite, digest((plan.differing, hashes)), is_good)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's ``numbers``, replica by replica, as :meth:`Replicas.all_gather` returns them. Collective, after
        :meth:`inspect`. From the second average on it also reduces the first bucket."""
        piggyback, self._numbers = self._memory.piggyback, len(numbers)
        if piggyback is None:
            return self._replicas.all_gather(numbers)
        piggyback.write(numbers)
        work = self._replicas.all_reduce(piggyback.memory, dist.ReduceOp.SUM)
        self._replicas.wait(work)
        self._is_first_reduced = self._is_first_packed
        return piggyback.read()

    @property
    def sends_differences(self) -> bool:
        """Whether what is sent is compared with a copy of the last mean."""
        return self._reference.dtype is not None

    def version(self) -> int:
        """A number that grows whenever a trained tensor is written in place. Not collective."""
        return sum([t._version for t in (self._plan or self._current_plan()).trained])

    def restart(self) -> None:
        """Forget what is known of the model, since it may have been changed. On all replicas, or on none."""
        self._plan = None
        self._reference.drop()

    def forget(self) -> None:
        """The model was given other weights since the last average: send them as they are. On all replicas, or on none;
        after :meth:`gather`."""
        self._reference.drop()
        self._is_first_reduced = self._is_first_packed = False

    @torch.no_grad()
    def set_reference(self) -> None:
        """The replicas are equal now, though not at the last mean: send differences from here."""
        if self._plan is not None:
            self._reference.set(self._plan.layout, self._plan.buckets)

    @torch.no_grad()
    def average(
        self, inspections: Sequence[Inspection], slow: SlowAverage | None = None, *, return_points: bool = False
    ) -> Averaged:
        """Average now. Collective: every replica must call it, with the same layout.

        Args:
            inspections: every replica's :meth:`inspect`, by replica.
            slow: moved towards the mean, in the pass that writes it.
            return_points: return this replica's :class:`Point` in every bucket: memory for two copies of the
                parameters.

        Raises:
            DivergedError: on every replica, with nothing changed, if none of them is finite.
        """
        if self._is_idle:
            return Averaged(0.0, (), 0)
        plan, excluded, sent = self._compare(inspections)
        squares: list[Tensor] = []
        points: list[Point] = []
        scale, rescaled = self._scale(inspections)
        if rescaled:
            self._reference.drop()  # a difference of large values may overflow, too

        def finish(flight: InFlight) -> None:
            nonlocal rescaled
            flight.wait()
            if flight.has_overflowed():
                flight, rescaled = self._sum_again(flight, excluded), True
            squares.append(self._write_mean(flight, slow))
            if flight.snapshot is not None:
                points.append(self._point_of(flight, excluded))

        is_first_reduced = self._is_first_reduced and not excluded and not rescaled
        self._is_first_reduced = False
        piggyback = self._memory.piggyback_for(plan, self._numbers)
        previous: InFlight | None = None
        for i, bucket in enumerate(plan.buckets + plan.differing_buckets):
            is_trained = i < len(plan.buckets)
            is_float = bucket.dtype.is_floating_point
            snapshot = bucket.pack() if return_points and is_trained and is_float else None
            anchor = self._reference.of(plan.layout, i) if is_trained else None
            if i == 0 and piggyback is not None:
                if is_first_reduced:
                    flight = InFlight(bucket, piggyback.wire, None, self._count(excluded), snapshot)
                else:
                    bucket.pack(piggyback.wire, anchor, scale)
                    flight = self._all_reduce(bucket, excluded, piggyback.wire, snapshot, piggyback.memory, scale)
            elif anchor is not None:
                wire = bucket.pack(self._memory.wire(bucket, i % 2, self._reference.dtype), anchor)
                flight = self._all_reduce(bucket, excluded, wire, snapshot)
            else:  # a point keeps the wire
                wire = bucket.pack(None if return_points else self._memory.wire(bucket, i % 2), scale=scale)
                flight = self._all_reduce(bucket, excluded, wire, snapshot, scale=scale)
                flight.may_overflow = not is_trained
            flight.index = i if is_trained and is_float else None
            flight.anchor = anchor
            sent += flight.wire.nbytes
            if previous:
                finish(previous)
            previous = flight
        if previous:
            finish(previous)
        for tensor in plan.differing_infinite:
            sent += self._average_known(tensor, excluded)
        self._weights.written()
        self._reference.keep(plan.layout, plan.buckets)
        self._memory.piggyback_for(plan, self._numbers)  # from now on the dtype may be that of differences
        return Averaged(total(squares), excluded, sent, points, rescaled)

    @torch.no_grad()
    def start(self, inspections: Sequence[Inspection]) -> Pending:
        """Send a snapshot of the model and return at once; :meth:`Pending.finish` applies its mean later. Collective.

        Args, Raises: as :meth:`average`.
        """
        if self._is_idle:
            return Pending([], self._weights, self._replicas, ())
        plan, excluded, sent = self._compare(inspections)
        scale, rescaled = self._scale(inspections)
        flights = []
        for i, bucket in enumerate(plan.buckets + plan.differing_buckets):
            snapshot = bucket.pack()
            wire = snapshot * scale if scale != 1 and bucket.dtype.is_floating_point else snapshot.clone()
            flight = self._all_reduce(bucket, excluded, wire, snapshot, scale=scale)
            flight.may_overflow = i >= len(plan.buckets)
            flights.append(flight)
            sent += snapshot.nbytes
        for tensor in plan.differing_infinite:
            sent += self._average_known(tensor, excluded)

        def again(bucket: Bucket, snapshot: Tensor, scale: float) -> InFlight:
            return self._all_reduce(bucket, excluded, snapshot * scale, snapshot, scale=scale)

        return Pending(flights, self._weights, self._replicas, excluded, sent, again, rescaled)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Write replica 0's weights into those of the others, in place, bit for bit. Collective."""
        if self._replicas.size == 1:
            return
        plan = self._current_plan()
        for bucket in plan.buckets + self._fill(plan.untrained):
            wire = bucket.pack()
            self._replicas.broadcast(wire)
            if self._replicas.rank:
                bucket.write(wire)
        self._weights.written()

    def buckets(self) -> list[Bucket]:
        """Of the trainable parameters, as :meth:`inspect` found them."""
        return [] if self._plan is None else self._plan.buckets

    def sizes(self) -> list[int] | None:
        """Elements of the buckets of floating-point parameters, with the model as it is now; ``None`` where nothing is
        averaged. Not collective."""
        if self._is_idle:
            return None
        return [bucket.numel for bucket in self._current_plan().buckets if bucket.dtype.is_floating_point]

    def trained(self) -> list[Tensor]:
        """The tensors that are trained now."""
        return self._current_plan().trained

    def _compare(self, inspections: Sequence[Inspection]) -> tuple[Plan, tuple[int, ...], int]:
        """The plan, the replicas to exclude, and the bytes sent to find them. Collective."""
        plan, sent = self._plan, 0
        assert plan is not None  # inspect() has made it
        excluded = {replica for replica, inspection in enumerate(inspections) if not inspection.finite}
        if len({inspection.untrained for inspection in inspections}) > 1:
            excluded, sent = compare_untrained(
                plan, self._replicas, excluded, self._fill, self._design, all_ranks=self.all_ranks
            )
        if len(excluded) == self._replicas.size:
            raise DivergedError(
                f"All {self._replicas.size} replicas hold non-finite values: the learning rate is too high or the data "
                "is bad. Restore the last checkpoint and lower max_lr."
            )
        return plan, tuple(sorted(excluded)), sent

    def _all_reduce(
        self,
        bucket: Bucket,
        excluded: tuple[int, ...],
        wire: Tensor,
        snapshot: Tensor | None = None,
        memory: Tensor | None = None,
        scale: float = 1.0,
    ) -> InFlight:
        """Start reducing the wire, which holds values times ``scale``, or the ``memory`` that contains it."""
        is_mean = bucket.dtype.is_floating_point
        if self._replicas.rank in excluded:
            wire.fill_(0 if is_mean else torch.iinfo(bucket.dtype).min)
        op = dist.ReduceOp.SUM if is_mean else dist.ReduceOp.MAX
        work = self._replicas.all_reduce(wire if memory is None else memory, op, all_ranks=self.all_ranks)
        return InFlight(bucket, wire, work, self._count(excluded) * scale if is_mean else 0, snapshot)

    def _sum_again(self, flight: InFlight, excluded: tuple[int, ...]) -> InFlight:
        """The same sum where it overflowed, of the values as they are, in a smaller scale. Collective."""
        scale = smaller_scale(self._count(excluded))
        wire = flight.bucket.pack(scale=scale)
        again = self._all_reduce(flight.bucket, excluded, wire, flight.snapshot, scale=scale)
        again.index = flight.index
        again.wait()
        return again

    def _average_known(self, tensor: Tensor, excluded: tuple[int, ...]) -> int:
        """Average the finite elements of a tensor that is infinite by design, in place: each over the replicas in which
        it is finite. Where there are none it becomes the maximum. Collective; returns the bytes this rank sent."""
        own = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = own.to(self._replicas.device_for(own), torch.float64)
        known = values.isfinite()
        if is_left_out := self._replicas.rank in excluded:
            known = torch.zeros_like(known)
        sums = torch.stack([values.where(known, 0.0), known.double()])
        largest = torch.full_like(values, -math.inf) if is_left_out else values.where(~known, -math.inf)
        for wire, op in ((sums, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            if (work := self._replicas.all_reduce(wire, op, all_ranks=self.all_ranks)) is not None:
                work.wait()
        total, count = sums
        own.copy_((total / count.clamp(min=1)).where(count > 0, largest))
        return sums.nbytes + largest.nbytes

    def _scale(self, inspections: Sequence[Inspection]) -> tuple[float, bool]:
        """What values are multiplied by before they are summed, and whether that is needed."""
        is_large = any(inspection.finite == LARGE for inspection in inspections)
        return smaller_scale(self._ranks) if is_large else 1.0, is_large

    @property
    def _ranks(self) -> int:
        """How many wires are summed at most."""
        return self._count(())

    def _count(self, excluded: tuple[int, ...]) -> int:
        """How many wires are summed for a mean."""
        return (self._replicas.size - len(excluded)) * (self._replicas.members if self.all_ranks else 1)

    def _write_mean(self, flight: InFlight, slow: SlowAverage | None) -> Tensor:
        """Returns this replica's squared distance from the mean in the bucket, before writing."""
        if slow is None or flight.index is None:
            return flight.bucket.unpack(flight.wire, flight.count or 1, anchor=flight.anchor)
        return slow.unpack(flight.index, flight.bucket, flight.wire, flight.count, flight.anchor)

    def _point_of(self, flight: InFlight, excluded: tuple[int, ...]) -> Point:
        assert flight.snapshot is not None
        mean = flight.wire.div_(flight.count) if flight.anchor is None else flight.anchor.clone()
        displacement = flight.snapshot.sub_(mean)
        if self._replicas.rank in excluded:
            displacement.zero_()
        return Point(flight.bucket, mean, displacement)

    def _current_plan(self) -> Plan:
        """The plan, made anew if a tensor is another, lies elsewhere, or was frozen or unfrozen since."""
        kinds = list(self._weights.tensors())
        signature = signature_of(kinds)
        if self._plan is None or self._plan.signature != signature:
            self._plan = make_plan(kinds, signature, self._fill)
            if self._inspects:
                self._design.look(kinds)
        return self._plan

    def _fill(self, tensors: list[Tensor]) -> list[Bucket]:
        return fill_buckets(tensors, self._bucket_bytes, self._replicas.device_for)
