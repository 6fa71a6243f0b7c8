"""Section ``overhead``: training under plain DDP and under hdet, in the same processes: without a probe; and in rounds
of twice the length, without and with one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

import hdet
from hdet.bench.measure import OURS, Comparison, alternate
from hdet.bench.processes import from_first, meet, slowest
from hdet.schedules.forecast import forecast
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

_DDP = "plain_ddp"
# configs/char_lm_demo.yaml
_MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32)
_BATCH, _VOCABULARY = 8, 256


def measure(*, repeat: int, seconds: float, converge_every: int) -> Iterator[Comparison]:
    """Time rounds of ``converge_every`` training steps, one converge to each, of the demo's model; then rounds of twice
    as many, that end without a probe, and with one. Collective.

    Yields:
        Whole rounds; and the part of them spent inside ``scheduler.step``, which shows a difference that is smaller
        than the noise of the whole.
    """
    for length, probes in ((1, False), (2, False), (2, True)):
        yield from _measure(repeat, seconds / 3, converge_every * length, probes)


def _measure(repeat: int, seconds: float, converge_every: int, probes: bool) -> list[Comparison]:
    runs = {name: _Run(converge_every, ours=name == OURS, probes=probes) for name in (OURS, _DDP)}
    inside: dict[str, list[float]] = {name: [] for name in runs}

    def turn(name: str) -> float:
        whole, part = runs[name].round()
        inside[name].append(part)
        return whole

    turns: dict[str, Callable[[], float]] = {name: partial(turn, name) for name in runs}
    samples = alternate(turns, repeat=repeat, seconds=seconds, agree=from_first)
    size = dist.get_world_size()
    facts = {
        "processes": size,
        "converge_every": converge_every,
        "parameters": runs[OURS].parameters,
        "probe": probes,
        "probed_share": _probed_share() if probes else 0.0,
    }
    case = f"{size} processes, T={converge_every}{', probe' * probes}"
    return [
        Comparison("overhead", f"{case}, a round", {**facts, "part": "round"}, samples),
        Comparison(
            "overhead",
            f"{case}, scheduler.step",
            {**facts, "part": "scheduler"},
            {name: values[1:] for name, values in inside.items()},  # the first was the warm-up
        ),
    ]


def _probed_share() -> float:
    """Of a run's rounds, those that end with a probe: until annealing has begun."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    ahead = forecast(OneCycleLR(optimizer, max_lr=0.1, total_steps=1000), optimizer, 1000)
    return ahead.high_until(hdet.controller.Posterior().rest_below)


class _Run:
    """A training run that goes on from round to round."""

    def __init__(self, converge_every: int, *, ours: bool, probes: bool) -> None:
        torch.manual_seed(0)
        self._model = DistributedDataParallel(GPT(_MODEL, _VOCABULARY))
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._steps = converge_every
        self._scheduler = (
            hdet.OneCycleLR(
                self._optimizer,
                max_lr=1e-3,
                total_steps=10**9,
                model=self._model,
                spread=0.3,
                converge_every=converge_every,
                auto_lr=True,
                probe=hdet.Probe(loss_fn=_loss, batches=_batches()) if probes else None,
            )
            if ours
            else OneCycleLR(self._optimizer, max_lr=1e-3, total_steps=10**9)
        )
        self._generator = torch.Generator().manual_seed(dist.get_rank())

    def round(self) -> tuple[float, float]:
        """Seconds of one round, and those inside ``scheduler.step``: the slowest process's."""
        tokens = torch.randint(
            _VOCABULARY, (self._steps, _BATCH, _MODEL.block_size + 1), generator=self._generator
        ).unbind()
        inside = 0.0
        meet()
        started = time.perf_counter()
        for batch in tokens:
            loss = _loss(self._model, batch)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            before = time.perf_counter()
            if isinstance(self._scheduler, hdet.OneCycleLR):
                self._scheduler.step(loss)
            else:
                self._scheduler.step()
            inside += time.perf_counter() - before
        return slowest(time.perf_counter() - started), slowest(inside)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return loss_of(model(batch[:, :-1]), batch[:, 1:])


def _batches() -> Iterator[Tensor]:
    """As large as a step's."""
    while True:
        yield torch.randint(_VOCABULARY, (_BATCH, _MODEL.block_size + 1))
