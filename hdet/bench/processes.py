"""The benchmark's own processes: started together, ended together, and never left hanging."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    task: Callable[..., Iterable[T]], processes: int, arguments: tuple[Any, ...], *, device: str, limit: float
) -> Iterator[T]:
    """Iterate over ``task(*arguments)`` in every process of a new process group; yields what rank 0 yields, when it
    does.

    Args:
        task: importable, with picklable arguments and results.
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL; gloo for CPU tensors). Rank ``r`` gets GPU ``r``.
        limit: seconds.

    Raises:
        TimeoutError: after ``limit`` seconds; all processes have been killed.
        torch.multiprocessing.ProcessExitedException: if one died; the others have been ended.
        torch.multiprocessing.ProcessRaisedException: the same if one raised; shows its traceback.
    """
    deadline = time.monotonic() + limit
    # Processes are forked from one that has imported torch, which takes seconds, and never touched a GPU.
    mp.get_context("forkserver").set_forkserver_preload(["torch._dynamo", __name__])
    with tempfile.TemporaryDirectory(prefix="hdet-bench-") as folder:
        context = mp.start_processes(
            _enter,
            (task, arguments, processes, folder, device, limit),
            nprocs=processes,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        assert context is not None
        done, count = False, 0
        try:
            while not done:
                done = context.join(timeout=0.5, grace_period=5)
                while (path := _result(folder, count)).exists():
                    yield pickle.loads(path.read_bytes())
                    count += 1
                if not done and time.monotonic() > deadline:
                    raise TimeoutError(f"{processes} processes of the benchmark did not end within {limit:g} s.")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _result(folder: str, number: int) -> Path:
    return Path(folder) / f"result{number}"


def _enter(
    rank: int,
    task: Callable[..., Iterable[T]],
    arguments: tuple[Any, ...],
    size: int,
    folder: str,
    device: str,
    limit: float,
) -> None:
    threads = max(1, cpus() // size)
    torch.set_num_threads(threads)
    # accelerate asks the environment, not torch, who it is.
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": threads}
    os.environ |= {name: str(value) for name, value in facts.items()}
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=limit),
    )
    for number, result in enumerate(task(*arguments)):
        if rank == 0:
            unfinished = Path(folder) / "unfinished"
            unfinished.write_bytes(pickle.dumps(result))
            unfinished.rename(_result(folder, number))
    meet()
    dist.destroy_process_group()


def meet() -> None:
    """A barrier on the CPU, whatever the backends."""
    dist.all_reduce(torch.zeros(1))


def slowest(seconds: float) -> float:
    """The largest of all processes' ``seconds``."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def from_first(value: int) -> int:
    """Rank 0's ``value``."""
    message = torch.tensor(value)
    dist.broadcast(message, src=0)
    return int(message)
