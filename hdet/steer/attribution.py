"""To which factor the paired probe's losses are due. Pure functions of plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hdet.explore.design import Effect, effects
from hdet.observe.slopes import ProbeLosses, Slopes, level_of, slopes_of


class Attribution(NamedTuple):
    """One probe, divided among the factors."""

    effects: list[Effect]
    """[factor]"""
    probes: list[ProbeLosses | None]
    """[learning rate] the losses as they would be if this learning rate alone differed between the replicas; ``None``
    without a probe, and where this round's levels cannot tell."""
    slopes: Slopes | None
    """Of all learning rates together; ``None`` without a probe, or where its losses were not finite."""


def attribute(
    probe: ProbeLosses | None,
    levels: Sequence[Sequence[float]],
    multipliers: Sequence[tuple[float, ...]],
    directions: Sequence[Sequence[float]],
    lag: float,
) -> Attribution:
    """Divide a probe's losses among the factors.

    Args:
        probe: the losses; ``None`` in a round without a probe.
        levels: [factor][replica]; learning rates first, if they are spread.
        multipliers: [learning rate][replica] ``rho``.
        directions: [learning rate][replica] how far the probe went along the slow average's progress.
        lag: rounds of progress between the slow average and its trail.
    """
    rates = len(multipliers)
    if probe is None:
        return Attribution([Effect(math.nan, math.nan)] * len(levels), [None] * rates, None)
    found = effects(levels, _half_differences(probe.above, probe.below))
    probes: list[ProbeLosses | None] = [_without_others(probe, levels, found, i) for i in range(rates)]
    slopes = slopes_of(probe, multipliers[0], lag)
    if slopes is not None and rates > 1:
        probes, slopes = _divide_progress(probe, probes, multipliers, directions, lag, slopes)
    return Attribution(found, probes, slopes)


def _without_others(
    probe: ProbeLosses, levels: Sequence[Sequence[float]], found: Sequence[Effect], own: int
) -> ProbeLosses:
    """The probe's losses without the effects of all factors but one."""
    if len(levels) == 1:
        return probe
    others = [
        math.fsum(
            levels[h][r] * found[h].value for h in range(len(levels)) if h != own and math.isfinite(found[h].value)
        )
        for r in range(len(probe.above))
    ]
    return probe._replace(
        above=tuple(loss - other for loss, other in zip(probe.above, others, strict=True)),
        below=tuple(loss + other for loss, other in zip(probe.below, others, strict=True)),
    )


def _divide_progress(
    probe: ProbeLosses,
    probes: Sequence[ProbeLosses | None],
    multipliers: Sequence[tuple[float, ...]],
    directions: Sequence[Sequence[float]],
    lag: float,
    together: Slopes,
) -> tuple[list[ProbeLosses | None], Slopes | None]:
    """Give each of several learning rates its own share of the lasting progress, by ``directions``.

    The noise, which nothing divides, is shared equally. Returns the losses by learning rate, and the slopes' sums.
    """
    count, replicas = len(probes), len(probe.above)
    odd = _half_differences(probe.slow_above, probe.slow_below)
    progress = [-effect.value / lag for effect in effects(directions, odd)]
    known = [a for a in progress if math.isfinite(a)]
    debiased = math.fsum(known) * count / max(1, len(known))
    divided: list[ProbeLosses | None] = []
    raws = []
    for own, own_progress, rhos in zip(probes, progress, multipliers, strict=True):
        if own is None or not math.isfinite(own_progress):
            divided.append(None)
            continue
        # The mean of m and its mirror image, less an equal share of what lies between that and the slow average.
        middle = level_of(own) - together.noise / count
        above, below = middle - lag * own_progress, middle + lag * own_progress
        own = own._replace(slow_above=(above,) * replicas, slow_below=(below,) * replicas)
        divided.append(own)
        slopes = slopes_of(own, rhos, lag)
        raws.append(math.nan if slopes is None else slopes.raw)
    if not known:
        return divided, None
    return divided, Slopes(math.fsum(raws) if raws else math.nan, debiased, together.noise)


def _half_differences(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """[replica] ``(above - below) / 2``: what is odd in the displacement."""
    return [(a - b) / 2 for a, b in zip(above, below, strict=True)]
