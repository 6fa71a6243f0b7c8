"""Runs of OneCycle at a constant gain that are forked at several times, and trained to the end from each fork with
another learning rate; beside each fork, what the default controller believes there."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hdet.bench.regret import peers
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workload import Workload
from hdet.steer.observation import Observation
from hdet.steer.posterior import Belief, Posterior
from hdet.steer.report import UNKNOWN_JUDGEMENT

TIMES = (0.05, 0.1, 0.2, 0.3)
"""Shares of the run after which it is forked."""


@dataclass(frozen=True, kw_only=True)
class _Shadow(Posterior):
    """Believes as the default does, and moves nothing."""

    seen: list[tuple[Belief, Observation]] = field(default_factory=list)

    def update(self, belief: Belief, observation: Observation) -> tuple[Belief, float | None]:
        belief, q = super().update(belief, observation)
        self.seen.append((belief._replace(gain=1.0), observation))
        return self.seen[-1][0], q


def fork(workload: Workload, max_lr: float, seed: int) -> Outcome:
    """Make a run and its forks. ``details`` holds, by time, the losses ``halved``, ``doubled`` and ``told`` (with the
    tuned max_lr), and the controller's ``movement``, ``evidence``, ``estimate`` and ``trust``; what is not finite, or
    not known, is ``None``."""
    began = time.perf_counter()
    shadow = _Shadow()
    simulate(workload, max_lr, seed, Setting(controller=shadow, rollback=False))
    run = PlainRun(workload, max_lr, seed)
    details: dict[str, Any] = {}
    for share in TIMES:
        run.train_until(round(share * workload.steps))
        seen = [pair for pair in shadow.seen if pair[1].progress <= share + 1e-9]
        judged = shadow.judge(*seen[-1]) if seen else UNKNOWN_JUDGEMENT
        ends = {"halved": 0.5, "doubled": 2.0, "told": workload.tuned / max_lr}
        losses = {name: run.copy().finish(factor) for name, factor in ends.items()}
        believed = {name: getattr(judged, own) for name, own in _BELIEFS.items()}
        details[f"{share:g}"] = {name: known(value) for name, value in (losses | believed).items()}
    return Outcome(run.finish(1.0), time.perf_counter() - began, 1.0, details)


_BELIEFS = {"movement": "centre", "evidence": "evidence", "estimate": "estimate", "trust": "trust"}


def known(value: float | None) -> float | None:
    """A number, or ``None`` for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


class PlainRun:
    """A plain run that can be copied at any step."""

    def __init__(self, workload: Workload, max_lr: float, seed: int) -> None:
        self._workload, self._max_lr = workload, max_lr
        self._model: nn.Module = peers.build(workload, seed)
        self._optimizer = peers.optimizer_of(workload, self._model, max_lr)
        self._batches, self._random = peers.batches(seed), torch.get_rng_state()
        self._shape = peers.shape_of(workload)
        self._step, self._is_finite = 0, True

    def copy(self) -> PlainRun:
        """One that goes on from the same state with the same batches."""
        other = copy.copy(self)
        other._model, other._optimizer = copy.deepcopy((self._model, self._optimizer))
        other._batches = torch.Generator()
        other._batches.set_state(self._batches.get_state())
        return other

    def train_until(self, step: int, factor: float = 1.0) -> None:
        """Train with ``factor`` times the learning rate."""
        torch.set_rng_state(self._random)
        while self._step < step and self._is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = self._max_lr * self._shape[self._step] * factor
            batch = self._workload.draw(self._workload.batch_size, self._batches)
            self._is_finite = math.isfinite(peers.backward(self._workload, self._model, batch))
            if self._is_finite:
                self._optimizer.step()
            self._step += 1
        self._random = torch.get_rng_state()

    def finish(self, factor: float) -> float:
        """The validation loss at the end of the run; NaN if it diverged."""
        self.train_until(self._workload.steps, factor)
        if not self._is_finite:
            return math.nan
        return peers.evaluate(self._workload, self._model, self._workload.validation())
