"""What a workload of the regret benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from hdet.bench.regret.data import Batch, Draw

STARTS = (0.01, 0.1, 1 / 3, 1.0, 3.0, 8.0)
"""Where runs start: max_lr in units of the tuned one."""

SCHEDULES = ("one_cycle", "cosine", "constant", "wsd")
"""torch's OneCycleLR; or, after a warm-up of 5%, half a ``cosine``, a ``constant``, or ``wsd``: a linear decay over the
last fifth."""

PRECISIONS = ("autocast", "bf16")
"""Beside float32: ``autocast`` computes in bfloat16 and keeps the parameters in float32; ``bf16`` keeps them, their
gradients and the optimizer's state in bfloat16, too."""

Say = Literal["constants", "form", "none"]
"""``constants``: :mod:`hdet.bench.regret.fit` fits the controller's constants on it. ``form``: its runs were looked at
when the controller's equations were chosen, and are in no fit. ``none``: no run of it was looked at before the
controller was as it is."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its data, and a budget. Everything is a function of the seeds passed in."""

    name: str
    build: Callable[[], nn.Module]
    """A new model, with parameters drawn from torch's global generator."""
    draw: Draw
    """A training batch of the given size."""
    validation: Callable[[], Batch]
    loss: Callable[[Any, Tensor], Tensor]
    """Mean loss, from the model's outputs and the targets."""
    optimizer: Literal["sgd", "adamw", "lion", "adafactor", "muon"]
    """SGD with momentum 0.9; AdamW with betas (0.9, 0.95); lion_pytorch's Lion, and torch's Adafactor and Muon, with
    their defaults. Muon takes matrices only, and is scaled to AdamW's learning rates."""
    weight_decay: float = 0.0
    batch_size: int
    """Examples to a step, over all replicas."""
    steps: int
    tuned: float
    """OneCycle's best max_lr."""
    schedule: str = "one_cycle"
    """One of :data:`SCHEDULES`."""
    say: Say = "constants"
    """What of the controller its runs had a say in."""
    by_heart: bool = False
    """Whether it learns its few training examples by heart: training and validation data disagree on the learning rate,
    and summaries show it apart."""
    packages: tuple[str, ...] = ()
    """Modules that its data or its optimizer come from, beside those of the extra ``bench``."""


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over outputs ``(batch, 1)``."""
    return F.mse_loss(outputs.squeeze(-1), targets)


def log_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of logits ``(batch, 1)`` and answers 0 and 1."""
    return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets)


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of counts, from logarithms ``(batch, 1)`` of their means."""
    rates = outputs.squeeze(-1)
    return (rates.exp() - targets * rates + torch.lgamma(targets + 1)).mean()


def contrast(similarities: Tensor, _: Tensor) -> Tensor:
    """Of similarities ``(batch, batch)``: each example's own counterpart is the right one."""
    return F.cross_entropy(similarities, torch.arange(len(similarities)))


def in_precision(workload: Workload, precision: str) -> Workload:
    """The workload in one of :data:`PRECISIONS`. Losses are computed in float32."""
    return replace(workload, build=lambda: _Lower(workload.build(), precision == "bf16"))


class _Lower(nn.Module):
    def __init__(self, model: nn.Module, has_low_weights: bool) -> None:
        super().__init__()
        self._inner = model.to(torch.bfloat16) if has_low_weights else model
        self._has_low_weights = has_low_weights

    def forward(self, inputs: Tensor) -> Any:
        if self._has_low_weights:
            found = self._inner(inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = self._inner(inputs)
        return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, found)


def by_name(*workloads: Workload) -> dict[str, Workload]:
    """The workloads by their names."""
    return {workload.name: workload for workload in workloads}
