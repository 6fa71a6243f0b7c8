"""Further workloads of the regret benchmark. Their learning rates are the best of a few that are 2 times apart."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn import functional as F

from hdet.bench.regret import data, models
from hdet.bench.regret.workload import Workload, by_name, contrast, squared_error
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of


def _superresolution() -> nn.Sequential:
    def layer(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    return nn.Sequential(layer(1, 16), nn.GELU(), layer(16, 16), nn.GELU(), layer(16, 1))


FURTHER = by_name(
    Workload(
        name="spiral",
        build=functools.partial(models.mlp, 2, 64, 64, 3, activation=nn.ReLU),
        draw=data.draw_spirals,
        validation=functools.partial(data.fixed, data.draw_spirals, 4000, 3),
        loss=F.cross_entropy,
        optimizer="sgd",
        batch_size=64,
        steps=1000,
        tuned=0.4,
    ),
    Workload(
        name="patches",
        build=_superresolution,
        draw=data.draw_patches,
        validation=functools.partial(data.fixed, data.draw_patches, 512, 2),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=16,
        steps=600,
        tuned=0.01,
    ),
    Workload(
        name="residual",
        build=functools.partial(models.Residual, 20, 48, 20, 4),
        draw=data.draw_mixture,
        validation=functools.partial(data.fixed, data.draw_mixture, 4000, 5),
        loss=F.cross_entropy,
        optimizer="sgd",
        weight_decay=1e-4,
        batch_size=64,
        steps=1200,
        tuned=0.4,
    ),
    Workload(
        name="factors",
        build=models.Factors,
        draw=data.draw_ratings,
        validation=functools.partial(data.fixed, data.draw_ratings, 4000, 3),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=256,
        steps=1000,
        tuned=0.01,
    ),
    Workload(
        name="contrast",
        build=models.Contrast,
        draw=data.draw_shifted_digits,
        validation=lambda: data.digits()[1],
        loss=contrast,
        optimizer="adamw",
        batch_size=64,
        steps=700,
        tuned=0.005,
    ),
    Workload(
        name="mixture_adam",
        build=functools.partial(models.mlp, 20, 256, 256, 20, activation=nn.GELU),
        draw=data.draw_mixture,
        validation=functools.partial(data.fixed, data.draw_mixture, 4000, 5),
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.05,
        batch_size=32,
        steps=2000,
        tuned=0.0025,
    ),
    Workload(
        name="diabetes",
        build=functools.partial(models.mlp, 10, 32, 1, activation=nn.ReLU),
        draw=data.draw_diabetes,
        validation=lambda: data.diabetes()[1],
        loss=squared_error,
        optimizer="adamw",
        batch_size=32,
        steps=400,
        tuned=0.00125,
        say="form",
        by_heart=True,
    ),
    Workload(
        name="few_texts",
        build=functools.partial(models.TrigramClassifier, 20),
        draw=data.draw_few_snippets,
        validation=functools.partial(data.fixed, functools.partial(data.draw_snippets, last_fifth=True), 2000, 3),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=32,
        steps=600,
        tuned=0.00125,
        say="form",
        by_heart=True,
    ),
    Workload(
        name="lstm",
        build=functools.partial(models.CharRNN, nn.LSTM, 24, 48),
        draw=functools.partial(data.draw_text, data.source_code),
        validation=functools.partial(data.validation_text, data.source_code),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=32,
        steps=800,
        tuned=0.04,
        say="constants",
    ),
    Workload(
        name="char_lm_small_batch",
        build=models.CharLM,
        draw=functools.partial(data.draw_text, data.source_code),
        validation=functools.partial(data.validation_text, data.source_code),
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=8,
        steps=1200,
        tuned=0.02,
        say="constants",
    ),
    Workload(
        name="gpt_other",
        build=lambda: GPT(ModelConfig(n_layer=3, n_head=4, n_embd=48, block_size=32), 128),
        draw=functools.partial(data.draw_text, data.other_code),
        validation=functools.partial(data.validation_text, data.other_code),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.1,
        batch_size=16,
        steps=1500,
        tuned=0.032,
        say="constants",
    ),
)
"""Three of which, at the end, had no say in anything."""
