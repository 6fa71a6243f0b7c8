"""The command line: see :mod:`hdet.bench.hyperparameters`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hdet.bench import hyperparameters, processes
from hdet.bench.hyperparameters.questions import plan
from hdet.bench.hyperparameters.table import table
from hdet.bench.hyperparameters.training import Result, train_all


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.hyperparameters", description=hyperparameters.__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of the runs that hdet moves")
    parser.add_argument("--sweep-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench"), help="directory of hyperparameters.jsonl")
    parser.add_argument("--report", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds until the processes are killed")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "hyperparameters.jsonl"
    done = _read(path)
    missing = [] if options.report else [r for r in plan(options.seeds, options.sweep_seeds) if r.key not in done]
    for count in sorted({run.processes for run in missing}):
        runs: Any = [run for run in missing if run.processes == count]
        results = processes.run(train_all, count, (runs,), device="cpu", limit=options.limit)
        for run, result in tqdm(results, total=len(runs), unit="run"):
            done[run.key] = result
            with path.open("a") as file:
                file.write(json.dumps([run.key, vars(result)]) + "\n")
    print(table(done, options.seeds, options.sweep_seeds))
    return 0


def _read(path: Path) -> dict[str, Result]:
    """The results in the file, by the runs' keys."""
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            key, result = json.loads(line)
            done[key] = Result(**result)
    return done


if __name__ == "__main__":
    sys.exit(main())
