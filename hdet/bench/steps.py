"""Section ``step``: what ``scheduler.step(loss)`` costs between two converges, against torch's OneCycleLR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

import hdet
from hdet.bench.measure import OURS, Comparison, alternate, repeated

_STEPS = 10**9


def measure(*, repeat: int, seconds: float) -> Iterator[Comparison]:
    """Host time of one call, for 1, 8 and 64 parameter groups; also with a float as the loss, and with learning rates
    that are tensors."""
    for groups in (1, 8, 64):
        model = nn.ModuleList(nn.Linear(4, 4) for _ in range(groups))
        loss = torch.tensor(0.5)
        ours, off, theirs = _scheduler(model, 1 / 9), _scheduler(model, 0.0), _scheduler(model, None)
        calls: dict[str, Callable[[], None]] = {
            OURS: partial(ours.step, loss),
            "torch": theirs.step,
            "hdet_float_loss": partial(ours.step, 0.5),
            "hdet_spread_0": off.step,
            "hdet_tensor_lr": partial(_scheduler(model, 1 / 9, tensors=True).step, loss),
            "torch_tensor_lr": _scheduler(model, None, tensors=True).step,
        }
        turns = {name: repeated(call, at_least=1e-2) for name, call in calls.items()}
        result = Comparison("step", f"{groups} parameter group{'s' * (groups > 1)}", {"groups": groups})
        result.samples = alternate(turns, repeat=repeat, seconds=seconds)
        yield result


def _scheduler(model: nn.ModuleList, spread: float | None, *, tensors: bool = False) -> Any:
    """hdet's with a spread, or torch's for ``None``."""
    rates = [torch.tensor(0.1) if tensors else 0.1 for _ in model]
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model, rates, strict=True)]
    optimizer = SGD(groups, momentum=0.9)
    scheduler: OneCycleLR
    if spread is None:
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=_STEPS)
    elif spread == 0:
        scheduler = hdet.OneCycleLR(optimizer, 0.1, total_steps=_STEPS)
    else:
        scheduler = hdet.OneCycleLR(
            optimizer, 0.1, total_steps=_STEPS, model=model, spread=spread, converge_every=_STEPS
        )
    optimizer.step()  # torch warns of a scheduler that steps before its optimizer
    return scheduler
