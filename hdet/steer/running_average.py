"""Running averages of what rounds measure, and their standard errors. Pure functions of plain floats.

An average is kept as ``(mean, variance)``, both summed from 0 as in Adam, so that a read must correct for the start.
"""

from __future__ import annotations

import math
from typing import NamedTuple

HUNDREDTH = 0.01
"""Of the run: the unit in which averages and steps count time."""
MIN_ROUNDS = 3
"""Rounds before which nothing moves."""
_TINY = 1e-12


class Decay(NamedTuple):
    """What the past weighs in an average after one round, in [0, 1)."""

    mean: float
    """In the mean."""
    variance: float
    """In the variance around it."""
    length: float = 1.0
    """Of a round, in hundredths of the run."""

    def over(self, length: float) -> Decay:
        """The same per hundredth of the run, for rounds of ``length`` hundredths."""
        return Decay(self.mean**length, self.variance**length, length)


def update_average(average: tuple[float, float], x: float, rounds: int, decay: Decay) -> tuple[float, float]:
    """``average`` with ``x``, the latest of ``rounds`` values."""
    mean, variance = average
    if rounds > 1:
        deviation = x - mean / (1 - decay.mean ** (rounds - 1))
        variance = decay.variance * variance + (1 - decay.variance) * deviation**2
    return decay.mean * mean + (1 - decay.mean) * x, variance


def mean_and_error(average: tuple[float, float], rounds: int, decay: Decay) -> tuple[float, float]:
    """The mean of an :func:`update_average` over ``rounds`` values, and its standard error."""
    mean, variance = average
    share = (1 - decay.mean) / (1 + decay.mean)  # variance of the mean, in variances of one round
    share = share if rounds * decay.length > 6 else max(1 / rounds, share)
    deviation2 = variance / (1 - decay.variance ** max(1, rounds - 1))
    return mean / (1 - decay.mean**rounds), math.sqrt(deviation2 * share)


def t_statistic(mean: float, error: float) -> float:
    """``t``: a mean in units of its standard error."""
    return mean / (error + _TINY)


def significance(t: float, rounds: int, threshold: float, slack: float) -> float:
    """``q = sign(t) clip((|t| - threshold) / slack, 0, 1)``; 0 in the first :data:`MIN_ROUNDS` - 1 rounds."""
    return math.copysign(min(1.0, max(0.0, (abs(t) - threshold) / slack)), t) if rounds >= MIN_ROUNDS else 0.0
