"""Short runs of two processes, that end well, stop early, or fail on one rank: does each end, with the right status?"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hdet.bench.faults._nursery import HUNG, Group, Nursery
from hdet.bench.faults.sections import Outcome, cases, tell

FULL = 500
LIMIT = 120.0
"""Seconds after which a run counts as hanging."""
_SIDE_BY_SIDE = 2
_RUN = ["--task.name=digits", "--model.channels=1", "--train.batch_size=2", "--train.total_steps=2"]
_RUN += ["--train.eval_batches=1", "--train.eval_every=0", "--hdet.spread=0.2"]
# What differs from the plain run: for all ranks, for rank 1; and the exit status of all.
_KINDS: dict[str, tuple[list[str], list[str], int]] = {
    "plain": ([], [], 0),
    "baseline": (["--hdet.spread=0"], [], 0),
    "local gradients": (["--hdet.gradients=local"], [], 0),
    "probe": (["--hdet.probe=true"], [], 0),
    "stopped": (["--train.stop_at=1"], [], 0),
    "bad setting on all": (["--model.dropout=2"], [], 2),
    "bad setting on one": ([], ["--optimizer.max_lr=-1"], 2),
    "missing file on one": ([], ["--task.name=text", "--task.path=/nowhere/at/all"], 2),
}
_PLAIN_SHARE = 0.5
"""Of the runs: those without anything special, in which most has been seen to hang."""


def run(share: float, seed: int) -> Outcome:
    """Try the section."""
    chance = random.Random(f"exits {seed}")
    outcome = Outcome()
    with Nursery() as nursery, tempfile.TemporaryDirectory() as directory:
        going: list[tuple[str, Path, Group]] = []
        for number in range(cases(FULL, share)):
            if len(going) == _SIDE_BY_SIDE:
                _finish(*going.pop(0), outcome)
            kind = "plain" if chance.random() < _PLAIN_SHARE else chance.choice(list(_KINDS))
            more, of_one, _ = _KINDS[kind]
            output = Path(directory) / f"{number}.txt"
            arguments = [*_RUN, *more, f"--train.log_dir={directory}/{number}"]
            going.append((kind, output, Group(nursery, output, arguments, 2, of_rank={1: of_one})))
        for run in going:
            _finish(*run, outcome)
    return outcome


def _finish(kind: str, output: Path, group: Group, outcome: Outcome) -> None:
    statuses = group.wait(LIMIT)
    told = output.read_text()
    outcome.tried += 1
    expected = _KINDS[kind][2]
    if HUNG in statuses or any(status != expected for status in statuses):
        outcome.failures.append(tell(f"{kind}: {statuses} instead of {expected} on every rank\n{told[-4000:]}"))
    elif expected and (told.count("error on rank") != 1 or "Traceback" in told):
        outcome.failures.append(f"{kind}: not told once, in words\n{told[-2000:]}")
    elif expected:
        outcome.refused[kind] += 1
