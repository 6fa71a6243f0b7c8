"""Rules that controllers' settings share."""

from __future__ import annotations

import math


def clamped(log_gain: float, bounds: tuple[float, float]) -> float:
    """The gain of ``log_gain``, or the nearer of its ``bounds``."""
    low, high = bounds
    # Clamped twice: exp(log(bound)) may round to just outside the bound.
    return min(max(math.exp(min(max(log_gain, math.log(low)), math.log(high))), low), high)


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise ``ValueError`` unless ``bounds`` are those of a gain."""
    low, high = bounds
    if not (0 < low <= 1 <= high < math.inf):
        raise ValueError(f"Invalid {bounds=}. Must satisfy 0 < low <= 1 <= high < inf.")


def require(name: str, value: float, ok: bool, rule: str) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and ``ok``; ``rule`` says what it must be."""
    if not (math.isfinite(value) and ok):
        raise ValueError(f"Invalid {name}={value}. Must be {rule}.")
