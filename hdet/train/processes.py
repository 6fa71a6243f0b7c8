"""The processes of a run: who this one is, which device it uses, and how they start, fail and end together.

A process that fails prints why, with its rank, and tells the others through the store in which they found each other;
in each of them a thread looks there, so that they end too, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hdet.replicas.topology import forget_groups
from hdet.train.config import ConfigError

_LOOK_EVERY = 0.5
_PATIENCE = 5.0
_START = datetime.timedelta(seconds=300)


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


class _Watch:
    """What the processes tell each other beside the collectives, in which a process may be stuck.

    Args:
        store: in which they found each other. In one of the processes it is the server, for as long as it is referred
            to.
        names: what the names in it begin with.
    """

    def __init__(self, store: Any, names: str, rank: int, world_size: int) -> None:
        self._server, self._rank, self._world_size = store, rank, world_size
        # A connection of its own: one that waits for an answer keeps others from asking.
        client = dist.TCPStore(store.host, store.port, is_master=False, timeout=_START, wait_for_workers=False)
        self._store = dist.PrefixStore(names, client)
        self._failing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="hdet-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The run has ended well, on all ranks. The one that may have the store leaves last."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._count("left", wait=not self._rank)

    def fail(self, text: str, status: int) -> NoReturn:
        """Print ``text`` unless another process has failed before, wait until the others know, and end."""
        self._failing.acquire()
        self._ended.set()
        self._thread.join()  # the store's client is not to be shared with it
        first: dict[str, Any] = {"text": None, "status": status}
        with contextlib.suppress(Exception):  # the store has died with its process
            number = self._store.add("failures", 1)
            if number > 1:
                self._store.wait(["failure"], datetime.timedelta(seconds=_PATIENCE))
                first = json.loads(self._store.get("failure"))
        mine = first["text"] is None
        if mine or (status == 2 and text != first["text"]):
            say_error(text)
        with contextlib.suppress(Exception):
            if mine:
                self._store.set("failure", json.dumps({"text": text, "status": status}))
            self._inform(wait=mine)
        leave(first["status"])

    def _look(self) -> None:
        lost = 0.0
        while not self._ended.wait(_LOOK_EVERY):
            try:
                failed, lost = self._store.check(["failure"]), 0.0
            except Exception:
                # The process with the store may only have ended a moment before this one.
                lost = lost or time.monotonic()
                if time.monotonic() - lost > 2 * _PATIENCE and self._failing.acquire(blocking=False):
                    say_error("The process that holds the run's store has ended.")
                    leave(1)
                continue
            if failed and self._failing.acquire(blocking=False):
                status = 1
                with contextlib.suppress(Exception):
                    status = json.loads(self._store.get("failure"))["status"]
                    self._inform(wait=False)
                leave(status)

    def _inform(self, *, wait: bool) -> None:
        """Tell the one that failed first that this one knows; ``wait`` until all do. The one that may have the store
        waits in any case, and a little longer."""
        self._count("informed", wait=wait or not self._rank)
        if not self._rank:
            time.sleep(0.2)

    def _count(self, name: str, *, wait: bool) -> None:
        """Add one to a number, and ``wait``, not for ever, until all processes have."""
        self._store.add(name, 1)
        deadline = time.monotonic() + _PATIENCE
        while wait and self._store.add(name, 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.02)


_watch: _Watch | None = None


def start(device: str) -> Process:
    """Join the process group that torchrun describes in the environment, if it does; choose the device.

    Raises:
        ConfigError: if there are no GPUs, or fewer than local processes.
    """
    rank, local_rank, world_size = (_number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
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
        store = _meet()
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    return Process(rank=rank, world_size=max(1, world_size), device=chosen)


def end() -> None:
    """Leave the process group, all together: a process that leaves early can abort those still talking to it.

    Call it when nothing refers to a model under DistributedDataParallel any more: such a model keeps the process group
    alive, and whoever frees the last reference to a group waits for its threads. If that is the model, it waits with
    Python's lock held, for which a thread of the group may be waiting in turn: the process hangs
    (docs/guides/ending.md).
    """
    global _watch
    if dist.is_initialized():
        gc.collect()  # a trainer is part of cycles
        if torch.cuda.is_initialized():
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()
        if _watch is not None:
            _watch.stop()
            _watch = None
        forget_groups()
        dist.destroy_process_group()


def fail(text: str, status: int) -> int:
    """Say why the run cannot start or go on, and end all of its processes.

    Args:
        text: for the user. If all processes fail alike, one prints it.
        status: 2 for a mistake of the user's, else 1.

    Returns:
        ``status``, where there is one process. Where there are several, none returns from here.
    """
    if _watch is None and "RANK" in os.environ:
        try:
            _meet()
        except Exception as error:
            say_error(f"{text}\n(The other processes could not be told: {error})")
            leave(status)
    if _watch is not None:
        _watch.fail(text, status)
    say_error(text)
    return status


def say_error(text: str) -> None:
    """Print an error, with the rank where there are several."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    where = f" on rank {rank} of {size}" if rank is not None and size != "1" else ""
    print(f"python -m hdet.train: error{where}: {text}", file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End this process at once. Its threads may be waiting for other processes, so that nothing is freed in order."""
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(status)


def _meet() -> dist.Store:
    """The store in which the processes find each other; starts to watch for those that fail.

    torchrun may keep its store when it restarts the processes, and a restarted one would find the addresses of those
    that have died. So each attempt has names of its own. Where each has a store of its own the names are the same: on a
    machine that has joined later torchrun counts fewer restarts.
    """
    global _watch
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    names = f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if keeps_store else '0'}"
    try:
        store, rank, world_size = next(_meetings())
    except ValueError as error:
        raise ConfigError(f"The environment is not as torchrun sets it: {error}") from error
    _watch = _Watch(store, f"{names}/watch", rank, world_size)
    return dist.PrefixStore(names, store)


def _meetings() -> Iterator[Any]:
    return rendezvous("env://", timeout=_START)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise ConfigError(
            f"Invalid {name}={text[:60]!r} in the environment. Must be a whole number, as torchrun sets it."
        )
    return int(text)
