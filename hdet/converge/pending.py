"""What an average returns, and the all-reduces it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.model.weights import Weights
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
    count: int
    """Wires that are summed for a mean; 0 for a maximum."""
    snapshot: Tensor | None = None
    """A copy of this rank's wire before reducing, where it is needed later."""
    index: int | None = None
    """The bucket's index among those of the trainable parameters; ``None`` if it has no slow average."""
    anchor: Tensor | None = None
    """What was subtracted from the wire; see :mod:`hdet.converge.delta`."""

    def wait(self) -> None:
        """Wait until the wire holds the sum or maximum."""
        if self.work is not None:
            self.work.wait()


class Pending:
    """An average whose snapshots have been sent and whose corrections have not been applied.

    Args:
        flights: all buckets.
        weights: told when they have been written.
        replicas: the group.
        excluded: replicas with non-finite values.
        sent: bytes this rank has sent.
    """

    def __init__(
        self, flights: list[InFlight], weights: Weights, replicas: Replicas, excluded: tuple[int, ...], sent: int = 0
    ) -> None:
        self._in_flight, self._weights, self._replicas = flights, weights, replicas
        self._excluded, self._sent = excluded, sent

    @torch.no_grad()
    def finish(self) -> Averaged:
        r"""Wait for the mean and apply ``theta <- theta + (mean(snapshot) - snapshot)``, on all replicas at one step.

        It removes all divergence up to the snapshot and keeps all updates since. Called at once after
        :meth:`Averager.start`, it equals :meth:`Averager.average` up to rounding. An excluded replica gets the mean
        itself, and loses its updates since.
        """
        squares = []
        for flight in self._in_flight:
            flight.wait()
            assert flight.snapshot is not None
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
        return Averaged(total(squares), self._excluded, self._sent)


def total(squares: list[Tensor]) -> float:
    """Their sum. Waits for the device."""
    return sum(square.item() for square in squares)
