"""Publishing reports: completed by what all replicas measured, then handed to every monitor."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hdet.converge.pending import Averaged
from hdet.monitor.base import Monitor
from hdet.monitor.report import Converged, Report
from hdet.replicas.agreement import Term
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")


class Publisher:
    """The monitors of an ensemble.

    Args:
        monitors: of this rank.
        replicas: who takes part.
    """

    def __init__(self, monitors: Sequence[Monitor], replicas: Replicas) -> None:
        self._monitors, self._replicas = tuple(monitors), replicas
        self._nonfinite: tuple[str, ...] = ()  # at the last converge

    def terms(self) -> dict[str, Term]:
        """Whether this rank has a monitor."""
        return {"monitored": Term(float(bool(self._monitors)), max)}

    @staticmethod
    def is_watched(told: Sequence[Mapping[str, float]]) -> bool:
        """Whether any rank has one: then all of them measure."""
        return any(one["monitored"] for one in told)

    def start(self, settings: Mapping[str, Any], step: int) -> None:
        """The run begins, or goes on, at ``step``."""
        for monitor in self._monitors:
            monitor.start(settings, writer=self._replicas.writer, step=step)

    def publish(self, report: Report, averaged: Averaged, *, watched: bool, shards: bool, seconds: float) -> Report:
        """Complete ``report`` and hand it out. Collective if it is ``watched``.

        Args:
            report: without what the average did.
            averaged: that.
            watched: whether any rank has a monitor.
            shards: whether the members of a replica hold different parts of it.
            seconds: that it took.
        """
        distances: tuple[float, ...] = ()
        if watched:
            rows = self._replicas.by_replica(self._replicas.all_gather([averaged.squared_distance]))
            copies = 1 if shards else self._replicas.members  # shards' squares add up, copies' are equal
            distances = tuple(math.sqrt(sum(row[0] for row in of) / copies) for of in rows)
        if averaged.excluded and self._replicas.writer:
            logger.warning(
                f"Step {report.step}: not finite on replica {', '.join(map(str, averaged.excluded))}: left out of the "
                "average, and healed from the others, parameters and optimizer state."
            )
        if averaged.nonfinite and averaged.nonfinite != self._nonfinite and self._replicas.writer:
            logger.warning(
                f"Step {report.step}: {' and '.join(averaged.nonfinite)} not finite on any replica. It was left as it "
                "is. With auto_lr=True and rollback=True the round is undone; else restore an earlier checkpoint."
            )
        self._nonfinite = averaged.nonfinite
        if averaged.rescaled and self._replicas.writer:
            logger.warning(
                f"Step {report.step}: the replicas' values are so large that their sum may overflow. They were "
                "averaged in a smaller scale. The run may have blown up: look at the loss, and lower max_lr."
            )
        report = report.with_converged(
            Converged(distances, averaged.excluded, averaged.bytes, seconds, averaged.nonfinite, averaged.rescaled)
        )
        for monitor in self._monitors:
            monitor.report(report)
        return report
