"""The runs of the regret benchmark: which there are, how they are made in parallel, and where they are kept."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from hdet.bench.measure import Unavailable
from hdet.bench.processes import cpus
from hdet.bench.regret.contenders import CONTENDERS, ORACLE
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.workloads import STARTS, workload_of

VERSION = 1
"""Raised with every change of a workload or of what all contenders share: all earlier runs are then made again."""
SWEEP = tuple(sorted((*STARTS, 0.5, 2.0)))
"""The starts among which the oracle is found."""


class Run(NamedTuple):
    """What identifies a run."""

    workload: str
    contender: str
    start: float | None
    """max_lr in units of the tuned one. None for a contender that does not use it."""
    seed: int
    steps: int
    version: str


class Result(NamedTuple):
    """How a run ended: with an outcome, or with the reason why there is none."""

    run: Run
    outcome: Outcome | None = None
    error: str = ""
    unavailable: str = ""


def version_of(contender: str) -> str:
    """Of the runs that this code makes."""
    return f"{VERSION}.{CONTENDERS[contender].version}"


def plan(
    workloads: Iterable[str],
    contenders: Sequence[str],
    starts: Iterable[float],
    seeds: int,
    *,
    length: float = 1.0,
) -> list[Run]:
    """All runs that are asked for, and the oracle's sweep, each once.

    Args:
        seeds: how many; they are 0, 1, ...
        length: multiplies the workloads' steps.
    """
    starts = tuple(starts)
    found: dict[Run, None] = {}
    for workload in workloads:
        steps = max(1, round(workload_of(workload).steps * length))
        for name in dict.fromkeys((ORACLE, *contenders)):
            contender = CONTENDERS[name]
            own = sorted({*SWEEP, *starts}) if name == ORACLE else starts if contender.uses_start else (None,)
            version = version_of(name)
            found |= {Run(workload, name, start, seed, steps, version): None for start in own for seed in range(seeds)}
    return sorted(found, key=lambda run: run.seed)  # whatever ends it early, all have as many seeds, nearly


def of_contender(contender: str, workloads: Iterable[str], starts: Sequence[float], seeds: int) -> list[Run]:
    """The runs of one contender, seed by seed: whatever ends them early, all have as many, nearly."""
    return [
        Run(name, contender, start, seed, workload_of(name).steps, version_of(contender))
        for seed in range(seeds)
        for name in workloads
        for start in starts
    ]


def add_options(parser: argparse.ArgumentParser, cache: Path) -> None:
    """``--seeds``, ``--workers`` and ``--cache``, of a command that makes runs once and keeps them."""
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many; default: 1")
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="processes; default: one per CPU")
    parser.add_argument("--cache", type=Path, default=cache, metavar="FILE", help=f"default: {cache}")


# ------------------------------------------------------------------------------------------------------------ to run


def execute(run: Run) -> Result:
    """Make a run on one thread. torch's global generator is left as it was."""
    workload = replace(workload_of(run.workload), steps=run.steps)
    max_lr = workload.tuned * (1.0 if run.start is None else run.start)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return Result(run, CONTENDERS[run.contender].run(workload, max_lr, run.seed))
    except Unavailable as reason:
        return Result(run, unavailable=str(reason))
    except Exception:
        return Result(run, error=traceback.format_exc())
    finally:
        torch.set_num_threads(threads)


def execute_all(runs: Sequence[Run], workers: int) -> Iterator[Result]:
    """Make the runs in that many processes (1: in this one) and yield each when it is there. If a process dies, what
    was left to do is yielded as failed."""
    if workers == 1:
        yield from map(execute, runs)
        return
    with ProcessPoolExecutor(min(workers, max(1, len(runs))), get_context("spawn"), _end_on_interrupt) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield Result(futures[future], error=repr(error)) if error else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_on_interrupt() -> None:
    """Ctrl-C reaches all processes of a terminal: these end without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------- to keep


class Store:
    """The file of all results, one JSON object to a line, each written as soon as the run ends.

    Args:
        path: need not exist. A last line that was not written to its end is removed.

    Raises:
        ValueError: if another line cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcomes: dict[Run, Outcome] = {}
        """Of all finished runs. A failed one is kept in the file only, and is made again."""
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
        for number, line in enumerate(whole.decode().splitlines(), start=1):
            try:
                result = _from_json(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a run ({error!r}). Remove the line.") from None
            if result.outcome:
                self.outcomes[result.run] = result.outcome

    def add(self, result: Result) -> None:
        """Write down a run that has finished or failed."""
        if result.outcome:
            self.outcomes[result.run] = result.outcome
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(result), allow_nan=False) + "\n")


def as_json(result: Result) -> dict[str, Any]:
    """A result as plain values. A number that is not finite is null."""
    found: dict[str, Any] = result.run._asdict()
    if result.outcome is None:
        return found | {"error": result.error or result.unavailable}
    return found | _plain(result.outcome._asdict())


def _from_json(found: dict[str, Any]) -> Result:
    run = Run(*(found[name] for name in Run._fields))
    if "error" in found:
        return Result(run, error=found["error"])
    loss, gain = (math.nan if found[name] is None else found[name] for name in ("loss", "gain"))
    return Result(run, Outcome(loss, found["seconds"], gain, found["details"]))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Misses:
    """Runs without an outcome."""

    failed: list[Result]
    unavailable: dict[str, str]
    """Why, by contender."""

    def told(self, path: Path) -> int:
        """Say which they are, on stderr; returns the exit status.

        Args:
            path: where their errors are written down.
        """
        for name, reason in self.unavailable.items():
            print(f"skipped: {name}: {reason}", file=sys.stderr)
        for run, _, error, _ in self.failed:
            start = "" if run.start is None else f" x{run.start:.3g}"
            last = error.splitlines()[-1]
            print(f"failed: {run.workload} {run.contender}{start} seed {run.seed}: {last}", file=sys.stderr)
        if self.failed:
            print(f"error: {len(self.failed)} runs failed; see {path}", file=sys.stderr)
        return 1 if self.failed else 0


def make(planned: Sequence[Run], store: Store, workers: int) -> Misses:
    """Make the runs that are not in the store, and keep each there when it ends."""
    todo = [run for run in planned if run not in store.outcomes]
    misses = Misses([], {})
    with tqdm(total=len(planned), initial=len(planned) - len(todo), unit="run", file=sys.stderr) as bar:
        for result in execute_all(todo, workers):
            if result.unavailable:
                misses.unavailable[result.run.contender] = result.unavailable
            else:
                store.add(result)
            if result.error:
                misses.failed.append(result)
            bar.update()
    return misses
