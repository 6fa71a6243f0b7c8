"""``python -m hdet.bench.regret.tune``: the best max_lr of a workload, for its field ``tuned``.

OneCycle is run at learning rates that are 2 times apart, from ``tuned`` on: up or down while that lowers the final
validation loss, first with seed 0, then by the mean over seeds 0 and 1. So the rate that it ends at is better than
half of it and twice it. No controller takes part.

Every run is kept in a file, and is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hdet.bench.regret.clean import CLEAN
from hdet.bench.regret.runs import Run, execute
from hdet.bench.regret.shipped import missing
from hdet.bench.regret.unseen import UNSEEN
from hdet.bench.regret.workloads import WORKLOADS, workload_of

CACHE = Path("bench/regret/tuning.jsonl")
"""Where the runs are kept by default."""

Loss = Callable[[float, int], float]
"""Of a learning rate and a seed."""


class Sweep:
    """Final losses of OneCycle, kept in a file: one JSON object to a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known: dict[tuple[str, int, float, int], float] = {}
        for found in map(json.loads, lines):
            key = (found["workload"], found["steps"], found["max_lr"], found["seed"])
            self._known[key] = math.inf if found["loss"] is None else found["loss"]

    def known(self, name: str, max_lr: float, seed: int) -> float | None:
        """The loss of a run that was made; infinite if it diverged."""
        return self._known.get(self._key(name, max_lr, seed))

    def _key(self, name: str, max_lr: float, seed: int) -> tuple[str, int, float, int]:
        return name, workload_of(name).steps, float(f"{max_lr:.6g}"), seed

    def loss(self, name: str, max_lr: float, seed: int) -> float:
        """Infinite if the run diverged."""
        workload, key = workload_of(name), self._key(name, max_lr, seed)
        if key not in self._known:
            result = execute(Run(name, "one_cycle", max_lr / workload.tuned, seed, workload.steps, ""))
            if result.outcome is None:
                raise RuntimeError(result.error or result.unavailable)
            loss = result.outcome.loss if math.isfinite(result.outcome.loss) else math.inf
            row = dict(zip(("workload", "steps", "max_lr", "seed"), key, strict=True))
            row |= {"loss": loss if math.isfinite(loss) else None, "seconds": round(result.outcome.seconds, 1)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._known[key] = loss
        return self._known[key]


def best(loss: Loss, start: float, seeds: int) -> float:
    """Where halving and doubling from ``start`` no longer lowers the mean loss: over one seed first, then over more."""
    here = start
    for count in range(1, seeds + 1):
        while True:
            around = {
                rate: statistics.fmean(loss(rate, seed) for seed in range(count)) for rate in (here, here / 2, here * 2)
            }
            lowest = min(around, key=lambda rate: around[rate])
            if lowest == here:
                break
            here = lowest
    return here


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each workload; returns the exit status."""
    options = _parser().parse_args(argv)
    sweep = Sweep(options.cache)
    for name in options.workloads:
        workload = WORKLOADS[name]
        if reason := missing(workload.packages):
            print(f"{name}: {reason}", file=sys.stderr)
            return 1
        rate = best(functools.partial(sweep.loss, name), workload.tuned, options.seeds)
        means = {
            f"{rate * times:.4g}": statistics.fmean(sweep.loss(name, rate * times, s) for s in range(options.seeds))
            for times in (0.5, 1, 2)
        }
        print(f"{name}: {rate:.4g} (tuned={workload.tuned:.4g}); mean losses {means}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.tune", description=__doc__)
    add = parser.add_argument
    known = list(CLEAN | UNSEEN)
    add("--workloads", nargs="+", choices=WORKLOADS, default=known, metavar="NAME", help="default: clean, unseen")
    add("--seeds", type=int, default=2, metavar="N", help="how many; default: 2")
    add("--cache", type=Path, default=CACHE, metavar="FILE", help=f"default: {CACHE}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
