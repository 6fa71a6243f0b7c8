"""The paired probe over all replicas: each evaluates its own points, and every rank gets the losses of all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.explore.virtual import VirtualReplicas
from hdet.model.weights import Weights, groups_of
from hdet.observe.probe import Probe, ProbeBatches, evaluate, losses_by_point
from hdet.observe.slopes import ProbeLosses
from hdet.replicas.topology import Replicas


class PairedProbe:
    """Runs the paired probe (:mod:`hdet.observe.probe`).

    Args:
        probe: its settings.
        slow: the slow average, which converging updates.
        models, weights, optimizer: what is probed.
        replicas: who takes part.
        virtual: this process's virtual replicas, if it has any.
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
        self._per_process = 1 if virtual is None else virtual.count
        self.batches = ProbeBatches(probe, round_length)
        """What it is evaluated on."""

    def evaluate(
        self,
        points: Sequence[Point],
        directions: Sequence[Sequence[float]],
        settings: Iterable[AbstractContextManager[None]],
    ) -> ProbeLosses:
        """Every replica's losses in the round that ended. Collective.

        Args:
            points: by bucket, the replicas' mean and this replica's displacement from it.
            directions: [parameter group, or one for all][replica] how far each goes along the slow average's progress.
            settings: entered meanwhile, so that replicas differ in their parameters only.

        Raises:
            Exception: what the loss function or the data loader raised; on the other ranks a ``RuntimeError`` that
                names the replica.
        """
        has_members = self._replicas.members > 1
        failure: Exception | None = None
        size = len(ProbeLosses._fields)
        losses: list[tuple[float, ...]] = [(math.nan,) * size] * self._per_process
        try:
            batches = [self.batches.next() for _ in range(self._per_process)]
        except Exception as error:
            failure = error
        # Members go through a sharded model's forward pass together, or not at all.
        if not (any(row[0] for row in self._replicas.all_gather([failure is not None])) if has_members else failure):
            try:
                with contextlib.ExitStack() as stack:
                    for setting in settings:
                        stack.enter_context(setting)
                    losses = [self._evaluate_one(points, directions, k, batch) for k, batch in enumerate(batches)]
            except Exception as error:
                failure = error
        rows = self._replicas.all_gather([float(failure is not None), *(loss for own in losses for loss in own)])
        if failure is not None:
            raise failure
        if failed := [self._replicas.name_of(i) for i, row in enumerate(rows) if row[0]]:
            raise RuntimeError(f"The probe's loss function failed on {', '.join(failed)}: see there.")
        means = [[sum(x) / len(x) for x in zip(*of, strict=True)][1:] for of in self._replicas.by_replica(rows)]
        return losses_by_point([mean[size * k : size * (k + 1)] for mean in means for k in range(self._per_process)])

    def _evaluate_one(
        self, points: Sequence[Point], directions: Sequence[Sequence[float]], k: int, batch: Any
    ) -> tuple[float, ...]:
        if self._virtual is not None:
            with self._virtual.at(k):
                for point in points:
                    point.bucket.pack(point.displacement)
                    point.displacement.sub_(point.mean)
        shares = None
        if len(directions) > 1:
            own = self._replicas.rank * self._per_process + k
            shares = self._shares(points, [column[own] for column in directions])
        return evaluate(
            self._models,
            self._probe.loss_fn,
            batch,
            points,
            self._slow,
            self._weights,
            shares=shares,
            to_the_end=self._replicas.members > 1,
        )

    def _shares(self, points: Sequence[Point], by_group: Sequence[float]) -> list[list[tuple[int, float]]]:
        """By bucket, (elements, share) of each of its pieces: the share is that of its parameter group."""
        # A piece that no optimizer trains has made no progress, so that its share does not matter.
        shares = [*by_group, 0.0]
        return [
            [
                (piece.numel(), shares[group])
                for piece, group in zip(pieces, groups_of(pieces, self._optimizer), strict=True)
            ]
            for pieces in (point.bucket.pieces for point in points)
        ]
