"""Section ``virtual``: an optimizer step with K micro-batches at K virtual replicas' points, against plain gradient
accumulation over the same micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import hdet
from hdet.bench.measure import OURS, Comparison, alternate
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

_COUNT = 4
_STEPS = 10**6


def measure(models: Sequence[tuple[int, int]], *, repeat: int, seconds: float) -> Iterator[Comparison]:
    """GPTs of different width, so of different numbers of parameters per token.

    Args:
        models: width, and sequences of 64 tokens in a micro-batch.
    """
    for width, sequences in models:
        config = ModelConfig(n_layer=2, n_embd=width, block_size=64)
        turns: dict[str, Callable[[], float]] = {
            OURS: _step(config, sequences, virtual=_COUNT),
            "accumulation": _step(config, sequences, virtual=1),
        }
        parameters = sum(p.numel() for p in GPT(config, 256).parameters())
        facts = {"parameters": parameters, "micro_batches": _COUNT, "extra_bytes": 8 * parameters}
        case = f"{parameters / 1e6:.1f}M parameters, {_COUNT} micro-batches of {sequences * 64} tokens"
        result = Comparison("virtual", case, facts)
        result.samples = alternate(turns, repeat=repeat, seconds=seconds)
        yield result


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
