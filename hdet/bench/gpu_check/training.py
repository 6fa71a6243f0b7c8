"""Part ``training``: a GPT on the standard library's source, from wrong learning rates, with hdet and without.

Forward and backward run in bf16 (autocast), weights and AdamW in fp32, as such models are trained. A step accumulates
four micro-batches; under hdet each of them is a virtual replica. All runs have the same length, the same data and a
clipped gradient, and are scheduled by OneCycle. The tuned learning rate is the best of a sweep of whole runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import hdet
from hdet.bench.gpu_check.place import NoTimeLeft, Place, Row
from hdet.train import data
from hdet.train.config import ModelConfig, TaskConfig
from hdet.train.models import GPT, loss_of

FACTORS = (1 / 30, 1.0, 4.0)
"""Learning rates, in units of the tuned one."""
_SWEEP = (3e-4, 1e-3, 3e-3)
_MICRO_BATCHES = 4
_PROBED = 1.5
"""What a run of hdet takes at most, in runs without it, with five forward passes per round and replica."""
_SHARE = 0.9


@dataclass(frozen=True)
class Size:
    """Of model and runs."""

    model: ModelConfig
    micro_batch: int
    """Windows."""
    steps: int
    """At most."""
    least_steps: int
    validation: int
    """Batches."""


def size_for(place: Place) -> Size:
    """25M parameters; on the CPU next to nothing."""
    if place.is_small:
        return Size(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16), 2, 20, 20, 2)
    return Size(ModelConfig(n_layer=8, n_head=8, n_embd=512, block_size=256), 16, 600, 100, 16)


def measure(place: Place) -> Iterator[Row]:
    """A row for each run, as soon as it has ended; each is kept, and not made again by the next call.

    Raises:
        NoTimeLeft: if not all runs fit into the time.
        RuntimeError: if a run of hdet ends at a loss that is not finite.
    """
    size = size_for(place)
    text = _Text(size, place.device)
    pace = place.keep("seconds per step", partial(_pace, size, text))
    runs = len(_SWEEP) + 1 + (len(FACTORS) - 1) + _PROBED * len(FACTORS)  # the sweep may need one more
    fitting = int(place.left * _SHARE / (runs * pace))
    steps = place.keep("steps", lambda: min(size.steps, fitting))
    if steps < size.least_steps:
        raise NoTimeLeft(f"a step takes {pace * 1e3:.0f} ms, and {steps} steps fit into each of {runs:.0f} runs")

    def trained(lr: float, *, ours: bool) -> dict[str, Any]:
        name = f"{'hdet' if ours else 'OneCycle'} from {lr:.2e}, {steps} steps"
        takes = steps * pace * (_PROBED if ours else 1)
        found: dict[str, Any] = place.keep(name, partial(_train, size, text, lr, steps, ours), takes=takes)
        return found

    parameters = sum(p.numel() for p in GPT(size.model, text.classes).parameters())
    tokens = _MICRO_BATCHES * size.micro_batch * size.model.block_size
    yield Row(
        "model and runs",
        f"GPT of {parameters / 1e6:.2f}M parameters in bf16, {steps} steps of {tokens} tokens and {pace * 1e3:.0f} ms",
        {"parameters": parameters, "steps": steps, "tokens_per_step": tokens, "seconds_per_step": pace},
    )
    losses = {lr: trained(lr, ours=False)["loss"] for lr in _SWEEP}
    tuned = min(losses, key=lambda lr: (not math.isfinite(losses[lr]), losses[lr]))
    if tuned in (_SWEEP[0], _SWEEP[-1]):  # the best may lie beyond
        further = tuned * (_SWEEP[1] / _SWEEP[0]) ** (1 if tuned == _SWEEP[-1] else -1)
        losses[further] = trained(further, ours=False)["loss"]
        tuned = min((tuned, further), key=lambda lr: (not math.isfinite(losses[lr]), losses[lr]))
    best = losses[tuned]
    said = ", ".join(f"{lr:.1e}: {loss:.4f}" for lr, loss in sorted(losses.items()))
    yield Row("sweep: validation loss of OneCycle by max_lr", f"{said}; tuned: {tuned:.1e}", {"tuned": tuned})
    failed = []
    for factor in FACTORS:
        for ours in (False, True):
            run = trained(tuned * factor, ours=ours)
            above = f"{run['loss'] / best - 1:+.1%} of the tuned" if math.isfinite(run["loss"]) else "diverged"
            gain = f", gain {run['gain']:.2f}" if ours else ""
            case = f"{'hdet' if ours else 'OneCycle'} from {_named(factor)} of the tuned rate"
            result = f"validation loss {run['loss']:.4f} ({above}){gain}, {run['seconds']:.0f} s"
            yield Row(case, result, {**run, "factor": factor, "hdet": ours, "above": run["loss"] / best - 1})
            if ours and not math.isfinite(run["loss"]):
                failed.append(case)
    if failed:
        raise RuntimeError(f"No finite loss: {', '.join(failed)}.")


def _named(factor: float) -> str:
    return f"1/{1 / factor:.0f}" if factor < 1 else f"{factor:g} times"


class _Text:
    """The corpus on the device, and each step's windows of it."""

    def __init__(self, size: Size, device: str) -> None:
        source = data.load(TaskConfig(name="char_lm"), size.model.block_size)
        assert isinstance(source, data.Windows)
        self.classes, self._size, self._source, self._device = source.classes, size, source, device
        self._corpus = torch.tensor(source.train, device=device)
        self._window = torch.arange(size.model.block_size + 1, device=device)

    def batches(self, purpose: str) -> Iterator[Tensor]:
        """Tokens ``(micro_batch, block_size + 1)``, the same for every run."""
        generator = torch.Generator().manual_seed(data.step_seed(0, 0, 0, purpose))
        last = len(self._corpus) - len(self._window)
        while True:
            starts = torch.randint(last, (self._size.micro_batch, 1), generator=generator)
            yield self._corpus[starts.to(self._device, non_blocking=True) + self._window].long()

    def validation(self) -> Iterator[data.Batch]:
        """Batches from the end of the corpus, which is not trained on."""
        for i in range(self._size.validation):
            batch = self._source.validation(i, self._size.micro_batch, self._size.validation)
            yield data.Batch(*(t.to(self._device) for t in batch))


def _pace(size: Size, text: _Text) -> float:
    """Seconds of a step without hdet."""
    _train(size, text, 1e-4, 3, False)
    count = 5 if size.steps < 100 else 20
    found: float = _train(size, text, 1e-4, count, False)["seconds"] / count
    return found


def _train(size: Size, text: _Text, lr: float, steps: int, ours: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT(size.model, text.classes).to(text._device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    scheduler: OneCycleLR = (
        hdet.OneCycleLR(
            optimizer,
            lr,
            steps,
            cycle_momentum=False,
            model=model,
            spread=1 / 9,
            auto_lr=True,
            virtual_replicas=_MICRO_BATCHES,
            probe=hdet.Probe(loss_fn=_loss, batches=text.batches("probe")),
        )
        if ours
        else OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    )
    batches = text.batches("training")
    _finish(text._device)
    started = time.perf_counter()
    for _ in range(steps):
        micro_batches: Any = (next(batches) for _ in range(_MICRO_BATCHES))
        losses = []
        for tokens in scheduler.each(micro_batches) if isinstance(scheduler, hdet.OneCycleLR) else micro_batches:
            loss = _loss(model, tokens)
            (loss / _MICRO_BATCHES).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, hdet.OneCycleLR):
            scheduler.step(losses)
        else:
            scheduler.step()
    _finish(text._device)
    seconds = time.perf_counter() - started
    gain = None
    if isinstance(scheduler, hdet.OneCycleLR):
        gain = scheduler.ensemble.gains[0]
        scheduler.close()
    model.eval()
    with torch.no_grad():
        per_batch = [_loss_of(model, batch.inputs, batch.targets).item() for batch in text.validation()]
    return {"loss": math.fsum(per_batch) / len(per_batch), "gain": gain, "seconds": seconds, "lr": lr}


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return _loss_of(model, tokens[:, :-1], tokens[:, 1:])


def _loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return loss_of(model(inputs).float(), targets)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
