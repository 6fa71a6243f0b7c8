"""The processes of a run: who this one is, which device it uses, and how they start, fail and end together."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hdet.replicas.topology import Replicas
from hdet.train.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the run."""

    rank: int
    """Its number in the world; 0 without torchrun."""
    world_size: int
    """Number of processes; 1 without torchrun."""
    device: torch.device
    """Where its replica lives."""

    @property
    def writer(self) -> bool:
        """Whether it prints and writes files."""
        return self.rank == 0


def start(device: str) -> Process:
    """Join the process group that torchrun describes in the environment, if it does; choose the device.

    Raises:
        ConfigError: if there are no GPUs, or fewer than local processes.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count or not torch.cuda.is_available():
            local_size = os.environ.get("LOCAL_WORLD_SIZE", "1")
            raise ConfigError(
                f"Invalid train.device=cuda: processes on this machine: {local_size}, GPUs: {count}, and each process "
                "needs one. Start fewer (--nproc-per-node) or pass --train.device cpu."
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size and not dist.is_initialized():
        # Small messages go over gloo even where parameters are on GPUs: waiting for them does not stop the GPU.
        _join("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    return Process(rank=rank, world_size=max(1, world_size), device=chosen)


def _join(backend: str) -> None:
    """``init_process_group``, also after torchrun has restarted the processes: it may keep its store, where a restarted
    process would find the addresses of those that have died."""
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def end() -> None:
    """Leave the process group, all together: a process that leaves early can abort those still talking to it."""
    if dist.is_initialized():
        if torch.cuda.is_initialized():
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()
        dist.destroy_process_group()


def fail(error: ConfigError) -> int:
    """Say on rank 0 why the run cannot start; exit status 2 for all.

    The others wait until it is said: torchrun ends all processes as soon as the first one has failed.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        _join("gloo")
    if os.environ.get("RANK", "0") == "0":
        print(f"python -m hdet.train: error: {error}", file=sys.stderr, flush=True)
    end()
    return 2


class StopRequest:
    """Turns SIGINT and SIGTERM, on whichever rank, into one decision of all ranks to stop after the same step.

    Signals reach ranks at different moments, so that none may act on its own. Every step ends with an all-reduce of the
    signal's number: one integer, on the CPU, that runs beside the next step and is read after it. Agreeing once per
    round would be cheaper still, but a round may last longer than the 30 s between torchrun's SIGINT and its SIGKILL.

    Args:
        replicas: all processes of the run.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._received = 0
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._drain()

    def after_step(self) -> int:
        """The signal that some rank had received a step ago, or 0. Collective; the same on every rank."""
        agreed = self._drain()
        if not agreed:
            message = torch.tensor(self._received, dtype=torch.int32)
            self._pending = message, self._replicas.all_reduce(message, dist.ReduceOp.MAX)
            if self._replicas.size == 1:
                agreed = self._drain()
        return agreed

    def _drain(self) -> int:
        if self._pending is None:
            return 0
        (message, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        return int(message)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received and number == signal.SIGINT and self._replicas.size == 1:
            raise KeyboardInterrupt  # the second Ctrl-C. With torchrun, one Ctrl-C may arrive more than once.
        self._received = number
