"""``python -m hdet.bench.regret.collect``: runs at constant learning rates, as :mod:`hdet.bench.regret.fit` needs them.

Each workload is run with OneCycle at several multiples of its tuned max_lr. Kept are the final loss and, of every
round, how far the weights moved and what a probe says (:class:`hdet.bench.regret.watched.Round`). Each run is a line of
a file, written when it ends, and is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hdet.bench.regret.runs import SWEEP, Store, add_options, make, of_contender
from hdet.bench.regret.workloads import WORKLOADS

CACHE = Path("bench/regret/constant.jsonl")
"""Where the runs are kept by default."""
CONTENDER = "watched"
"""Whose runs they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet; returns the exit status."""
    options = _parser().parse_args(argv)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    store = Store(options.cache)
    planned = of_contender(CONTENDER, options.workloads, options.multiples, options.seeds)
    misses = make(planned, store, options.workers)
    print(f"{options.cache}: {sum(run in store.outcomes for run in planned)} of {len(planned)} runs")
    return misses.told(options.cache)


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
