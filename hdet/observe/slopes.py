"""What the paired probe's losses say: slopes over the log learning rate. Pure functions of plain floats, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TOO_LARGE = 1e100
"""A loss whose square would be no number any more is none itself."""


class ProbeLosses(NamedTuple):
    """The paired probe's losses, by replica; :mod:`hdet.observe.probe` says of which points."""

    above: tuple[float, ...]
    below: tuple[float, ...]
    slow_above: tuple[float, ...]
    slow_below: tuple[float, ...]
    mirror: tuple[float, ...]
    far: tuple[float, ...]


class Slopes(NamedTuple):
    """What one probe says, in units of the loss."""

    raw: float
    """``R``: by how much a round at a relatively larger learning rate would have ended lower, per unit of log LR."""
    debiased: float
    """``A``: the same, once the noise of the iterates is averaged out: lasting progress per round."""
    noise: float
    """``E``: how far above the slow average the iterates' noise keeps the loss."""
    further: float
    """``F``: by how much the loss at the far point is above that at ``e + (e - f)``. Below 0, the learning rate is far
    too low. NaN if the far point's loss is not finite."""


UNKNOWN_SLOPES = Slopes(math.nan, math.nan, math.nan, math.nan)


def slopes_of(probe: ProbeLosses, multipliers: tuple[float, ...], lag: float) -> Slopes | None:
    """The slopes that :class:`hdet.steer.TwoSlope` weighs, from the replicas whose losses are finite, ``far`` aside.

    ``None`` if fewer than two are left, or only such as trained at the base learning rate while others did not. If all
    did, the raw slope is NaN."""
    rows = [
        (rho - 1, losses)
        for rho, *losses in zip(multipliers, *probe, strict=True)
        if all(abs(loss) < TOO_LARGE for loss in losses[:-1])
    ]
    spread = math.fsum(abs(z) for z, _ in rows)
    if len(rows) < 2 or (spread == 0 and any(rho != 1 for rho in multipliers)):
        return None
    known = ProbeLosses(*zip(*(losses for _, losses in rows), strict=True))
    pairs = zip(rows, known.above, known.below, strict=True)
    odd = math.fsum((above - below) * ((z > 0) - (z < 0)) / 2 for (z, _), above, below in pairs)
    high, low = mean_of(known.slow_above), mean_of(known.slow_below)
    reached = [far - near for far, near in zip(known.far, known.slow_above, strict=True)]
    return Slopes(
        -odd / spread if spread else math.nan,
        -(high - low) / (2 * lag),
        level_of(known) - (high + low) / 2,
        mean_of(reached) if all(abs(further) < TOO_LARGE for further in reached) else math.nan,
    )


def loss_near(probe: ProbeLosses) -> float:
    """``L``, the loss beside the far point. Where there are slopes, some replicas know it."""
    return mean_of([loss for loss in probe.slow_above if abs(loss) < TOO_LARGE])


def level_of(probe: ProbeLosses) -> float:
    """The mean loss at ``m`` and at its mirror image in the slow average."""
    return (mean_of(probe.above) + mean_of(probe.below)) / 4 + mean_of(probe.mirror) / 2


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
