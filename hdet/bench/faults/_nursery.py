"""Processes of the training program, forked from one that has imported everything: imports take seconds each.

The nursery is an interpreter of its own, without threads. What it forks runs the program and then ends as any Python
program does, so that what happens at the interpreter's end is tried too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HUNG = "hung"
_ROOT = Path(__file__).parents[3]


def _paths() -> list[str]:
    before = os.environ.get("PYTHONPATH")
    return [before] if before else []


class Nursery:
    """Starts processes. Use it as a context."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hdet.bench.faults._nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), *_paths()])},
        )
        self._ended: dict[int, int] = {}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
        """Run ``python -m hdet.train`` with these arguments; returns the process id."""
        question = {"arguments": list(arguments), "environment": dict(environment), "output": str(output)}
        pid = int(self._ask(question))
        self._ended.pop(pid, None)  # of an earlier process with the same number
        return pid

    def statuses(self) -> dict[int, int]:
        """Exit status of every process that has ended, by process id; negative: a signal."""
        self._ended |= {int(pid): status for pid, status in self._ask({}).items()}
        return self._ended

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The nursery has ended, with exit status {self._process.wait()}.")
        return json.loads(answer)


class Group:
    """The processes of one run.

    Args:
        nursery: where they come from.
        output: a file for what they print.
        arguments: of every process; ``of_rank`` has more for some of them.
        processes: how many.
        attempt: how often they have been started before.
    """

    def __init__(
        self,
        nursery: Nursery,
        output: Path,
        arguments: Sequence[str],
        processes: int,
        *,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        attempt: int = 0,
    ) -> None:
        self._nursery = nursery
        facts = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        facts |= {"MASTER_PORT": free_port(), "TORCHELASTIC_RESTART_COUNT": attempt}
        environment = {name: str(value) for name, value in facts.items()}
        self.pids = [
            nursery.start(
                [*arguments, *(of_rank or {}).get(rank, ())],
                environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                output,
            )
            for rank in range(processes)
        ]

    def statuses(self) -> list[int | None]:
        """Exit status of each rank; ``None`` while it runs."""
        ended = self._nursery.statuses()
        return [ended.get(pid) for pid in self.pids]

    def kill(self) -> None:
        """End all that still run, and wait for it."""
        while None in (statuses := self.statuses()):
            for pid, status in zip(self.pids, statuses, strict=True):
                if status is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    def wait(self, limit: float) -> list[int | str]:
        """Exit status of each rank; :data:`HUNG` for what had not ended after ``limit`` seconds, and was killed."""
        deadline = time.monotonic() + limit
        while None in (statuses := self.statuses()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if None in statuses:
            for pid, status in zip(self.pids, statuses, strict=True):
                if status is None:
                    os.kill(pid, signal.SIGUSR1)  # they print where they are
            time.sleep(1.0)
            self.kill()
        return [HUNG if status is None else status for status in statuses]


def free_port() -> int:
    """A port that nobody listens on. Not one of those that the system gives to connections: it might do so before the
    run gets to it."""
    while True:
        port = secrets.choice(range(15_000, 32_000))
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port


def _serve() -> dict[str, Any]:
    """Answer until there is a program to run, in the process that is to run it: what it was asked for."""
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            pid = os.fork()
            if not pid:
                return question
            answer: Any = pid
        else:
            answer = dict(_reap())
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _reap() -> list[tuple[int, int]]:
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def main() -> int:
    """The nursery, and each of its children."""
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard

    import hdet.train.command_line  # noqa: F401
    from hdet.train.__main__ import main as program

    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through again in every process
    question = _serve()
    output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((null, output, output)):
        os.dup2(file, number)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ |= question["environment"]
    sys.argv = ["hdet.train", *question["arguments"]]
    return program()


if __name__ == "__main__":
    sys.exit(main())
