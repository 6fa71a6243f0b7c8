"""Runs whose processes are killed while they start, train and save: do they go on as if nothing had happened?

Every run is the training program with local gradients and the paired probe, which have the most state. While it trains,
random processes of it are killed with SIGKILL: at random moments, and, in every third run, while a checkpoint is
written. Then all are started again, as torchrun would, and go on from the last checkpoint. Asked for:

- no run hangs;
- the checkpoint can be loaded after every kill, and never goes back;
- every run ends with the same parameters, optimizer state and gains as the undisturbed one, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hdet.bench.faults._nursery import Group, Nursery
from hdet.bench.faults.sections import Outcome, cases
from hdet.train import checkpoint

FULL = 100
LIMIT = 240.0
"""Seconds after which a run counts as hanging."""
_PROCESSES, _STEPS, _MOST_KILLS = 2, 40, 2
_RUN = [
    "--task.name=digits",
    "--model.channels=4",
    "--train.batch_size=8",
    "--train.eval_every=0",
    "--train.eval_batches=1",
    "--train.log_every=1",
    "--train.save_every=5",
    f"--train.total_steps={_STEPS}",
    "--hdet.converge_every=5",
    "--hdet.spread=0.2",
    "--hdet.gradients=local",
    "--hdet.probe=true",
    "--train.resume=true",
]


def run(share: float, seed: int) -> Outcome:
    """Try the section."""
    chance = random.Random(f"kills {seed}")
    outcome = Outcome()
    with Nursery() as nursery, tempfile.TemporaryDirectory() as directory:
        undisturbed = _Run(nursery, Path(directory) / "undisturbed")
        failures = undisturbed.watch([], chance, False)
        if failures:
            outcome.tried = 1
            outcome.failures.append(f"the undisturbed run: {'; '.join(failures)}\n{undisturbed.told()}")
            return outcome
        expected = torch.load(undisturbed.checkpoint, weights_only=True)
        for number in range(cases(FULL, share)):
            run = _Run(nursery, Path(directory) / f"run{number}")
            moments = sorted(chance.randrange(-1, _STEPS) for _ in range(chance.randint(1, _MOST_KILLS)))
            failures = run.watch(moments, chance, number % 3 == 0)
            failures = failures or differences(expected, torch.load(run.checkpoint, weights_only=True))
            outcome.tried += 1
            if failures:
                outcome.failures.append(f"{', '.join(run.kills)}: {'; '.join(failures)}\n{run.told()}")
    return outcome


class _Run:
    """One run, and its restarts."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery, self._directory = nursery, directory
        self.checkpoint = directory / "checkpoint.pt"
        self._beside = directory / "checkpoint.pt.tmp"
        self._output = directory.with_suffix(".txt")
        self.kills: list[str] = []
        """Which process died, and when."""

    def told(self) -> str:
        """The end of what it printed."""
        return self._output.read_text(errors="replace")[-2000:]

    def watch(self, moments: list[int], chance: random.Random, while_saving: bool) -> list[str]:
        """Kill a process at each moment, a step of the run (-1: while it starts), and wait for the end; returns what
        went wrong."""
        failures: list[str] = []
        deadline, saved, left = time.monotonic() + LIMIT, -1, list(moments)
        attempt = 0
        group = self._start(attempt)
        while not failures:
            statuses = group.statuses()
            if all(status == 0 for status in statuses):
                break
            if time.monotonic() > deadline:
                failures.append(f"no end after {LIMIT:g} s")
            elif any(statuses):  # one has died: as torchrun does, end the others, and start all again
                if attempt == len(moments):
                    failures.append(f"exit statuses {statuses}")
                else:
                    group.kill()
                    saved = self._check_saved(saved, failures)
                    attempt += 1
                    group = self._start(attempt)
            elif left and self._step() >= left[0]:
                left.pop(0)
                self._await_moment(group, chance, while_saving)
                self._kill(group.pids[0 if while_saving else chance.randrange(_PROCESSES)], group)
            time.sleep(0.002)
        group.kill()
        self._check_saved(saved, failures)
        return failures

    def _start(self, attempt: int) -> Group:
        arguments = [*_RUN, f"--train.log_dir={self._directory}"]
        return Group(self._nursery, self._output, arguments, _PROCESSES, attempt=attempt)

    def _await_moment(self, group: Group, chance: random.Random, while_saving: bool) -> None:
        """Some milliseconds; or until a checkpoint is being written."""
        deadline = time.monotonic() + (5.0 if while_saving else chance.uniform(0, 0.05))
        while time.monotonic() < deadline and not (while_saving and self._beside.exists()):
            if not while_saving:
                time.sleep(0.001)
            elif any(status is not None for status in group.statuses()):
                break

    def _kill(self, pid: int, group: Group) -> None:
        step, saving = self._step(), self._beside.exists()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            when = "while starting" if step < 0 else f"after step {step}"
            self.kills.append(f"rank {group.pids.index(pid)} {when}{', saving' if saving else ''}")

    def _step(self) -> int:
        """The last step that the run has told of, or -1."""
        try:
            return max((self._directory / "metrics.jsonl").read_text().count('"train_loss"') - 1, -1)
        except OSError:
            return -1

    def _check_saved(self, before: int, failures: list[str]) -> int:
        """The checkpoint's step; it must be there if it was, and not go back."""
        try:
            now = checkpoint.load(self.checkpoint, {})["step"] if self.checkpoint.exists() else -1
        except Exception as error:
            failures.append(f"the checkpoint cannot be loaded: {error}")
            return before
        if now < before:
            failures.append(f"the checkpoint went back from step {before} to {now}")
        return now


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The parts of a state that are not the same, bit for bit."""
    return [
        f"{name} differs"
        for name in ("step", "model", "optimizer", "scheduler")
        if not _same(expected[name], found[name])
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)  # NaN is NaN
