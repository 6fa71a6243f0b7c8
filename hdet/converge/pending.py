"""What an average is made of while it is under way, and what it returns."""

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


@dataclass
class InFlight:
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
        self, flights: list[InFlight], weights: Weights, replicas: Replicas, excluded: tuple[int, ...], sent: int = 0
    ) -> None:
        self._in_flight, self._weights, self._replicas = flights, weights, replicas
        self._excluded, self._sent = excluded, sent

    @torch.no_grad()
    def finish(self) -> Averaged:
        r"""Wait for the mean and apply ``theta <- theta + (mean(snapshot) - snapshot)``, on all replicas at one step.

        Exact in this sense: it takes out all of the replicas' divergence up to the snapshot, and none of what they
        have done since. Called at once after :meth:`Averager.start`, it is :meth:`Averager.average` up to rounding. A
        replica that was left out has nothing of its own worth keeping, and becomes the mean of the others.
        """
        squares = []
        for flight in self._in_flight:
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
        if self._in_flight:
            self._weights.written()
        self._in_flight = []
        return Averaged(total(squares), self._excluded, self._sent)


def total(squares: list[Tensor]) -> float:
    return sum(square.item() for square in squares)
