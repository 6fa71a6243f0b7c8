"""Alternating measurements; their medians, quartiles, and ratios taken within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OURS = "hdet"
MIN_ROUNDS = 3


class Unavailable(Exception):
    """A contender that cannot run here. The message is the reason, and is shown to the user."""


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread_of(values: list[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass
class Comparison:
    """One case, measured for ours and for the alternatives in the same rounds."""

    section: str
    case: str
    """What was measured, for the reader."""
    facts: dict[str, Any]
    """The same in single facts (shape, processes, bytes), for programs."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Seconds by contender; the i-th of each was measured in round i."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Contenders that did not run, and why."""

    def seconds(self, name: str) -> Spread:
        """What a contender took."""
        return spread_of(self.samples[name])

    def ratio(self, name: str) -> Spread:
        """How many times as long as ours an alternative took."""
        pairs = zip(self.samples[name], self.samples[OURS], strict=True)
        return spread_of([theirs / ours for theirs, ours in pairs])

    @property
    def alternatives(self) -> list[str]:
        """Contenders beside ours that ran."""
        return [name for name in self.samples if name != OURS]


def alternate(
    contenders: Mapping[str, Callable[[], float]],
    *,
    repeat: int,
    seconds: float,
    agree: Callable[[int], int] = lambda rounds: rounds,
    cost: float | None = None,
) -> dict[str, list[float]]:
    """Let the contenders take turns.

    Args:
        contenders: each does its work once and returns the seconds that count.
        repeat: rounds at most.
        seconds: in all, about; :data:`MIN_ROUNDS` rounds are measured even if that takes longer.
        agree: makes the number of rounds the same on all processes.
        cost: seconds of a round, if one was made already to warm up. Default: makes one.
    """
    if cost is None:
        started = time.perf_counter()
        for measure in contenders.values():
            measure()
        cost = time.perf_counter() - started
    rounds = agree(max(MIN_ROUNDS, min(repeat, int(seconds / cost))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, generator = list(contenders), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)  # the same order on all processes
        for name in order:
            samples[name].append(contenders[name]())
    return samples


def repeated(work: Callable[[], object], at_least: float = 2e-3) -> Callable[[], float]:
    """``work`` as a contender: called so often that it takes ``at_least`` seconds, and timed per call."""

    def total(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - started

    work()
    calls = 1
    while total(calls) < at_least:
        calls *= 2
    return lambda: total(calls) / calls
