"""By how much a round's loss is above those before, in units of their own spread. Pure functions of plain floats.

A loss has no zero: it may be negative, near 0, or have a large constant, and its unit is arbitrary. With ``high`` and
``low`` the largest and smallest of the earlier rounds' mean losses, and ``s`` the standard deviation of the replicas'
losses within a round, a round of mean loss ``m`` jumps by::

    jump = (m - high) / max(high - low, 4 s)

It does not change if a constant is added to all losses, or if all are multiplied by a positive number. A loss that
rises by design, by as much in every round, jumps by 1, 1/2, 1/3 ... from its third round on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_NOISE = 4.0
"""Standard deviations of the replicas' losses that a range of few rounds is taken to be at least."""


class LossLevel(NamedTuple):
    """The mean losses of the rounds that were not undone."""

    rounds: int = 0
    low: float = math.inf
    high: float = -math.inf
    variance: float = 0.0
    """Of the replicas' losses within a round: the mean over the rounds."""

    def with_round(self, losses: Sequence[float]) -> LossLevel:
        """After one more round of [replica] ``losses``; those that are not finite are left out."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return self
        mean = math.fsum(finite) / len(finite)
        variance = math.fsum((loss - mean) ** 2 for loss in finite) / max(1, len(finite) - 1)
        rounds = self.rounds + 1
        return LossLevel(
            rounds, min(self.low, mean), max(self.high, mean), self.variance + (variance - self.variance) / rounds
        )

    def jump(self, mean: float) -> float:
        """``jump`` of a round with this mean loss; NaN if there was no round before, or all losses were 0.

        Where all losses so far were the same number, and have no spread, it is that number."""
        if not self.rounds:
            return math.nan
        spread = max(self.high - self.low, _NOISE * math.sqrt(self.variance)) or abs(self.high)
        return (mean - self.high) / spread if spread else math.nan
