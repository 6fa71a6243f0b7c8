"""Slopes of the loss over the log learning rate, from the paired probe's losses. Pure functions of plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from hdet.errors import check_instance, check_list, check_number

TOO_LARGE = 1e100
"""Losses from here on count as not finite: their squares could overflow."""


class ProbeLosses(NamedTuple):
    """The paired probe's losses by point, each [replica]; :mod:`hdet.observe.probe` defines the points."""

    above: tuple[float, ...]
    below: tuple[float, ...]
    slow_above: tuple[float, ...]
    slow_below: tuple[float, ...]
    mirror: tuple[float, ...]


class Slopes(NamedTuple):
    """What one probe measures, in units of the loss; NaN where it is not known."""

    raw: float
    """``R``: by how much the loss at the round's end falls per unit of log learning rate."""
    debiased: float
    """``A``: the same without the noise of the iterates: lasting progress per round and unit of log learning rate."""
    noise: float
    """``E``: by how much the iterates' noise raises the loss above that at the slow average."""


UNKNOWN_SLOPES = Slopes(math.nan, math.nan, math.nan)


def slopes_of(probe: ProbeLosses, multipliers: tuple[float, ...], lag: float) -> Slopes | None:
    """The slopes over the replicas whose losses are finite at all points, with ``z_r = rho_r - 1``::

        R = -sum_r(sign(z_r) (above_r - below_r) / 2) / sum_r(|z_r|)
        A = -mean_r(slow_above_r - slow_below_r) / (2 lag)
        E = mean_r((above_r + below_r) / 2 + mirror_r - slow_above_r - slow_below_r) / 2

    Args:
        probe: the losses.
        multipliers: [replica] ``rho``.
        lag: rounds of progress between the slow average and its trail.

    Returns:
        ``None`` if fewer than two replicas are left, or only such as trained at the base learning rate while others did
        not. If all did, ``R`` is NaN.

    Raises:
        TypeError, ValueError: for what are not a number for each replica, or a ``lag`` that is not above 0.
    """
    check_instance("probe", probe, ProbeLosses, "an hdet.controller.ProbeLosses")
    count = len(check_list("probe.above", probe.above, "a number for each replica"))
    multipliers = tuple(check_replicas("multipliers", multipliers, finite=True, length=count))
    check_probe("probe", probe, multipliers, lag)
    rows = [
        (rho - 1, losses)
        for rho, *losses in zip(multipliers, *probe, strict=True)
        if all(abs(loss) < TOO_LARGE for loss in losses)
    ]
    spread = math.fsum(abs(z) for z, _ in rows)
    if len(rows) < 2 or (spread == 0 and any(rho != 1 for rho in multipliers)):
        return None
    known = ProbeLosses(*zip(*(losses for _, losses in rows), strict=True))
    pairs = zip(rows, known.above, known.below, strict=True)
    odd = math.fsum((above - below) * ((z > 0) - (z < 0)) / 2 for (z, _), above, below in pairs)
    high, low = mean_of(known.slow_above), mean_of(known.slow_below)
    return Slopes(
        -odd / spread if spread else math.nan,
        -(high - low) / (2 * lag),
        level_of(known) - (high + low) / 2,
    )


def check_probe(name: str, probe: Any, multipliers: Sequence[float], lag: Any) -> None:
    """Raise TypeError or ValueError unless there is a loss at every point for each of the ``multipliers``."""
    check_instance(name, probe, ProbeLosses, "an hdet.controller.ProbeLosses")
    for point, losses in probe._asdict().items():
        check_replicas(f"{name}.{point}", losses, length=len(multipliers))
    check_number("lag", lag, "> 0 rounds", lambda rounds: rounds > 0)


def check_replicas(name: str, values: Any, *, finite: bool = False, length: int | None = None) -> list[float]:
    """[replica] numbers."""
    rule = "a number for each replica" if length is None else f"a number for each of {length} replicas"
    return [check_number(name, x, rule, finite=finite) for x in check_list(name, values, rule, length=length)]


def level_of(probe: ProbeLosses) -> float:
    """The mean loss at ``m`` and at its mirror image in the slow average."""
    return (mean_of(probe.above) + mean_of(probe.below)) / 4 + mean_of(probe.mirror) / 2


def mean_of(values: Sequence[float]) -> float:
    """Of at least one value."""
    return math.fsum(values) / len(values)
