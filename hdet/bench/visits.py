"""Section ``virtual``: an optimizer step with K micro-batches at K virtual replicas' points, against plain gradient
accumulation over the same micro-batches: time, and the peak memory of a process that does nothing else."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import hdet
from hdet.bench import processes
from hdet.bench.measure import OURS, Comparison, alternate
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

_COUNT = 4
_STEPS = 10**6


def measure(models: Sequence[tuple[int, int]], *, repeat: int, seconds: float, limit: float) -> Iterator[Comparison]:
    """GPTs of different width, so of different numbers of parameters per token.

    Args:
        models: width, and sequences of 64 tokens in a micro-batch.
        limit: seconds that a process may take.
    """
    for width, sequences in models:
        config = ModelConfig(n_layer=2, n_embd=width, block_size=64)
        turns: dict[str, Callable[[], float]] = {
            OURS: _step(config, sequences, virtual=_COUNT),
            "accumulation": _step(config, sequences, virtual=1),
        }
        parameters = sum(p.numel() for p in GPT(config, 256).parameters())
        ours, plain = (
            next(iter(processes.run(_peak, 1, (config, sequences, virtual), device="cpu", limit=limit)))
            for virtual in (_COUNT, 1)
        )
        copies = (ours - plain) / (4 * parameters)
        facts = {"parameters": parameters, "micro_batches": _COUNT, "peak_bytes": {OURS: ours, "accumulation": plain}}
        case = f"{parameters / 1e6:.1f}M parameters, {_COUNT} micro-batches of {sequences * 64} tokens"
        case += f", {copies:.1f} copies of the parameters more"
        result = Comparison("virtual", case, facts)
        result.samples = alternate(turns, repeat=repeat, seconds=seconds)
        yield result


def _peak(config: ModelConfig, sequences: int, virtual: int) -> Iterator[int]:
    """Bytes of memory that this process has had at most, after a few steps."""
    step = _step(config, sequences, virtual=virtual)
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield peak if sys.platform == "darwin" else peak * 1024


def _step(config: ModelConfig, sequences: int, *, virtual: int) -> Callable[[], float]:
    model: nn.Module = GPT(config, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = hdet.OneCycleLR(
        optimizer, 1e-3, _STEPS, model=model, spread=0.1, converge_every=_STEPS, virtual_replicas=virtual
    )
    tokens = torch.randint(0, 256, (_COUNT, sequences, 65))

    def step() -> float:
        started = time.perf_counter()
        losses = []
        for batch in scheduler.each(tokens):
            loss = loss_of(model(batch[:, :-1]), batch[:, 1:])
            (loss / _COUNT).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(losses if virtual > 1 else sum(losses) / _COUNT)
        return time.perf_counter() - started

    return step
