"""Runs of OneCycle at a constant gain, of which each round is written down: how far it took the weights, and what a
probe says there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import Workload
from hdet.observe.slopes import slopes_of
from hdet.steer.observation import Observation
from hdet.steer.posterior import Belief, Posterior


class Round(NamedTuple):
    """One round of a run. A number that is not known is NaN."""

    progress: float
    """Share of the run that is over when the round ends."""
    height: float
    """The schedule's then, as a share of its peak."""
    movement: float
    """How far the round took the weights (:mod:`hdet.observe.movement`)."""
    debiased: float
    """``A`` of :class:`hdet.observe.slopes.Slopes`: lasting progress in the round."""
    noise: float
    """``E`` there: what the iterates' noise costs."""


@dataclass(frozen=True, kw_only=True)
class _Watcher(Posterior):
    """Moves nothing, and keeps what it is shown: a probe in every round."""

    probe_every: ClassVar[float] = 0.0
    probe_from: ClassVar[float] = 0.0
    seen: list[Round] = field(default_factory=list)

    def update(self, belief: Belief, observation: Observation) -> tuple[Belief, float | None]:
        slopes = None
        if observation.probe is not None:
            slopes = slopes_of(observation.probe, observation.multipliers, observation.lag)
        debiased, noise = (math.nan, math.nan) if slopes is None else (slopes.debiased, slopes.noise)
        self.seen.append(Round(observation.progress, observation.height, observation.movement, debiased, noise))
        return belief, None


def watch(workload: Workload, max_lr: float, seed: int) -> Outcome:
    """One run; ``details["rounds"]`` holds its rounds, each number to five digits. A run that diverges has fewer."""
    watcher = _Watcher()
    outcome = simulate(workload, max_lr, seed, Setting(controller=watcher, rollback=False))
    rounds = [[float(f"{value:.5g}") for value in seen] for seen in watcher.seen]
    return outcome._replace(details={"rounds": rounds})


def rounds_of(outcome: Outcome) -> list[Round]:
    """The rounds of a run that was watched, also of one that was read from a file, where null is NaN."""
    rows: Sequence[Sequence[Any]] = outcome.details["rounds"]
    return [Round(*(math.nan if value is None else float(value) for value in row)) for row in rows]
