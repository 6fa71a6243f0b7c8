"""The sections of a benchmark: which process measures what, with which settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hdet.bench import converge, graph, kernels, overhead, processes, steps, traffic, visits
from hdet.bench.measure import Comparison
from hdet.bench.shapes import SHAPES

SECTIONS = ("kernels", "step", "virtual", "converge", "overhead", "traffic")
KERNEL_SHAPES = ("resnet50", "gpt2", "tiny")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and for how long."""

    sections: tuple[str, ...] = SECTIONS
    """Some of :data:`SECTIONS`."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes to converge over."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """What is averaged."""
    kernel_shapes: tuple[str, ...] = KERNEL_SHAPES
    """What is packed."""
    models: tuple[tuple[int, int], ...] = ((128, 8), (512, 2))
    """What virtual replicas train; see :func:`.visits.measure`."""
    repeat: int = 25
    """Rounds of one case, at most."""
    seconds: float = 20.0
    """Time for one case, about."""
    converge_every: int = 50
    """Training steps to a round in the sections ``overhead`` and ``traffic``."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: GPUs where there are enough."""
    limit: float = 3600.0
    """Seconds after which a group of processes is killed."""

    def device_for(self, size: int) -> str:
        """Where ``size`` processes measure."""
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= size
        if self.device == "cuda" and not enough:
            say(f"{size} GPUs are needed and there are {torch.cuda.device_count()}: on the CPU instead")
        return "cuda" if enough and self.device != "cpu" else "cpu"


def run(settings: Settings) -> Iterator[Comparison]:
    """Measure everything, in the order of :data:`SECTIONS`, and yield each result when it is there."""
    if "kernels" in settings.sections:
        device = settings.device_for(1)
        say(f"kernels on {device}")
        dtypes = (torch.float32, torch.bfloat16)
        yield from kernels.measure(
            settings.kernel_shapes, dtypes, repeat=settings.repeat, seconds=settings.seconds / 2, device=device
        )
        if device == "cuda":
            say("a CUDA graph of a training step")
            yield from processes.run(
                graph.measure, 1, (settings.repeat, settings.seconds), device=device, limit=settings.limit
            )
        else:
            say("on a GPU there would be more: its copy bandwidth, and a CUDA graph of a training step")
    if "step" in settings.sections:
        say("scheduler.step")
        yield from steps.measure(repeat=settings.repeat, seconds=settings.seconds / 4)
    if "virtual" in settings.sections:
        say("virtual replicas")
        yield from visits.measure(
            settings.models, repeat=settings.repeat, seconds=settings.seconds / 2, limit=settings.limit
        )
    if {"converge", "overhead", "traffic"} & set(settings.sections):
        for size in settings.processes:
            device = settings.device_for(size)
            yield from processes.run(_together, size, (settings, device), device=device, limit=settings.limit)


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"hdet.bench: {what}", file=sys.stderr, flush=True)


def _together(settings: Settings, device: str) -> Iterator[Comparison]:
    """What one group of processes measures."""
    announce = say if dist.get_rank() == 0 else lambda what: None
    with_size = f"with {dist.get_world_size()} processes"
    if "converge" in settings.sections:
        for name in settings.shapes:
            announce(f"converge {name} {with_size}")
            yield converge.measure(SHAPES[name](), repeat=settings.repeat, seconds=settings.seconds, device=device)
    if "overhead" in settings.sections:
        announce(f"overhead {with_size}")
        yield from overhead.measure(
            repeat=settings.repeat, seconds=settings.seconds, converge_every=settings.converge_every
        )
    if "traffic" in settings.sections:
        announce(f"traffic {with_size}")
        yield from traffic.measure(converge_every=settings.converge_every)
