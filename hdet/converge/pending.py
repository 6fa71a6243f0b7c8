"""What an average returns, and the all-reduces it waits for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.model.weights import Weights
from hdet.ops import _unchecked as ops
from hdet.replicas.topology import Replicas


class Averaged(NamedTuple):
    """What one average did."""

    squared_distance: float
    """Of this rank's trainable parameters from the mean, before averaging."""
    excluded: tuple[int, ...]
    """Replicas left out because they held a non-finite value."""
    bytes: int
    """Bytes this rank handed to collectives."""
    points: list[Point] | None = None
    """This replica's parameters before averaging, by bucket, if they were asked for."""
    rescaled: bool = False
    """Whether values were so large that their sum could overflow, and was taken in a smaller scale."""
    nonfinite: tuple[str, ...] = ()
    """Kinds of tensors that are finite on no replica: ``buffers``, ``optimizer state``."""


class Point(NamedTuple):
    """A replica's parameters in one bucket just before averaging; flat tensors in the order of the bucket's wire."""

    bucket: Bucket
    mean: Tensor
    """``m``; the bucket's pieces hold it rounded to their own dtype."""
    displacement: Tensor
    """``theta_r - m``; zero for an excluded replica."""


@dataclass
class InFlight:
    """A bucket whose wire is being reduced."""

    bucket: Bucket
    wire: Tensor
    work: dist.Work | None
    """What to wait for; ``None`` if the wire holds the result."""
    count: float
    """What the sum is divided by for a mean: wires that are summed, times their scale; 0 for a maximum."""
    snapshot: Tensor | None = None
    """A copy of this rank's wire before reducing, where it is needed later."""
    index: int | None = None
    """The bucket's index among those of the trainable parameters; ``None`` if it has no slow average."""
    anchor: Tensor | None = None
    """What was subtracted from the wire; see :mod:`hdet.converge.delta`."""
    may_overflow: bool = False
    """Whether nobody has looked how large the values are before they were summed."""

    def wait(self) -> None:
        """Wait until the wire holds the sum or maximum."""
        if self.work is not None:
            self.work.wait()

    def has_overflowed(self) -> bool:
        """Whether the sum, once it is there, is not finite. It has the same bits on all ranks that took part."""
        return self.may_overflow and bool(self.count) and not bool(ops.all_finite([self.wire]))


def smaller_scale(count: float) -> float:
    """A power of two, by which ``count`` finite values are multiplied before a sum that must not overflow."""
    return 2.0 ** -math.ceil(math.log2(count))


class Pending:
    """An average whose snapshots have been sent and whose corrections have not been applied.

    Args:
        flights: all buckets.
        weights: told when they have been written.
        replicas: the group.
        excluded: replicas with non-finite values.
        sent: bytes this rank has sent.
        again: sums a wire of a bucket again, in place, in the scale it is given.
        rescaled: whether values are so large that they were summed in a smaller scale.
    """

    def __init__(
        self,
        flights: list[InFlight],
        weights: Weights,
        replicas: Replicas,
        excluded: tuple[int, ...],
        sent: int = 0,
        again: Callable[[Bucket, Tensor, float], InFlight] | None = None,
        rescaled: bool = False,
    ) -> None:
        self._in_flight, self._weights, self._replicas = flights, weights, replicas
        self._excluded, self._sent, self._again = excluded, sent, again
        self._rescaled = rescaled

    @torch.no_grad()
    def finish(self) -> Averaged:
        r"""Wait for the mean and apply ``theta <- theta + (mean(snapshot) - snapshot)``, on all replicas at one step.

        It removes all divergence up to the snapshot and keeps all updates since. Called at once after
        :meth:`Averager.start`, it equals :meth:`Averager.average` up to rounding. An excluded replica gets the mean
        itself, and loses its updates since.
        """
        squares = []
        rescaled = self._rescaled
        for flight in self._in_flight:
            flight.wait()
            assert flight.snapshot is not None
            if self._again is not None and flight.has_overflowed():
                rescaled = True
                again = self._again(flight.bucket, flight.snapshot, smaller_scale(flight.count))
                again.wait()
                self._finish_in_halves(again)
                continue
            if self._rescaled and flight.count:
                self._finish_in_halves(flight)
                continue
            if self._replicas.rank in self._excluded:
                flight.bucket.unpack(flight.wire, flight.count or 1)
                continue
            mean = flight.wire.div_(flight.count) if flight.count else flight.wire
            correction = mean.sub_(flight.snapshot)
            if flight.count:
                squares.append(torch.linalg.vector_norm(correction, dtype=torch.float64).square_())
            flight.bucket.add(correction)
        if self._in_flight:
            self._weights.written()
        self._in_flight = []
        return Averaged(total(squares), self._excluded, self._sent, rescaled=rescaled)

    def _finish_in_halves(self, flight: InFlight) -> None:
        """Where the sum of the snapshots overflows, the correction may too: apply half of it twice."""
        assert flight.snapshot is not None
        if self._replicas.rank in self._excluded:
            flight.bucket.unpack(flight.wire, flight.count)
            return
        half = flight.wire.div_(flight.count).div_(2).sub_(flight.snapshot.div_(2))
        flight.bucket.add(half)
        flight.bucket.add(half)


def total(squares: list[Tensor]) -> float:
    """Their sum. Waits for the device."""
    return sum(square.item() for square in squares)
