"""Section ``converge``: the time of one average of a model, the slowest process's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdet.bench.contenders import CONTENDERS, Contender
from hdet.bench.measure import Comparison, Unavailable, alternate
from hdet.bench.processes import from_first, meet, slowest
from hdet.bench.shapes import Shape

_PATTERN = 2**20
_COPIES = 5.6
"""Of the model, that one process may hold at once: the parameters, a flat copy, a bucket of the whole and an anchor
that are kept, one temporary; and slack."""


class Model(nn.Module):
    """Parameters and buffers of a shape, that can be made to differ between processes again and again.

    Each tensor holds a stretch of one random pattern, which is another on every process, so that the true mean is known
    without a second model in memory.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(size, device=device) for size in shape.parameters)
        for i, size in enumerate(shape.buffers):
            self.register_buffer(f"statistics{i}", torch.zeros(size, device=device))
        generator = torch.Generator().manual_seed(dist.get_rank())
        self._pattern = torch.randn(2 * _PATTERN, generator=generator)
        self._mean = self._pattern.clone()
        dist.all_reduce(self._mean)
        self._mean /= dist.get_world_size()
        self._pattern, self._mean = self._pattern.to(device), self._mean.to(device)
        self._memory = [p.data for p in self.parameters()]

    @torch.no_grad()
    def diverge(self) -> None:
        """Make this process's tensors its own again, in the memory that they began in."""
        for p, memory in zip(self.parameters(), self._memory, strict=True):
            p.data = memory
        filled = list(self._stretches([*self._memory, *self.buffers()], self._pattern))
        torch._foreach_copy_([part for part, _ in filled], [pattern for _, pattern in filled])

    def holds_mean(self, *, buffers: bool, tolerance: float = 1e-6) -> bool:
        """Whether the parameters (and buffers) of this process are the mean over all, up to rounding."""
        tensors = [p.data for p in self.parameters()] + (list(self.buffers()) if buffers else [])
        return all(
            torch.allclose(part, mean, rtol=1e-5, atol=tolerance) for part, mean in self._stretches(tensors, self._mean)
        )

    @staticmethod
    def _stretches(tensors: Iterable[Tensor], pattern: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i, tensor in enumerate(tensors):
            begin = 977 * i % _PATTERN
            for part in tensor.view(-1).split(_PATTERN):
                yield part, pattern[begin : begin + part.numel()]


def measure(
    shape: Shape,
    *,
    repeat: int,
    seconds: float,
    device: str = "cpu",
    contenders: Mapping[str, Callable[[nn.Module], Contender]] = CONTENDERS,
) -> Comparison:
    """Measure all contenders on one shape. Collective.

    Raises:
        RuntimeError: on every process, naming the contender, if one does not compute the mean.
    """
    size = dist.get_world_size()
    here = torch.device("cuda", dist.get_rank()) if device == "cuda" else torch.device("cpu")
    facts = {
        "shape": shape.name,
        "processes": size,
        "tensors": len(shape.parameters),
        "buffers": len(shape.buffers),
        "parameters": shape.numel,
        "device": device,
        "backend": "nccl" if device == "cuda" else "gloo",
    }
    result = Comparison("converge", f"{shape.name}, {size} processes", facts)
    if from_first(int(device == "cpu" and not _fits(shape, size))):
        result.skipped = dict.fromkeys(contenders, "not enough memory")
        return result
    model = Model(shape, here)
    turns: dict[str, Callable[[], float]] = {}
    cost = 0.0
    for name, build in contenders.items():
        try:
            contender = build(model)
        except Unavailable as reason:
            result.skipped[name] = str(reason)
            continue
        turn = turns[name] = partial(_turn, model, contender)
        turn()  # the second time may go another way than the first
        started = time.perf_counter()
        turn()
        cost += time.perf_counter() - started
        wrong = not model.holds_mean(buffers=contender.averages_buffers, tolerance=contender.tolerance)
        if slowest(wrong):
            raise RuntimeError(f"{name} does not compute the mean of {shape.name} over {size} processes.")
    result.samples = alternate(turns, repeat=repeat, seconds=seconds, agree=from_first, cost=cost)
    del model, turns, contender, turn  # before the next shape takes as much
    gc.collect()
    return result


def _turn(model: Model, contender: Contender) -> float:
    model.diverge()
    contender.prepare()
    _finish_device(model)
    meet()
    started = time.perf_counter()
    contender.average()
    _finish_device(model)
    return slowest(time.perf_counter() - started)


def _finish_device(model: Model) -> None:
    device = model.weights[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fits(shape: Shape, size: int) -> bool:
    """Whether the memory that this machine has left will do; taken to be enough where that is not known."""
    known = Path("/proc/meminfo")
    if not known.exists():
        return True
    available = next(int(x.split()[1]) * 1024 for x in known.read_text().splitlines() if x.startswith("MemAvailable"))
    return 4 * shape.numel * _COPIES * size < available
