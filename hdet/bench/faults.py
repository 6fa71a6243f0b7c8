"""``python -m hdet.bench.faults --runs 20``: does a run survive the death of its processes?

Every run is the training program under torchrun's elastic agent, with local gradients and the paired probe, which have
the most state. While it trains, random processes of it are killed with SIGKILL at random moments: while it starts, in
a step, while it converges or saves. torchrun starts all of them again, and they go on from the last checkpoint. Asked
for:

- no run hangs;
- the checkpoint can be loaded after every kill, and never goes back;
- every run ends with the same parameters, optimizer state and gains as the undisturbed one, bit for bit.

Ends with status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_RUN = [
    "--task.name=digits",
    "--model.channels=4",
    "--train.batch_size=8",
    "--train.eval_every=0",
    "--train.log_every=1",
    "--hdet.converge_every=5",
    "--hdet.spread=0.2",
    "--hdet.gradients=local",
    "--hdet.probe=true",
    "--train.resume=true",
]
_KILLS = 2
"""Most kills in a run; torchrun may restart as often."""


class Run(NamedTuple):
    """What became of one run."""

    kills: list[str]
    """Which process died, and when."""
    seconds: float
    failures: list[str]
    """Empty if all went well."""


class _Launch:
    """The training program under torchrun, in a session of its own."""

    def __init__(self, directory: Path, processes: int, steps: int) -> None:
        self.directory = directory
        self.checkpoint, self._metrics = directory / "checkpoint.pt", directory / "metrics.jsonl"
        self.output = directory.with_suffix(".txt")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        run = [*_RUN, f"--train.total_steps={steps}", f"--train.save_every={max(1, steps // 20)}"]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, f"--max-restarts={_KILLS}", "-m", "hdet.train", *run, f"--train.log_dir={directory}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def workers(self) -> list[int]:
        """Process ids, in the order of the ranks."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:  # it has ended
            return []
        return [int(pid) for pid in children.split()]

    def step(self) -> int:
        """The last step that the run has told of, or -1."""
        try:
            return max(self._metrics.read_text().count('"train_loss"') - 1, -1)
        except OSError:
            return -1

    def saved_step(self) -> int:
        """Of the checkpoint; -1 if there is none. Raises if it cannot be loaded."""
        if not self.checkpoint.exists():
            return -1
        return int(torch.load(self.checkpoint, weights_only=True)["step"])

    def end(self) -> None:
        """Kill whatever still runs."""
        for pid in self.workers():
            _kill(pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fault test; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="disturbed runs")
    parser.add_argument("--processes", type=int, default=3, help="replicas of each")
    parser.add_argument("--steps", type=int, default=200, help="steps of each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a run counts as hanging")
    arguments = parser.parse_args(argv)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        first = _Launch(Path(directory) / "undisturbed", arguments.processes, arguments.steps)
        undisturbed = _watch(first, [], chance, arguments.limit)
        if undisturbed.failures:
            print("The undisturbed run failed:", *undisturbed.failures, first.output.read_text(), sep="\n")
            return 1
        expected = torch.load(first.checkpoint, weights_only=True)
        print(f"undisturbed: {arguments.steps} steps in {undisturbed.seconds:.1f} s\n")
        print(f"{'run':>4}  {'killed':<44} {'seconds':>7}  result", flush=True)
        failed = 0
        for number in range(1, arguments.runs + 1):
            moments = sorted(chance.randrange(-1, arguments.steps) for _ in range(chance.randint(1, _KILLS)))
            launch = _Launch(Path(directory) / f"run{number}", arguments.processes, arguments.steps)
            run = _watch(launch, moments, chance, arguments.limit)
            failures = run.failures or _differences(expected, torch.load(launch.checkpoint, weights_only=True))
            failed += bool(failures)
            result = "; ".join(failures) or "as undisturbed"
            print(f"{number:>4}  {', '.join(run.kills):<44} {run.seconds:>7.1f}  {result}", flush=True)
            if failures:
                print(launch.output.read_text()[-4000:], flush=True)
    print(f"\n{arguments.runs - failed} of {arguments.runs} runs ended as the undisturbed one did")
    return 1 if failed else 0


def _watch(launch: _Launch, moments: Sequence[int], chance: random.Random, limit: float) -> Run:
    """Kill a process at each moment, a step of the run (-1: while it starts), and wait for the end."""
    started = time.monotonic()
    kills: list[str] = []
    failures: list[str] = []
    left, saved = list(moments), -1
    try:
        while launch.process.poll() is None:
            if time.monotonic() - started > limit:
                failures.append(f"no end after {limit:g} s")
                break
            workers = launch.workers()
            if left and workers and launch.step() >= left[0]:
                left.pop(0)
                time.sleep(chance.uniform(0, 0.1))
                rank = chance.randrange(len(workers))
                step = launch.step()
                if not _kill(workers[rank]):
                    continue  # it had ended by itself
                kills.append(f"rank {rank} " + (f"after step {step}" if step >= 0 else "while starting"))
                saved = _check_saved(launch, saved, failures)
                _await_others(workers, started + limit)
            time.sleep(0.005)
        if not failures and launch.process.returncode:
            failures.append(f"exit status {launch.process.returncode}")
        _check_saved(launch, saved, failures)
    finally:
        launch.end()
    return Run(kills, time.monotonic() - started, failures)


def _check_saved(launch: _Launch, before: int, failures: list[str]) -> int:
    """The checkpoint's step; it must be there if it was, and not go back."""
    try:
        now = launch.saved_step()
    except Exception as error:
        failures.append(f"the checkpoint cannot be loaded: {error}")
        return before
    if now < before:
        failures.append(f"the checkpoint went back from step {before} to {now}")
    return now


def _await_others(workers: Sequence[int], deadline: float) -> None:
    """Until torchrun has ended the processes that were left: a second kill is for those that come after."""
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{name} differs"
        for name in ("step", "model", "optimizer", "scheduler")
        if not _same(expected[name], found[name])
    ]


def _same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)  # NaN is NaN


if __name__ == "__main__":
    sys.exit(main())
