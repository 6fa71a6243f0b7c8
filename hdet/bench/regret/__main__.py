"""The command line: see :mod:`hdet.bench.regret`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from hdet.bench.processes import cpus
from hdet.bench.regret import plot, table
from hdet.bench.regret.contenders import CONTENDERS
from hdet.bench.regret.runs import Result, Run, Store, as_json, make, plan
from hdet.bench.regret.shipped import missing
from hdet.bench.regret.workloads import CLEAN, FIRST, FURTHER, LONGER, MORE, SCHEDULES, STARTS, UNSEEN, WORKLOADS
from hdet.bench.report import machine

SCHEMA = 1
_PROGRAM = "python -m hdet.bench.regret"
_QUICK_WORKLOADS = ("digits_mlp", "digits_conv")
_GROUPS = {"first": FIRST, "more": MORE, "further": FURTHER, "longer": LONGER, "clean": CLEAN, "unseen": UNSEEN}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that the command line asks for and that are not there yet, print what they came to, and write it;
    returns the exit status."""
    grammar = parser()
    options = grammar.parse_args(argv)
    for name in options.workloads or ():
        if name in WORKLOADS and (reason := missing(WORKLOADS[name].packages)):
            grammar.error(f"--workloads {name}: {reason}")
    planned = plan_of(options)
    options.output.mkdir(parents=True, exist_ok=True)
    store = Store(options.output / "runs.jsonl")
    try:
        misses = make([] if options.report else planned, store, options.workers)
    except KeyboardInterrupt:
        done = sum(run in store.outcomes for run in planned)
        print(f"{_PROGRAM}: interrupted with {done} of {len(planned)} runs; the same command goes on.", file=sys.stderr)
        return _INTERRUPTED

    outcomes = {run: store.outcomes[run] for run in planned if run in store.outcomes}
    regrets = table.regrets_of(outcomes, options.starts)
    found = {
        "schema": SCHEMA,
        "machine": machine(),
        **table.as_json(regrets),
        "runs": [as_json(Result(run, outcome)) for run, outcome in outcomes.items()],
    }
    text = json.dumps(found, indent=1, allow_nan=False)
    (options.output / "regret.json").write_text(text + "\n", encoding="utf-8")
    print(table.tables(regrets), table.summary(regrets), sep="\n")
    if any(contender.ours for contender in CONTENDERS.values()):
        print("\n" + table.targets_table(regrets))
    print()
    for name in regrets.contenders:
        print(f"{name}: {CONTENDERS[name].describe}")
    try:
        plot.draw(regrets, options.output / "regret.png")
        print(f"\nplot: {options.output / 'regret.png'}")
    except ModuleNotFoundError:
        print("\nno plot: matplotlib is not installed")
    print(f"all runs: {options.output / 'regret.json'}")
    return misses.told(options.output / "runs.jsonl")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    found = argparse.ArgumentParser(
        prog=_PROGRAM, description="Train from wrong learning rates, and compare with the right one."
    )
    add = found.add_argument
    groups = "; ".join(f"{name}: {', '.join(group)}" for name, group in _GROUPS.items())
    add("--workloads", nargs="+", choices=[*WORKLOADS, *_GROUPS], help=f"by name or by group; default: first. {groups}")
    compared = [name for name, contender in CONTENDERS.items() if not contender.reference]
    add("--contenders", nargs="+", choices=CONTENDERS, default=compared, help=f"default: {', '.join(compared)}")
    add("--starts", nargs="+", type=_positive, default=STARTS, metavar="X", help="in units of the tuned max_lr")
    add("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="of all that have none of their own")
    add("--length", type=_positive, default=1.0, metavar="X", help="X times as many steps, in as many rounds")
    add("--seeds", type=_count, default=3, metavar="N", help="how many; default: 3")
    add("--workers", type=_count, default=cpus(), metavar="N", help="processes; default: one per CPU")
    add("--output", type=Path, default=Path("bench/regret"), metavar="DIR", help="default: bench/regret")
    add(
        "--quick",
        action="store_true",
        help="two small workloads, a tenth of the steps, one seed: tries everything, measures nothing",
    )
    add("--report", action="store_true", help="train nothing: show what was measured so far")
    return found


def plan_of(options: argparse.Namespace) -> list[Run]:
    """The runs that the command line asks for."""
    named = options.workloads or (_QUICK_WORKLOADS if options.quick else tuple(FIRST))
    workloads = [workload for name in named for workload in _known(name)]
    seeds, length = (1, 0.1) if options.quick else (options.seeds, options.length)
    if options.schedule != SCHEDULES[0]:
        workloads = [f"{workload}/{options.schedule}" for workload in workloads]
    return plan(workloads, options.contenders, options.starts, seeds, length=length)


def _known(name: str) -> list[str]:
    """The workload of that name, or those of the group whose data are installed."""
    found = []
    for workload in _GROUPS.get(name, (name,)):
        if reason := missing(WORKLOADS[workload].packages):
            print(f"skipped: {workload}: {reason}", file=sys.stderr)
        else:
            found.append(workload)
    return found


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    """A number, or a fraction such as ``1/3``."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
