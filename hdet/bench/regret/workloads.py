"""The workloads of the regret benchmark: small models of different kinds, on data that every machine has."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdet.bench.regret import data, models
from hdet.bench.regret.clean import CLEAN
from hdet.bench.regret.data import Batch
from hdet.bench.regret.further import FURTHER
from hdet.bench.regret.shipped import missing
from hdet.bench.regret.unseen import UNSEEN
from hdet.bench.regret.workload import (
    PRECISIONS,
    SCHEDULES,
    STARTS,
    Workload,
    by_name,
    in_precision,
    log_loss,
    squared_error,
)
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

__all__ = [
    "CLEAN",
    "FIRST",
    "FURTHER",
    "LONGER",
    "MORE",
    "PRECISIONS",
    "SCHEDULES",
    "STARTS",
    "UNSEEN",
    "WORKLOADS",
    "Workload",
    "unavailable",
    "workload_of",
]


@functools.cache
def _pretrained() -> dict[str, Tensor]:
    """A :class:`models.CharLM` after 400 steps on the standard library's source."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = models.CharLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 400, cycle_momentum=False)
    generator = torch.Generator().manual_seed(1234)
    for _ in range(400):
        batch = data.draw_text(data.source_code, 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _fine_tuned() -> models.CharLM:
    model = models.CharLM()
    model.load_state_dict(_pretrained())
    return model


def _masked_loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Over what the model did not see."""
    logits, masked = outputs
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * masked).sum() / masked.sum().clamp(min=1)


def _draw_text_to_copy(size: int, generator: torch.Generator) -> Batch:
    return data.to_copy(data.draw_text(data.source_code, size, generator))


FIRST = by_name(
    Workload(
        name="char_lm",
        build=models.CharLM,
        draw=functools.partial(data.draw_text, data.source_code),
        validation=functools.partial(data.validation_text, data.source_code),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=32,
        steps=600,
        tuned=0.02,
    ),
    Workload(
        name="digits_mlp",
        build=functools.partial(models.mlp, 64, 64, 64, 10, activation=nn.ReLU),
        draw=data.draw_digits,
        validation=lambda: data.digits()[1],
        loss=F.cross_entropy,
        optimizer="sgd",
        batch_size=64,
        steps=600,
        tuned=0.2,
    ),
    Workload(
        name="digits_conv",
        build=models.conv,
        draw=data.draw_shifted_digits,
        validation=lambda: data.digits()[1],
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=32,
        steps=500,
        tuned=0.025,
    ),
    Workload(
        name="regression",
        build=functools.partial(models.mlp, 32, 96, 96, 1, activation=nn.Tanh),
        draw=data.draw_regression,
        validation=functools.partial(data.fixed, data.draw_regression, 2000, 6),
        loss=squared_error,
        optimizer="sgd",
        batch_size=32,
        steps=800,
        tuned=0.1,
    ),
    Workload(
        name="fine_tune",
        build=_fine_tuned,
        draw=functools.partial(data.draw_text, data.other_code),
        validation=functools.partial(data.validation_text, data.other_code),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=32,
        steps=300,
        tuned=0.025,
    ),
    Workload(
        name="vision_transformer",
        build=models.VisionTransformer,
        draw=data.draw_shifted_digits,
        validation=lambda: data.digits()[1],
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.1,
        batch_size=32,
        steps=600,
        tuned=0.012,
    ),
    Workload(
        name="recommender",
        build=models.Recommender,
        draw=data.draw_clicks,
        validation=functools.partial(data.fixed, data.draw_clicks, 4000, 12),
        loss=F.binary_cross_entropy_with_logits,
        optimizer="adamw",
        batch_size=128,
        steps=1000,
        tuned=0.02,
    ),
)
"""The first seven: what is run by default."""

MORE = by_name(
    Workload(
        name="gpt",
        build=lambda: GPT(ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32), 128),
        draw=functools.partial(data.draw_text, data.source_code),
        validation=functools.partial(data.validation_text, data.source_code),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.1,
        batch_size=32,
        steps=600,
        tuned=0.0125,
    ),
    Workload(
        name="masked_lm",
        build=models.MaskedLM,
        draw=_draw_text_to_copy,
        validation=lambda: data.to_copy(data.validation_text(data.source_code)),
        loss=_masked_loss,
        optimizer="adamw",
        batch_size=32,
        steps=600,
        tuned=0.05,
    ),
    Workload(
        name="gru",
        build=functools.partial(models.CharRNN, nn.GRU, 32, 64),
        draw=functools.partial(data.draw_text, data.source_code),
        validation=functools.partial(data.validation_text, data.source_code),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=32,
        steps=500,
        tuned=0.025,
    ),
    Workload(
        name="batch_norm",
        build=functools.partial(models.conv, batch_norm=True),
        draw=data.draw_shifted_digits,
        validation=lambda: data.digits()[1],
        loss=F.cross_entropy,
        optimizer="sgd",
        weight_decay=5e-4,
        batch_size=64,
        steps=400,
        tuned=0.05,
    ),
    Workload(
        name="dropout",
        build=functools.partial(models.mlp, 64, 128, 128, 10, activation=nn.ReLU, dropout=0.3),
        draw=data.draw_digits,
        validation=lambda: data.digits()[1],
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=64,
        steps=600,
        tuned=0.0125,
    ),
    Workload(
        name="autoencoder",
        build=functools.partial(models.mlp, 64, 96, 16, 96, 64, activation=nn.GELU),
        draw=data.draw_images_to_copy,
        validation=lambda: data.to_copy(data.digits()[1]),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=64,
        steps=800,
        tuned=0.025,
    ),
    Workload(
        name="denoiser",
        build=models.Denoiser,
        draw=data.draw_images_to_copy,
        validation=lambda: data.repeated(data.to_copy(data.digits()[1]), 8),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=64,
        steps=800,
        tuned=0.0125,
    ),
    Workload(
        name="photo",
        build=functools.partial(models.mlp, 24, 64, 64, 3, activation=nn.ReLU),
        draw=data.draw_pixels,
        validation=functools.partial(data.fixed, data.draw_pixels, 8000, 5),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=256,
        steps=1000,
        tuned=0.0125,
    ),
    Workload(
        name="friedman",
        build=functools.partial(models.mlp, 10, 64, 64, 1, activation=nn.SiLU),
        draw=data.draw_friedman,
        validation=functools.partial(data.fixed, data.draw_friedman, 4000, 4),
        loss=squared_error,
        optimizer="adamw",
        batch_size=64,
        steps=1000,
        tuned=0.05,
    ),
    Workload(
        name="mixture",
        build=functools.partial(models.mlp, 20, 128, 20, activation=nn.ReLU),
        draw=data.draw_mixture,
        validation=functools.partial(data.fixed, data.draw_mixture, 4000, 5),
        loss=F.cross_entropy,
        optimizer="sgd",
        batch_size=64,
        steps=1000,
        tuned=0.1,
    ),
    Workload(
        name="logistic",
        build=lambda: nn.Linear(50, 1),
        draw=data.draw_half_spaces,
        validation=functools.partial(data.fixed, data.draw_half_spaces, 4000, 5),
        loss=log_loss,
        optimizer="sgd",
        batch_size=32,
        steps=600,
        tuned=0.025,
    ),
    Workload(
        name="snippets",
        build=functools.partial(models.TrigramClassifier, 20),
        draw=data.draw_snippets,
        validation=functools.partial(data.fixed, functools.partial(data.draw_snippets, last_fifth=True), 2000, 3),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=64,
        steps=800,
        tuned=0.025,
    ),
    Workload(
        name="tumours",
        build=functools.partial(models.mlp, 30, 32, 1, activation=nn.ReLU),
        draw=data.draw_tumours,
        validation=lambda: data.tumours()[1],
        loss=log_loss,
        optimizer="sgd",
        weight_decay=1e-3,
        batch_size=32,
        steps=400,
        tuned=0.0125,
        say="form",
        by_heart=True,
    ),
)
"""Added later, to find out where the controller fails."""

_GPT = MORE["gpt"]
LONGER = by_name(
    replace(_GPT, name="gpt_1200", steps=1200, say="form"),
    replace(_GPT, name="gpt_3000", steps=3000, say="form"),
)
"""``gpt`` with two and five times its steps. At 3,000 half the learning rate is 0.7% worse."""

WORKLOADS = FIRST | MORE | FURTHER | LONGER | CLEAN | UNSEEN


def workload_of(name: str) -> Workload:
    """A workload by its name; ``name/cosine`` for one with another schedule than OneCycle's, of :data:`SCHEDULES`,
    ``name/bf16`` for one in another precision than float32, of :data:`PRECISIONS`, and ``name/batch_8`` for one with
    batches of that size."""
    plain, *variations = name.split("/")
    found = WORKLOADS[plain]
    for variation in variations:
        if variation in PRECISIONS:
            found = in_precision(found, variation)
        elif variation in SCHEDULES:
            found = replace(found, schedule=variation)
        else:
            found = replace(found, batch_size=int(variation.removeprefix("batch_")))
    return replace(found, name=name)


def unavailable(names: Iterable[str]) -> str:
    """Why the first of these workloads that cannot run here cannot, and what to do; empty if all can."""
    reasons = ((name, missing(WORKLOADS[name].packages)) for name in names)
    return next((f"{name}: {reason}" for name, reason in reasons if reason), "")
