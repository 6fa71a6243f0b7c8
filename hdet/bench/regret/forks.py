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
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdet.bench.regret.forked import TIMES, known
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Run, Store, add_options, make, of_contender
from hdet.bench.regret.summary import mean_and_error
from hdet.bench.regret.workloads import WORKLOADS
from hdet.monitor.tables import markdown

CACHE = Path("bench/regret/forks.jsonl")
"""Where the data set is kept by default."""
CONTENDER = "forked"
"""Whose runs they are."""
START_POINTS = (0.1, 1 / 3, 1.0, 3.0, 8.0)
"""In units of the tuned max_lr."""
HALF = math.log(2)
_CAP = 0.6
"""Largest excess of a run, also of one that diverged."""

Forks = dict[str, Any]
"""A run: what identifies it, ``kept``, and by time what :func:`hdet.bench.regret.forked.fork` found. A loss that is not
finite, and what is not known, is ``None``."""


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
    store = Store(options.cache)
    planned = of_contender(CONTENDER, options.workloads, sorted({1.0, *options.starts}), options.seeds)
    misses = make(planned, store, options.workers)
    print("In percent over the tuned run, mean over workloads ± standard error.\n")
    print(report([forks_of(run, store.outcomes[run]) for run in planned if run in store.outcomes]))
    return misses.told(options.cache)


def forks_of(run: Run, outcome: Outcome) -> Forks:
    """A run and its forks, as the table takes them."""
    identity = {"workload": run.workload, "start": run.start, "seed": run.seed}
    return {**identity, "kept": known(outcome.loss), **outcome.details}


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
