"""SIGINT and SIGTERM: one decision of all ranks to stop after the same step, and a second Ctrl-C that ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from hdet.ensemble import Ensemble
from hdet.replicas.topology import Replicas
from hdet.train.config import Config
from hdet.train.processes import leave, say_error

_ONE_PRESS = 1.0
"""Seconds in which several SIGINTs may be one Ctrl-C: the terminal sends it to every process, and torchrun hands on the
one that it got itself."""
_GRACE = 2.0


class StopRequest:
    """Turns SIGINT and SIGTERM, on whichever rank, into one decision of all ranks to stop after the same step.

    Signals reach ranks at different moments, so that none may act on its own. Every step ends with an all-reduce of the
    signal's number: one integer, on the CPU, that runs beside the next step and is read after it. Agreeing once per
    round would be cheaper still, but a round may last longer than the 30 s between torchrun's SIGINT and its SIGKILL.

    A second Ctrl-C raises ``KeyboardInterrupt``. If the main thread is stuck in a collective and does not get to see
    it, a thread ends the process.

    Args:
        replicas: all processes of the run.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._received = 0
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._presses = _Presses(forwarded=replicas.size > 1 and "TORCHELASTIC_RUN_ID" in os.environ)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="hdet-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._left.set()
        os.write(self._write, b"\0")  # closing it is not enough: a process forked meanwhile has it too
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def after_step(self) -> int:
        """The signal that some rank had received a step ago, or 0. Collective; the same on every rank."""
        agreed = self._drain()
        if not agreed:
            message = torch.tensor(self._received, dtype=torch.int32)
            self._pending = message, self._replicas.all_reduce(message, dist.ReduceOp.MAX)
            if self._replicas.size == 1:
                agreed = self._drain()
        return agreed

    def drain(self) -> None:
        """Wait for what is on its way. Collective."""
        self._drain()

    def _drain(self) -> int:
        if self._pending is None:
            return 0
        (message, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        return int(message)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._presses.again():
            raise KeyboardInterrupt
        self._received = number

    def _listen(self) -> None:
        """The interpreter writes the number of every signal into the pipe when it arrives, also while the main thread
        is in a call that does not return."""
        presses = _Presses(forwarded=self._presses.forwarded)
        while number := os.read(self._read, 1)[0]:
            if number == signal.SIGINT and presses.again() and not self._left.wait(_GRACE):
                say_error("interrupted again: ended at once.")
                leave(128 + signal.SIGINT)


class _Presses:
    """Tells a second Ctrl-C from the second signal of one.

    Args:
        forwarded: whether every Ctrl-C may arrive twice.
    """

    def __init__(self, forwarded: bool) -> None:
        self.forwarded = forwarded
        self._count, self._first = 0, 0.0

    def again(self) -> bool:
        """Count one SIGINT; whether it is of another press than the first."""
        self._count += 1
        now = time.monotonic()
        if self._count == 1:
            self._first = now
            return False
        return not self.forwarded or self._count > 2 or now - self._first > _ONE_PRESS


def round_end(config: Config, ensemble: Ensemble | None, step: int) -> int:
    """The first step from ``step`` on at which the uninterrupted run makes all replicas equal too, so that a run
    that stops there can be resumed bit for bit. With ``overlap_steps`` that is where it validates or saves."""
    if ensemble is None:
        return step
    every = [ensemble.settings.converge_every]
    if config.hdet.averaging.overlap_steps:
        every = [n for n in (config.train.eval_every, config.train.save_every) if n]
    return min([config.train.total_steps, *(-(-step // n) * n for n in every)])
