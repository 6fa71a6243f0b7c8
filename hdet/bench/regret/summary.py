"""``python -m hdet.bench.regret.summary``: what each contender is worth in the mean over workloads, and what chance is.

Reads the runs that ``python -m hdet.bench.regret`` keeps, for example those of::

    python -m hdet.bench.regret --contenders posterior movement repeat_0.999 repeat_1.001 repeat_1.002

By start and contender it shows

- the *excess* of the final loss over that of OneCycle with the tuned max_lr;
- what it is *over OneCycle* from the same start, and the *harm*: the same, or 0 where it is below 0.

Both are of mean losses over the seeds, on the same seeds, and clipped after that mean. Shown is the mean over
workloads, with its standard error. OneCycle's loss is the mean of its run and its repeats (contenders ``repeat_...``,
whose max_lr is a thousandth off), where they ran: single runs differ by percents. Each repeat, and OneCycle itself, is
held against the mean of the others. That is the null: its harm is what chance alone brings.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hdet.bench.regret.contenders import CONTENDERS, ORACLE
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Run, Store, version_of
from hdet.bench.regret.workloads import STARTS, WORKLOADS
from hdet.monitor.tables import markdown

SHOWN = ("posterior", "movement", ORACLE)
CAP = 0.6
"""Largest excess of a workload either way: one that is worse, or diverged, counts as this bad."""
REPEATED = (ORACLE, *(name for name in CONTENDERS if name.startswith("repeat_")))
"""The contenders that are OneCycle."""

Losses = Mapping[tuple[str, str, float | None], Mapping[int, float]]
"""``{(workload, contender, start): {seed: loss}}``, infinite where it diverged."""


class Cell(NamedTuple):
    """A contender on a workload from a start. Excesses are within :data:`CAP` of 0."""

    excess: float
    """Over the tuned schedule."""
    over: float
    """Over OneCycle from the same start; NaN where there is nothing to compare with."""
    seeds: int


def losses_of(outcomes: Mapping[Run, Outcome]) -> Losses:
    """The losses of all runs that are as long as their workload and that this code would make."""
    found: dict[tuple[str, str, float | None], dict[int, float]] = {}
    for run, outcome in outcomes.items():
        workload = WORKLOADS.get(run.workload)
        if workload is None or run.contender not in CONTENDERS:
            continue
        if run.steps == workload.steps and run.version == version_of(run.contender):
            loss = outcome.loss if math.isfinite(outcome.loss) else math.inf
            found.setdefault((run.workload, run.contender, run.start), {})[run.seed] = loss
    return found


def cells(losses: Losses, start: float, contenders: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """``{workload: {contender: cell}}`` at a start: of workloads, and on seeds, that all the contenders have."""
    found: dict[str, dict[str, Cell]] = {}
    for workload in dict.fromkeys(name for name, _, _ in losses):
        own = {name: losses.get((workload, name, _start_of(name, start)), {}) for name in contenders}
        tuned = {seed for name in REPEATED for seed in losses.get((workload, name, 1.0), ())}
        seeds = sorted(tuned.intersection(*own.values()))
        if seeds:
            cell = {name: _cell(losses, workload, name, start, own[name], seeds) for name in contenders}
            found[workload] = {name: known for name, known in cell.items() if known}
    return found


def _start_of(contender: str, start: float) -> float | None:
    return start if CONTENDERS[contender].uses_start else None


def _cell(
    losses: Losses, workload: str, name: str, start: float, own: Mapping[int, float], seeds: Sequence[int]
) -> Cell | None:
    mean = statistics.fmean(own[seed] for seed in seeds)
    tuned = _reference(losses, workload, 1.0, seeds, without=name if start == 1 else "")
    same = _reference(losses, workload, start, seeds, without=name)
    return None if math.isnan(tuned) else Cell(excess(mean, tuned), excess(mean, same), len(seeds))


def _reference(losses: Losses, workload: str, start: float, seeds: Sequence[int], *, without: str) -> float:
    """OneCycle's mean loss over the seeds, each the mean of its runs but one; NaN where a seed has none."""
    runs = [losses.get((workload, name, start), {}) for name in REPEATED if name != without]
    by_seed = [[run[seed] for run in runs if seed in run] for seed in seeds]
    return statistics.fmean(map(statistics.fmean, by_seed)) if all(by_seed) else math.nan


def excess(loss: float, reference: float) -> float:
    """Of a loss over another, within the cap of 0; either may be infinite. NaN if there is no other."""
    if math.isnan(reference):
        return math.nan
    if math.isinf(reference):
        return 0.0 if math.isinf(loss) else -CAP
    return min(CAP, max(-CAP, loss / reference - 1))


# -------------------------------------------------------------------------------------------------------------- table


def table(losses: Losses, starts: Iterable[float], groups: Sequence[Sequence[str]]) -> str:
    """A line for every start and contender, in Markdown; contenders of one group on the same workloads and seeds."""
    rows = []
    for start, contenders in itertools.product(starts, groups):
        found = cells(losses, start, contenders)
        for name in contenders:
            own = {workload: cell[name] for workload, cell in found.items() if name in cell}
            if own:
                rows.append([f"x{start:.3g}", name, *_row(own)])
    if not rows:
        return "No workload has runs of all these contenders with the same seeds."
    header = ["start", "contender", "workloads", "runs", "excess", "over OneCycle", "harm", "worst over OneCycle"]
    return markdown([header, *rows], padded=False)


def each(losses: Losses, starts: Sequence[float], contender: str) -> str:
    """A line for every workload, in Markdown: a contender's excess, and what it is over OneCycle, by start."""
    by_start = [cells(losses, start, [contender]) for start in starts]
    names = [name for name in dict.fromkeys(name for name, _, _ in losses) if any(name in found for found in by_start)]
    rows = [[name, *(_pair(found.get(name, {}).get(contender)) for found in by_start)] for name in names]
    return markdown([[contender, *(f"x{start:.3g}" for start in starts)], *rows], padded=False)


def _pair(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell.excess:+.1f} / {'-' if math.isnan(cell.over) else f'{100 * cell.over:+.1f}'}"


def _row(own: Mapping[str, Cell]) -> list[str]:
    over = {workload: cell.over for workload, cell in own.items() if not math.isnan(cell.over)}
    worst = max(over, key=lambda workload: over[workload], default=None)
    return [
        str(len(own)),
        str(sum(cell.seeds for cell in own.values())),
        mean_and_error([cell.excess for cell in own.values()]),
        mean_and_error(list(over.values())),
        mean_and_error([max(0.0, value) for value in over.values()], sign=""),
        "-" if worst is None else f"{worst} {100 * over[worst]:+.1f}",
    ]


def mean_and_error(shares: Sequence[float], sign: str = "+") -> str:
    """Mean and standard error of shares, in percent."""
    if not shares:
        return "-"
    mean = f"{100 * statistics.fmean(shares):{sign}.2f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares) / math.sqrt(len(shares)):.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    options = _parser().parse_args(argv)
    path = options.output / "runs.jsonl"
    if not path.exists():
        print(f"{path} is not there: make the runs with python -m hdet.bench.regret", file=sys.stderr)
        return 1
    losses = losses_of(Store(path).outcomes)
    if options.workloads:
        losses = {key: own for key, own in losses.items() if key[0] in options.workloads}
    apart = {key: own for key, own in losses.items() if WORKLOADS[key[0]].by_heart}
    losses = {key: own for key, own in losses.items() if key not in apart}
    print("In percent, mean over workloads ± standard error.\n")
    print(table(losses, options.starts, [options.contenders]))
    if apart:
        print(f"\nLearned by heart ({', '.join(dict.fromkeys(name for name, _, _ in apart))}):\n")
        print(table(apart, options.starts, [options.contenders]))
    if options.each:
        for name in options.contenders:
            print(f"\nBy workload, {name}: excess over the tuned OneCycle / over OneCycle from there, in percent.\n")
            print(each({**losses, **apart}, options.starts, name))
    repeated = {start for _, name, start in losses if name in REPEATED[1:]}
    if repeated:
        print("\nThe null, OneCycle and its repeats, each over the mean of the others:\n")
        print(table(losses, [start for start in options.starts if start in repeated], [[name] for name in REPEATED]))
    else:
        print(f"\nNo null: there are no runs of {', '.join(REPEATED[1:])}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hdet.bench.regret.summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("bench/regret"), metavar="DIR", help="default: bench/regret")
    add("--contenders", nargs="+", choices=CONTENDERS, default=SHOWN, help=f"default: {' '.join(SHOWN)}")
    add("--workloads", nargs="+", choices=WORKLOADS, help="default: all that have runs")
    add("--starts", nargs="+", type=float, default=STARTS, metavar="X", help="in units of the tuned max_lr")
    add("--each", action="store_true", help="show a line for each workload, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
