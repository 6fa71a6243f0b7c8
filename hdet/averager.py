"""Converge: the replicas' parameters and buffers become their mean, in place, and are bitwise equal afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hdet.agreement import digest
from hdet.anchors import Anchors
from hdet.buckets import Bucket, fill_buckets
from hdet.errors import DivergedError
from hdet.letter import Letter
from hdet.replicas import Replicas
from hdet.weights import Weights

# Multipliers (of splitmix64 and MurmurHash3) that tell positions in a fingerprint apart.
_COLUMN, _ROW = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64
_SMALL = 2**16
"""Bytes of a tensor up to which it is cheaper copied than hashed by itself."""


_Signature = tuple[list[int], list[int], list[bool]]


class Averaged(NamedTuple):
    """What one average did."""

    squared_distance: float
    """Of this replica from the mean, before averaging."""
    excluded: tuple[int, ...]
    """Replicas left out because they held a non-finite value."""
    bytes: int
    """Bytes this rank handed to collectives."""
    points: list[Point] | None = None
    """Where this replica stood, if that was asked for."""


class Point(NamedTuple):
    """Where a replica stood in one bucket when it was averaged; flat, in the order of the bucket's wire."""

    bucket: Bucket
    mean: Tensor
    """``m``, as the bucket's pieces now hold it but for their rounding."""
    displacement: Tensor
    """``theta_r - m``; zero for a replica that was left out."""


class SlowAverage:
    """Two averages of the means ``m`` over the rounds, one trailing the other; both are ``m`` at the first. In round
    ``n``::

        w = (power + 1) / (power + n)
        e <- e + w (m - e)        the slow average
        f <- f + w (e - f)        its trail

    So ``e`` weighs round ``t`` by about ``t**power`` (polynomial-decay averaging: Shamir and Zhang 2013, arXiv
    1212.1824), and looks back over the same share of the run at any time. Where ``m`` moves steadily, ``e - f`` is
    :attr:`lag` rounds of progress, without the noise of any one. They lie like the buckets of the trainable parameters,
    each rank its own part, and move in the pass that writes the mean.

    Args:
        power: >= 0; 0 is the plain average over all rounds, a larger one forgets sooner.
        dtype: in which they are kept; ``None`` for the wire's (fp32 for all but fp64 parameters).
        device: where they are kept; ``None`` for the parameters'.
    """

    def __init__(self, power: float, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.power, self.dtype, self.device = power, dtype, device
        self.rounds = 0
        """``n``: means averaged so far."""
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def lag(self) -> float:
        """Rounds from the trail to the slow average, ``(n - 1) (power + 1) / (power + 2)**2``; at the first, where both
        are the same, as at the second."""
        return max(1, self.rounds - 1) * (self.power + 1) / (self.power + 2) ** 2

    def restart(self) -> None:
        """Begin again at the next mean."""
        self.rounds, self._parts = 0, []

    def unpack(self, index: int, bucket: Bucket, wire: Tensor, count: int, anchor: Tensor | None = None) -> Tensor:
        """``bucket.unpack(wire, count, anchor=anchor)``, and move bucket ``index``'s part towards the mean. A round
        begins with bucket 0."""
        if index == 0:
            self.rounds += 1
        if index == len(self._parts):
            slow = torch.empty_like(wire, dtype=bucket.dtype)
            distance = bucket.unpack(wire, count, slow, anchor=anchor)
            kept = slow.to(self.device or wire.device, self.dtype or wire.dtype)
            self._parts.append((kept, kept.clone()))
            return distance
        kept, trail = self._parts[index]
        if kept.shape != wire.shape:
            raise RuntimeError(
                "The trainable parameters changed since the probe's slow average began. Freeze and release layers "
                "before the scheduler is built."
            )
        slow = kept.to(wire.device, bucket.dtype)
        weight = (self.power + 1) / (self.power + self.rounds)
        distance = bucket.unpack(wire, count, slow, 1 - weight, anchor)
        if slow is kept:
            trail.lerp_(kept, weight)
        else:
            behind = trail.to(wire.device, bucket.dtype).lerp_(slow, weight)
            random = torch.Generator(wire.device).manual_seed(self.rounds * 2**16 + index)
            kept.copy_(_rounded(slow, kept.dtype, random))
            trail.copy_(_rounded(behind, trail.dtype, random))
        return distance

    def point(self, index: int, distance: float, like: Tensor, shares: Sequence[tuple[int, float]] = ()) -> Tensor:
        """``e + distance (e - f)`` in bucket ``index``, on the device and in the dtype of ``like``.

        Args:
            shares: (number of elements, share) from the bucket's first element to its last: how far to go in each.
        """
        slow, trail = (part.to(like.device, like.dtype) for part in self._parts[index])
        progress = slow - trail
        if shares:
            for part, (_, share) in zip(progress.split([count for count, _ in shares]), shares, strict=True):
                part.mul_(share)
        return torch.add(slow, progress, alpha=distance)

    def mirrored(self, index: int, mean: Tensor) -> Tensor:
        """``e - (m - e)`` in bucket ``index``: the mean's mirror image in the slow average."""
        slow, _ = self._parts[index]
        return slow.to(mean.device, mean.dtype).mul(2).sub_(mean)

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """What must be saved: both averages, by bucket."""
        return list(self._parts)

    def load(self, state: Iterable[Sequence[Tensor]], rounds: int) -> None:
        """Continue from a saved :meth:`state`, cut into the same buckets, after as many ``rounds``."""
        self.rounds = rounds
        self._parts = [
            (
                slow.clone().to(self.device or slow.device, self.dtype or slow.dtype),
                trail.clone().to(self.device or slow.device, self.dtype or slow.dtype),
            )
            for slow, trail in state
        ]


def _rounded(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """``x`` in ``dtype``; if that is less precise than fp32, rounded up or down at random, right on average. Steps of
    an average over hundreds of rounds are smaller than half a bf16 digit, and would be lost."""
    digits = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))
    if digits <= 0:
        return x.to(dtype)
    bits = x.float().view(torch.int32)
    noise = torch.randint(2**digits, bits.shape, generator=random, dtype=torch.int32, device=x.device)
    return bits.add(noise).bitwise_and_(-(2**digits)).view(torch.float32).to(dtype)


class Inspection(NamedTuple):
    """A replica's model in three numbers, each below ``2**53``."""

    layout: int
    """Hash of what will be averaged, equal on two ranks whose models match: shapes, dtypes, strides."""
    finite: bool
    """Whether all trainable parameters are finite, on every member of the replica once its members have been heard."""
    constants: int
    """Hash of the bits of frozen parameters and buffers that are thought to be equal; the same."""


@dataclass
class _Plan:
    """What to average and through which buckets, as long as the tensors stay where they are."""

    signature: _Signature
    tensors: list[Tensor]
    """Kept alive, so that no other tensor can have the same id."""
    trained: list[Tensor]
    """Trainable ones among them."""
    constant: list[Tensor]
    """Frozen parameters and buffers, each once."""
    buckets: list[Bucket]
    """Of the trainable parameters."""
    layout: int
    moving: tuple[int, ...] = ()
    """Which of ``constant`` differed when they were last compared: BatchNorm's statistics. Taken to differ again."""
    moving_buckets: list[Bucket] = field(default_factory=list)


@dataclass
class _Flight:
    """A bucket on its way."""

    bucket: Bucket
    wire: Tensor
    work: dist.Work | None
    count: int
    """Replicas that contribute to a mean; 0 for a maximum."""
    snapshot: Tensor | None = None
    """What the replica had sent, where that is needed later."""
    index: int | None = None
    """Of the bucket among those of the trainable parameters."""
    anchor: Tensor | None = None
    """From which the wire holds the differences."""

    def arrive(self) -> None:
        """Wait until the wire holds the sum or maximum."""
        if self.work is not None:
            self.work.wait()


class Pending:
    """An average whose snapshot has been sent and whose correction has not been applied."""

    def __init__(
        self, flights: list[_Flight], weights: Weights, replicas: Replicas, excluded: tuple[int, ...], sent: int = 0
    ) -> None:
        self._flights, self._weights, self._replicas = flights, weights, replicas
        self._excluded, self._sent = excluded, sent

    @torch.no_grad()
    def finish(self) -> Averaged:
        r"""Wait for the mean and apply ``theta <- theta + (mean(snapshot) - snapshot)``, on all replicas at one step.

        Exact in this sense: it takes out all of the replicas' divergence up to the snapshot, and none of what they
        have done since. Called at once after :meth:`Averager.start`, it is :meth:`Averager.average` up to rounding. A
        replica that was left out has nothing of its own worth keeping, and becomes the mean of the others.
        """
        squares = []
        for flight in self._flights:
            flight.arrive()
            assert flight.snapshot is not None
            if self._replicas.rank in self._excluded:
                flight.bucket.unpack(flight.wire, flight.count or 1)
                continue
            mean = flight.wire.div_(flight.count) if flight.count else flight.wire
            correction = mean.sub_(flight.snapshot)
            if flight.count:
                squares.append(torch.linalg.vector_norm(correction, dtype=torch.float64).square_())
            flight.bucket.add(correction)
        if self._flights:
            self._weights.written()
        self._flights = []
        return Averaged(_total(squares), self._excluded, self._sent)


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
        wire_dtype: bf16 for trainable parameters to travel as differences: see :mod:`hdet.anchors`.
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
        self._letter: Letter | None = None
        self._numbers = 0  # that each rank has to say
        self._has_packed = False  # the first bucket of the plan into the letter
        self._has_arrived = False  # it has been added up
        self._anchors = Anchors(wire_dtype if replicas.size > 1 else None)
        self._is_idle = replicas.size == 1 and not has_virtual
        self._plan: _Plan | None = None
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
        self._has_packed = self._letter is not None and self._fits(self._letter, plan)
        if self._letter is not None and self._has_packed:
            finite = not buckets[0].pack_counted(self._letter.wire, self._anchors.of(plan.layout, 0))[1]
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
        letter, self._numbers = self._letter, len(numbers)
        if letter is None:
            return self._replicas.all_gather(numbers)
        letter.write(numbers)
        work = self._replicas.all_reduce(letter.memory, dist.ReduceOp.SUM)
        if work is not None:
            work.wait()
        self._has_arrived = self._has_packed
        return letter.read()

    def version(self) -> int:
        """A number that grows whenever a trained tensor is written in place. Not collective."""
        return sum([t._version for t in (self._plan or self._current_plan()).trained])

    def restart(self) -> None:
        """The model may be another from here on. On every replica, or on none."""
        self._plan = None
        self._anchors.drop()

    @torch.no_grad()
    def moved_on(self) -> None:
        """The replicas went on from the mean together, to where they are now."""
        if self._plan is not None:
            self._anchors.set(self._plan.layout, self._plan.buckets)

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

        def land(flight: _Flight) -> None:
            squares.append(self._land(flight, slow))
            if flight.snapshot is not None:
                points.append(self._point(flight, excluded))

        has_arrived, self._has_arrived = self._has_arrived and not excluded, False
        letter = self._current_letter()
        layout = self._plan.layout
        flying: _Flight | None = None
        for i, bucket in enumerate(trained + differing):
            is_trained = i < len(trained)
            keep = keep_points and is_trained and bucket.dtype.is_floating_point
            snapshot = bucket.pack() if keep else None
            anchor = self._anchors.of(layout, i) if is_trained else None
            if i == 0 and letter is not None:
                if has_arrived:
                    started = _Flight(bucket, letter.wire, None, self._count(excluded), snapshot)
                else:
                    bucket.pack(letter.wire, anchor)
                    started = self._launch(bucket, excluded, letter.wire, snapshot, letter.memory)
            elif anchor is not None:
                wire = bucket.pack(self._wire(bucket, i % 2, self._anchors.dtype), anchor)
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
        self._anchors.keep(layout, trained)
        self._current_letter()  # the next one's
        return Averaged(_total(squares), excluded, sent, points)

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
    ) -> _Flight:
        """Send the wire, or the ``memory`` that it lies in."""
        is_mean = bucket.dtype.is_floating_point
        if self._replicas.rank in excluded:
            wire.fill_(0 if is_mean else torch.iinfo(bucket.dtype).min)
        op = dist.ReduceOp.SUM if is_mean else dist.ReduceOp.MAX
        work = self._replicas.all_reduce(wire if memory is None else memory, op, everyone=self.everyone)
        return _Flight(bucket, wire, work, self._count(excluded) if is_mean else 0, snapshot)

    def _count(self, excluded: tuple[int, ...]) -> int:
        """How many wires make a mean."""
        return (self._replicas.size - len(excluded)) * (self._replicas.members if self.everyone else 1)

    def _land(self, flight: _Flight, slow: SlowAverage | None) -> Tensor:
        flight.arrive()
        if slow is None or flight.index is None:
            return flight.bucket.unpack(flight.wire, flight.count or 1, anchor=flight.anchor)
        return slow.unpack(flight.index, flight.bucket, flight.wire, flight.count, flight.anchor)

    def _point(self, flight: _Flight, excluded: tuple[int, ...]) -> Point:
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

    def _fits(self, letter: Letter, plan: _Plan) -> bool:
        """Whether the plan's first bucket can travel in it."""
        return letter.layout == plan.layout and letter.wire.dtype == self._first_dtype(plan)

    def _first_dtype(self, plan: _Plan) -> torch.dtype:
        anchored = self._anchors.of(plan.layout, 0) is not None
        return self._anchors.dtype if anchored and self._anchors.dtype else plan.buckets[0].dtype

    def _current_letter(self) -> Letter | None:
        """In which the first bucket of the plan travels, now that the replicas agree on it.

        At the first average too, when it holds nothing else: a backend's order of summation may depend on a message's
        size, and a resumed run must be the uninterrupted one bit for bit."""
        plan = self._plan
        assert plan is not None
        if self._letter is None or not self._fits(self._letter, plan):
            self._letter = None
            self._wires.clear()
            numbers, ranks = self._numbers, self._replicas.size
            # Among very many what all say is better gathered than added up.
            if self._rides and plan.buckets and 0 < 64 * ranks * numbers <= self._bucket_bytes:
                first = plan.buckets[0]
                wire = torch.empty(first.numel, dtype=self._first_dtype(plan), device=first.device)
                self._letter = Letter(plan.layout, wire, ranks, self._replicas.rank, numbers)
                self._wires[first.device, wire.dtype, 0] = self._letter.memory
        return self._letter

    def _current_plan(self) -> _Plan:
        """The plan, made anew if a tensor is another, lies elsewhere, or was frozen or released since."""
        kinds = list(self._weights.tensors())
        signature = (
            [id(t) for t, _ in kinds],
            [t.data_ptr() for t, _ in kinds],
            [trained for _, trained in kinds],
        )
        if self._plan is None or self._plan.signature != signature:
            self._plan = self._make_plan(kinds, signature)
        return self._plan

    def _make_plan(self, kinds: list[tuple[Tensor, bool]], signature: _Signature) -> _Plan:
        """Each tensor once, in the same order on every rank."""
        seen: set[object] = set()
        trained: list[Tensor] = []
        constant: list[Tensor] = []
        for tensor, is_trained in kinds:
            # Two tensor objects over the same memory are one tensor; an empty one has no memory to share.
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.numel() == 0 or key in seen:
                continue
            seen.add(key)
            (trained if is_trained else constant).append(tensor)
        facts = [[(tuple(t.shape), t.stride(), str(t.dtype)) for t in kind] for kind in (trained, constant)]
        tensors, versioned = [t for t, _ in kinds], [t for t, is_trained in kinds if is_trained]
        return _Plan(signature, tensors, versioned, constant, self._fill(trained), digest(facts))

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


def _total(squares: list[Tensor]) -> float:
    return sum(square.item() for square in squares)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex()):  # float8 cannot tell
        return True
    return bool(tensor.isfinite().all())


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, by value and position: changing any one element always changes it.

    ``sum_ij bits_ij * (c_j + r_i) mod 2**64`` over rows ``i`` and columns ``j``; every ``c_j + r_i`` is odd, and so
    invertible.
    """
    octets = _octets(tensor)
    if octets.storage_offset() % 8:  # the words must lie alike on all ranks
        octets = octets.clone()
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    bits = octets.view(words[math.gcd(octets.numel(), 8)])
    width = min(bits.numel(), 4096)
    body = bits.numel() // width * width
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for rows in (bits[:body].view(-1, width), bits[body:].view(1, -1)):
        total += _mix(rows.sum(0, dtype=torch.int64), _COLUMN, 1) + _mix(rows.sum(1, dtype=torch.int64), _ROW, 0)
    return int(total)


def fingerprint_all(tensors: Sequence[Tensor]) -> list[int]:
    """Of many tensors: of each large one, and of the small ones laid end to end."""
    small: dict[torch.device, list[Tensor]] = {}
    found = []
    for tensor in tensors:
        if tensor.nbytes <= _SMALL:
            small.setdefault(tensor.device, []).append(_octets(tensor))
        else:
            found.append(fingerprint(tensor))
    return found + [fingerprint(torch.cat(octets)) for octets in small.values()]


def _octets(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).reshape(-1)


def _mix(sums: Tensor, multiplier: int, parity: int) -> Tensor:
    weights = torch.arange(1, sums.numel() + 1, device=sums.device).mul_(multiplier)
    return (sums * weights.mul_(2).add_(parity)).sum()
