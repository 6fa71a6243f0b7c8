"""``python -m hdet.bench.regret.forks``: what the right move of the learning rate would have been.

A run with OneCycle at a constant multiple of the tuned max_lr is forked at several times. From each fork it is trained
to its end with the learning rate halved, doubled, and with the tuned one: the last is what a controller could do that
was told the answer then. Beside each fork stands what :class:`hdet.controller.Posterior` believes there. All of it is a
data set, one run with its forks to a line; runs that are in the file are not made again.

The table has the final loss over that of the tuned run, by start and by the time of the fork, mean over workloads:

- ``kept``: the run without a move;
- ``best``: of halved, kept and doubled, as the final losses have it;
- ``hdet``: after the controller's own move, at most a factor of 2;
- ``rule``: after that of a linear rule ``a + b c + d e``, with ``c`` and ``e`` the log gains that the movement and the
  probe argue for, fitted to the best moves of all other workloads;
- ``told``: with the tuned max_lr from there on.

Between halved, kept and doubled, log losses are interpolated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hdet.bench.regret import peers
from hdet.bench.regret.runs import add_options
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.summary import mean_and_error
from hdet.bench.regret.workload import Workload
from hdet.bench.regret.workloads import WORKLOADS, workload_of
from hdet.monitor.tables import markdown
from hdet.steer.observation import Observation
from hdet.steer.posterior import Belief, Posterior
from hdet.steer.report import UNKNOWN_JUDGEMENT

CACHE = Path("bench/regret/forks.jsonl")
"""Where the data set is kept by default."""
TIMES = (0.05, 0.1, 0.2, 0.3)
"""Shares of the run after which it is forked."""
START_POINTS = (0.1, 1 / 3, 1.0, 3.0, 8.0)
"""In units of the tuned max_lr."""
HALF = math.log(2)
_CAP = 0.6
"""Largest excess of a run, also of one that diverged."""

Forks = dict[str, Any]
"""A run: what identifies it, ``kept``, and by time ``halved``, ``doubled``, ``told``, ``movement``, ``evidence``,
``estimate``, ``trust``. A loss that is not finite, and what is not known, is null."""


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, kw_only=True)
class _Shadow(Posterior):
    """Believes as the default does, and moves nothing."""

    seen: list[tuple[Belief, Observation]] = field(default_factory=list)

    def update(self, belief: Belief, observation: Observation) -> tuple[Belief, float | None]:
        belief, q = super().update(belief, observation)
        self.seen.append((belief._replace(gain=1.0), observation))
        return self.seen[-1][0], q


def fork(workload: Workload, start: float, seed: int) -> Forks:
    """Make a run and its forks, on one thread."""
    shadow = _Shadow()
    simulate(workload, start * workload.tuned, seed, Setting(controller=shadow, rollback=False))
    run = _Run(workload, start * workload.tuned, seed)
    found: Forks = {"workload": workload.name, "start": start, "seed": seed, "steps": workload.steps}
    for time in TIMES:
        run.train_until(round(time * workload.steps))
        seen = [pair for pair in shadow.seen if pair[1].progress <= time + 1e-9]
        judged = shadow.judge(*seen[-1]) if seen else UNKNOWN_JUDGEMENT
        ends = {"halved": 0.5, "doubled": 2.0, "told": 1 / start}
        found[f"{time:g}"] = {name: _known(run.copy().finish(factor)) for name, factor in ends.items()} | {
            "movement": _known(judged.centre),
            "evidence": _known(judged.evidence),
            "estimate": _known(judged.estimate),
            "trust": _known(judged.trust),
        }
    return found | {"kept": _known(run.finish(1.0))}


class _Run:
    """A plain run that can be copied at any step."""

    def __init__(self, workload: Workload, max_lr: float, seed: int) -> None:
        self._workload, self._max_lr = workload, max_lr
        self._model: nn.Module = peers.build(workload, seed)
        self._optimizer = peers.optimizer_of(workload, self._model, max_lr)
        self._batches, self._random = peers.batches(seed), torch.get_rng_state()
        self._shape = peers.shape_of(workload)
        self._step, self._is_finite = 0, True

    def copy(self) -> _Run:
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


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _job(job: tuple[str, float, int]) -> Forks:
    torch.set_num_threads(1)
    return fork(workload_of(job[0]), *job[1:])


# --------------------------------------------------------------------------------------------------------------- table


def excess(loss: float | None, tuned: float) -> float:
    """Of a final loss over the tuned one, as a share, at most :data:`_CAP` either way."""
    return _CAP if loss is None else min(max(loss / tuned - 1, -_CAP), _CAP)


def at(forks: Mapping[str, Any], kept: float | None, tuned: float, move: float) -> float:
    """Excess after a move of the log learning rate, at most that of halving or doubling."""
    ends = [excess(loss, tuned) for loss in (forks["halved"], kept, forks["doubled"])]
    return float(np.expm1(np.interp(move, [-HALF, 0.0, HALF], np.log1p(ends))))


def best_move(forks: Mapping[str, Any], kept: float | None, tuned: float) -> float:
    """Of halved, kept and doubled; not to move, of equal ones."""
    return min((0.0, -HALF, HALF), key=lambda move: at(forks, kept, tuned, move))


def report(runs: Sequence[Forks]) -> str:
    """The table."""
    by_start: dict[float, list[Forks]] = {}
    for run in runs:
        by_start.setdefault(run["start"], []).append(run)
    tuned = {(run["workload"], run["seed"]): run["kept"] for run in by_start.get(1.0, [])}
    rows: list[Sequence[str]] = [["start", "fork at", "kept", "best", "hdet", "rule", "told", "workloads"]]
    for time in (f"{time:g}" for time in TIMES):
        known = [run for run in runs if tuned.get((run["workload"], run["seed"]))]
        rules = fit_rules(known, time, tuned)
        for start in sorted(by_start):
            mine = [run for run in known if run["start"] == start]
            columns: dict[str, dict[str, list[float]]] = {}
            for run in mine:
                base, forks, kept = tuned[run["workload"], run["seed"]], run[time], run["kept"]
                cells = {
                    "kept": excess(kept, base),
                    "best": at(forks, kept, base, best_move(forks, kept, base)),
                    "hdet": at(forks, kept, base, own_move(forks)),
                    "rule": at(forks, kept, base, float(rules[run["workload"]] @ terms(forks))),
                    "told": excess(forks["told"], base),
                }
                for name, value in cells.items():
                    columns.setdefault(name, {}).setdefault(run["workload"], []).append(value)
            means = [mean_and_error([float(np.mean(v)) for v in columns[name].values()]) for name in columns]
            rows.append([f"x{start:.3g}", f"{float(time):.0%}", *means, str(len({run["workload"] for run in mine}))])
    return markdown(rows, padded=False)


def own_move(forks: Mapping[str, Any]) -> float:
    """The controller's, in log learning rate, where the user gave the rate."""
    if forks["estimate"] is None or forks["trust"] is None:
        return 0.0
    return float((1 - forks["trust"]) * math.log(forks["estimate"]))


def terms(forks: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Of the linear rule."""
    return np.array([1.0, *(math.log(forks[name]) if forks[name] else 0.0 for name in ("movement", "evidence"))])


def fit_rules(
    runs: Iterable[Forks], time: str, tuned: Mapping[tuple[str, int], float]
) -> dict[str, np.ndarray[Any, Any]]:
    """By workload the coefficients of the rule, by least squares on the best moves of all others."""
    rows = [
        (run["workload"], terms(run[time]), best_move(run[time], run["kept"], tuned[run["workload"], run["seed"]]))
        for run in runs
    ]
    found = {}
    for name in {name for name, _, _ in rows}:
        inputs = np.array([row for other, row, _ in rows if other != name])
        moves = np.array([move for other, _, move in rows if other != name])
        found[name] = np.linalg.lstsq(inputs, moves, rcond=None)[0] if len(moves) else np.zeros(3)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet and print the table; returns the exit status."""
    options = _parser().parse_args(argv)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    lines = options.cache.read_text(encoding="utf-8").splitlines() if options.cache.exists() else []
    runs: dict[tuple[str, float, int], Forks] = {}
    for run in map(json.loads, lines):
        if run["steps"] == workload_of(run["workload"]).steps:
            runs[run["workload"], run["start"], run["seed"]] = run
    starts = sorted({1.0, *options.starts})
    jobs = [(name, start, seed) for seed in range(options.seeds) for name in options.workloads for start in starts]
    todo = [job for job in jobs if job not in runs]
    with (
        ProcessPoolExecutor(options.workers, get_context("spawn")) as pool,
        options.cache.open("a", encoding="utf-8") as file,
    ):
        for run in tqdm(pool.map(_job, todo), total=len(todo), unit="run", file=sys.stderr):
            runs[run["workload"], run["start"], run["seed"]] = run
            file.write(json.dumps(run, allow_nan=False) + "\n")
            file.flush()
    print("In percent over the tuned run, mean over workloads ± standard error.\n")
    print(report([runs[job] for job in jobs]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.forks", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    cheap = [name for name, workload in WORKLOADS.items() if not (workload.packages or workload.by_heart)]
    add(
        "--workloads", nargs="+", choices=WORKLOADS, default=cheap, metavar="NAME", help="default: all without packages"
    )
    add(
        "--starts",
        nargs="+",
        type=float,
        default=START_POINTS,
        metavar="X",
        help="of the tuned max_lr; 1 is always there",
    )
    add_options(parser, CACHE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
