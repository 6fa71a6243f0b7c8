"""``python -m hdet.bench.regret.collect``: runs at constant learning rates, as :mod:`hdet.bench.regret.fit` needs them.

Each workload is run with OneCycle at several multiples of its tuned max_lr. Kept are the final loss and, of every
round, how far the weights moved and what a probe says (:class:`hdet.bench.regret.watched.Round`). Each run is a line of
a file, written when it ends, and is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from hdet.bench.regret.runs import SWEEP, Run, Store, add_options, execute_all, version_of
from hdet.bench.regret.workloads import WORKLOADS, workload_of

CACHE = Path("bench/regret/constant.jsonl")
"""Where the runs are kept by default."""
CONTENDER = "watched"
"""Whose runs they are."""


def runs_for(workloads: Iterable[str], multiples: Iterable[float], seeds: int) -> list[Run]:
    """The runs of some workloads, seed by seed: whatever ends them early, all have as many, nearly."""
    return [
        Run(name, CONTENDER, multiple, seed, workload_of(name).steps, version_of(CONTENDER))
        for seed in range(seeds)
        for name in workloads
        for multiple in multiples
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet; returns the exit status."""
    options = _parser().parse_args(argv)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    store = Store(options.cache)
    planned = runs_for(options.workloads, options.multiples, options.seeds)
    todo = [run for run in planned if run not in store.outcomes]
    failed = 0
    with tqdm(total=len(planned), initial=len(planned) - len(todo), unit="run", file=sys.stderr) as bar:
        for result in execute_all(todo, options.workers):
            store.add(result)
            failed += bool(result.error)
            bar.update()
    print(f"{options.cache}: {len(planned) - failed} of {len(planned)} runs, {len(todo) - failed} of them new")
    if failed:
        print(f"{failed} runs failed: see {options.cache}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.collect", description=__doc__)
    add = parser.add_argument
    known = [name for name, workload in WORKLOADS.items() if not workload.packages]
    add("--workloads", nargs="+", choices=WORKLOADS, default=known, help="default: all that need no package")
    add("--multiples", nargs="+", type=float, default=SWEEP, metavar="X", help="of the tuned max_lr")
    add_options(parser, CACHE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
