"""The probe over all replicas: each evaluates its own points, and every rank learns what all found."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.explore.virtual import VirtualReplicas
from hdet.model.weights import Weights, local
from hdet.observe.probe import Batches, Probe, evaluate, gathered
from hdet.observe.slopes import ProbeLosses
from hdet.replicas.topology import Replicas


class PairedProbe:
    """Runs the paired probe (:mod:`hdet.observe.probe`).

    Args:
        probe: how.
        slow: the slow average, which the average moves.
        models, weights, optimizer: what is probed.
        replicas: who takes part.
        virtual: further replicas of this process.
        round_length: steps from one probe to the next.
    """

    def __init__(
        self,
        probe: Probe,
        slow: SlowAverage,
        models: Sequence[nn.Module],
        weights: Weights,
        optimizer: Optimizer,
        replicas: Replicas,
        virtual: VirtualReplicas | None,
        round_length: int,
    ) -> None:
        self._probe, self._slow, self._models, self._weights = probe, slow, models, weights
        self._optimizer, self._replicas, self._virtual = optimizer, replicas, virtual
        self._count = 1 if virtual is None else virtual.count
        self.batches = Batches(probe, round_length)
        """Where its batches come from."""

    def evaluate(
        self,
        points: Sequence[Point],
        directions: Sequence[Sequence[float]],
        reach: float,
        settings: Iterable[AbstractContextManager[None]],
    ) -> ProbeLosses:
        """Every replica's losses in the round that ended. Collective: one that fails tells the others before it raises.

        Args:
            points: where this replica stood, by bucket.
            directions: [parameter group, or one for all][replica] how far each goes along the slow average's progress.
            reach: how far the far point lies.
            settings: what holds while it runs, so that replicas differ in their parameters only.
        """
        together = self._replicas.members > 1
        failure: Exception | None = None
        size = len(ProbeLosses._fields)
        losses: list[tuple[float, ...]] = [(math.nan,) * size] * self._count
        try:
            batches = [self.batches.take() for _ in range(self._count)]
        except Exception as error:
            failure = error
        # Members go through a sharded model's forward pass together, or not at all.
        if not (any(row[0] for row in self._replicas.all_gather([failure is not None])) if together else failure):
            try:
                with contextlib.ExitStack() as stack:
                    for setting in settings:
                        stack.enter_context(setting)
                    losses = [
                        self._evaluate_one(points, directions, reach, k, batch) for k, batch in enumerate(batches)
                    ]
            except Exception as error:
                failure = error
        rows = self._replicas.all_gather([float(failure is not None), *(loss for own in losses for loss in own)])
        if failure is not None:
            raise failure
        if failed := [self._replicas.name_of(i) for i, row in enumerate(rows) if row[0]]:
            raise RuntimeError(f"The probe's loss function failed on {', '.join(failed)}: see there.")
        means = [[sum(x) / len(x) for x in zip(*of, strict=True)][1:] for of in self._replicas.by_replica(rows)]
        return gathered([mean[size * k : size * (k + 1)] for mean in means for k in range(self._count)])

    def _evaluate_one(
        self, points: Sequence[Point], directions: Sequence[Sequence[float]], reach: float, k: int, batch: Any
    ) -> tuple[float, ...]:
        if self._virtual is not None:
            with self._virtual.at(k):
                for point in points:
                    point.bucket.pack(point.displacement)
                    point.displacement.sub_(point.mean)
        shares = None
        if len(directions) > 1:
            own = self._replicas.rank * self._count + k
            shares = self._shares(points, [column[own] for column in directions])
        return evaluate(
            self._models,
            self._probe.loss_fn,
            batch,
            points,
            self._slow,
            self._weights,
            reach=reach,
            shares=shares,
            to_the_end=self._replicas.members > 1,
        )

    def _shares(self, points: Sequence[Point], by_group: Sequence[float]) -> list[list[tuple[int, float]]]:
        """By bucket, how far the probe goes in each piece of it: as far as in its parameter group."""
        spans = sorted(
            (plain.data_ptr(), plain.data_ptr() + plain.nbytes, share)
            for group, share in zip(self._optimizer.param_groups, by_group, strict=True)
            for plain in map(local, group["params"])
            if plain.numel()
        )
        starts = [start for start, _, _ in spans]

        def share_of(piece: Tensor) -> float:
            i = bisect.bisect_right(starts, piece.data_ptr()) - 1
            # What no optimizer moves has made no progress, and any share of it is none.
            return spans[i][2] if i >= 0 and piece.data_ptr() < spans[i][1] else 0.0

        return [[(piece.numel(), share_of(piece)) for piece in point.bucket.pieces] for point in points]
