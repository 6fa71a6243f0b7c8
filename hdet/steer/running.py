"""Running averages of what rounds say, and their errors. Pure functions of plain floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

HUNDREDTH = 0.01
"""Of the run: what averages and steps are counted in."""
FEWEST = 3
"""Rounds before which nothing moves."""
_TINY = 1e-12


class Memory(NamedTuple):
    """Weights of the past, in a running average and in its variance."""

    mean: float
    variance: float
    length: float = 1.0
    """Of a round, in hundredths of the run."""

    def over(self, length: float) -> Memory:
        """The same for rounds of another length."""
        return Memory(self.mean**length, self.variance**length, length)


def remember(
    kept: tuple[float, float], x: float, rounds: int, memory: Memory, lowest: float | None = None
) -> tuple[float, float]:
    """Running average and variance with the latest of ``rounds`` values: both from 0, as in Adam.

    A value further below the average than ``lowest`` standard deviations adds no more to the variance than one there:
    it is not to hide itself."""
    mean, variance = kept
    if rounds > 1:
        away = x - mean / (1 - memory.mean ** (rounds - 1))
        if lowest is not None and rounds > 3:
            away = max(away, -lowest * math.sqrt(variance / (1 - memory.variance ** (rounds - 2))))
        variance = memory.variance * variance + (1 - memory.variance) * away**2
    return memory.mean * mean + (1 - memory.mean) * x, variance


def recall(kept: tuple[float, float], rounds: int, memory: Memory) -> tuple[float, float]:
    """What :func:`remember` has kept: the average, and its standard error."""
    mean, variance = kept
    share = (1 - memory.mean) / (1 + memory.mean)  # variance of the average, in variances of one round
    share = share if rounds * memory.length > 6 else max(1 / rounds, share)
    deviation2 = variance / (1 - memory.variance ** max(1, rounds - 1))
    return mean / (1 - memory.mean**rounds), math.sqrt(deviation2 * share)


def weighted_sum(weights: Sequence[float], known: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Of averages and their standard errors, weighed."""
    parts = [(weight * mean, weight * error) for weight, (mean, error) in zip(weights, known, strict=True)]
    return math.fsum(mean for mean, _ in parts), math.sqrt(math.fsum(error**2 for _, error in parts))


def in_errors(mean: float, error: float) -> float:
    """``t``: a mean in units of its standard error."""
    return mean / (error + _TINY)


def significance(t: float, rounds: int, threshold: float, slack: float) -> float:
    """``q``, in [-1, 1]. 0 in the first rounds."""
    return math.copysign(min(1.0, max(0.0, (abs(t) - threshold) / slack)), t) if rounds >= FEWEST else 0.0
