"""``python -m hdet.bench.regret.ablations``: the controller without each of its parts, and under other settings.

Every row changes one thing. Figures are the excess over the best OneCycle of the sweep, in percent, over seeds. Fast
workloads only: about 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from hdet.bench.regret import peers
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS
from hdet.monitor.tables import markdown
from hdet.steer.posterior import Posterior

CONSTANTS = ("memory", "until", "noise_weight", "movement_error", "evidence_error")
"""The controller's."""


def _with(**settings: Any) -> Setting:
    """The default under a controller with other settings."""
    return replace(DEFAULT, controller=Posterior(**settings))


def _times(name: str, factor: float) -> Setting:
    """The default with a constant multiplied, or set to 1 where that is its largest value. Of ``memory``, its
    length is multiplied."""
    value = getattr(Posterior(), name)
    if name == "memory":
        return _with(memory=value ** (1 / factor))
    return _with(**{name: min(1.0, value * factor) if name == "until" else value * factor})


DEFAULT = Setting()
ABLATIONS: dict[str, Setting] = {
    "default": DEFAULT,
    "movement only": replace(DEFAULT, probe=False),
    "evidence only": _with(movement_error=1e3),
    "no noise": _with(noise_weight=1e-6),
    "no rollback": replace(DEFAULT, rollback=False),
    "no height": replace(DEFAULT, flat=True),
    "never rests": _with(rest_below=0.0),
    **{f"{name} x{factor:g}": _times(name, factor) for name in CONSTANTS for factor in (0.5, 2.0)},
    "N = 2": replace(DEFAULT, replicas=2),
    "N = 8": replace(DEFAULT, replicas=8),
    "N = 16": replace(DEFAULT, replicas=16),
    "spread 0.05": replace(DEFAULT, spread=0.05),
    "spread 0.5": replace(DEFAULT, spread=0.5),
    "25 rounds": replace(DEFAULT, rounds=25),
    "50 rounds": replace(DEFAULT, rounds=50),
    "200 rounds": replace(DEFAULT, rounds=200),
    "400 rounds": replace(DEFAULT, rounds=400),
    "power 0": replace(DEFAULT, power=0.0),
    "power 1": replace(DEFAULT, power=1.0),
    "power 5": replace(DEFAULT, power=5.0),
    "probe batch / 4": replace(DEFAULT, probe_share=4),
}
SWEEP = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
STARTS = (0.1, 1 / 3, 1.0, 3.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print one table; returns the exit status."""
    options = _parser().parse_args(argv)
    seeds = range(options.seeds)
    jobs: list[tuple[str, str, float, int, int]] = [
        (row, workload, multiple, seed, options.length)
        for workload in options.workloads
        for row in ("", *options.ablations)
        for multiple in (SWEEP if row == "" else STARTS)
        for seed in seeds
    ]
    found: dict[tuple[str, str, float], list[float]] = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for job, loss in zip(jobs, tqdm(pool.map(_run, jobs), total=len(jobs), file=sys.stderr), strict=True):
            found.setdefault(job[:3], []).append(loss)
    print(f"excess over the best OneCycle in %, mean over {options.seeds} seeds; start in units of the tuned max_lr\n")
    columns = [f"{workload} x{multiple:.2g}" for workload in options.workloads for multiple in STARTS]
    rows = [["", *columns, "mean"]]
    for row in options.ablations:
        excess = [
            100 * (_mean(found[row, workload, multiple]) / _best(found, workload) - 1)
            for workload in options.workloads
            for multiple in STARTS
        ]
        cells = [f"{x:+.1f}" if math.isfinite(x) else "diverged" for x in (*excess, _mean(excess))]
        rows.append([row, *cells])
    print(markdown(rows, padded=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.ablations", description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=["digits_mlp", "regression"])
    add("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    add("--length", type=int, default=1, metavar="X", help="X times as many steps")
    add("--seeds", type=int, default=4)
    add("--workers", type=int, default=os.cpu_count())
    return parser


def _run(job: tuple[str, str, float, int, int]) -> float:
    torch.set_num_threads(1)
    row, name, multiple, seed, length = job
    workload = replace(WORKLOADS[name], steps=WORKLOADS[name].steps * length)
    if row == "":
        return peers.one_cycle(workload, multiple * workload.tuned, seed)
    return simulate(workload, multiple * workload.tuned, seed, ABLATIONS[row]).loss


def _best(found: dict[tuple[str, str, float], list[float]], workload: str) -> float:
    return min(_mean(losses) for (row, name, _), losses in found.items() if row == "" and name == workload)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


if __name__ == "__main__":
    sys.exit(main())
