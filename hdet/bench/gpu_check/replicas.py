"""Parts ``nccl`` and ``two_processes``: hdet among processes, as far as one card allows.

NCCL wants a card for each process. So one process trains over NCCL, whose micro-batches are virtual replicas; and two
processes share the card, whose tensors travel over gloo.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hdet
from hdet.bench import processes
from hdet.bench.gpu_check.place import VOCABULARY, Place, Row, random_walks
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

_VIRTUAL, _EVERY, _ROUNDS, _BATCH = 4, 5, 4, 4
_LR, _TOLERANCE = 1e-3, 2e-2


def nccl(place: Place) -> Iterator[Row]:
    """Raises RuntimeError if the run over NCCL ends elsewhere than the same run on the CPU without a process group."""
    config = _config(place)
    found: dict[str, Any] = next(
        iter(processes.run(_one_process, 1, (config, place.device), device=place.device, limit=place.left))
    )
    equal = all(abs(found[name] / found[f"{name}_on_cpu"] - 1) < _TOLERANCE for name in ("gain", "loss"))
    if not (equal and found["loss"] < found["loss_before"]):
        raise RuntimeError(f"The run in a process group ends elsewhere than the same without one: {found}")
    yield Row(
        f"one process over {found['backend']}, {_VIRTUAL} virtual replicas, probe, {_ROUNDS} rounds of {_EVERY} steps",
        f"loss {found['loss']:.4f} and gain {found['gain']:.3f}; on the CPU without a process group "
        f"{found['loss_on_cpu']:.4f} and {found['gain_on_cpu']:.3f} (before: {found['loss_before']:.4f}); "
        f"{found['seconds'] * 1e3:.0f} ms a step",
        found,
    )


def two_processes(place: Place) -> Iterator[Row]:
    """Raises RuntimeError if the two replicas do not part, or do not become equal, or not the mean."""
    found: dict[str, Any] = next(
        iter(processes.run(_two_processes, 2, (_config(place), place.device), device="cpu", limit=place.left))
    )
    if not (found["parted"] > 0 and found["equal"] and found["off_the_mean"] < 1e-5):
        raise RuntimeError(f"Two replicas on one device are not averaged as they must be: {found}")
    yield Row(
        f"two replicas on one device, {found['wire']} wires over gloo, {_ROUNDS} rounds of {_EVERY} steps",
        f"part by {found['parted']:.1e}, then equal bit for bit, {found['off_the_mean']:.0e} off the mean; "
        f"{found['bytes'] / 2**20:.1f} MiB in {found['seconds'] * 1e3:.0f} ms",
        found,
    )


def _config(place: Place) -> ModelConfig:
    small = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    return small if place.is_small else ModelConfig(n_layer=4, n_head=8, n_embd=256, block_size=128)


def _one_process(config: ModelConfig, device: str) -> Iterator[dict[str, Any]]:
    _few_threads(device)
    on_card, on_cpu = _trained(config, device, in_group=True), _trained(config, "cpu", in_group=False)
    yield {**on_card, **{f"{name}_on_cpu": value for name, value in on_cpu.items()}}


def _few_threads(device: str) -> None:
    """On the CPU all is small."""
    if device == "cpu":
        torch.set_num_threads(1)


def _trained(config: ModelConfig, device: str, *, in_group: bool) -> dict[str, Any]:
    """Backend, losses, gain and seconds per step of a few rounds of virtual replicas."""
    torch.manual_seed(0)
    bare = GPT(config, VOCABULARY).to(device)
    model = DistributedDataParallel(bare) if in_group else bare
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    scheduler = hdet.OneCycleLR(
        optimizer,
        _LR,
        100 * _EVERY,
        model=model,
        spread=0.3,
        converge_every=_EVERY,
        auto_lr=True,
        virtual_replicas=_VIRTUAL,
        probe=hdet.Probe(loss_fn=_loss, batches=_tokens(config, device, 1)),
    )
    batches, fixed = _tokens(config, device, 0), next(_tokens(config, device, 2))
    with torch.no_grad():
        before = _loss(bare, fixed).item()
    started = time.perf_counter()
    for _ in range(_ROUNDS * _EVERY):
        losses = []
        for tokens in scheduler.each(next(batches) for _ in range(_VIRTUAL)):
            loss = _loss(model, tokens)
            (loss / _VIRTUAL).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(losses)
    seconds = (time.perf_counter() - started) / (_ROUNDS * _EVERY)
    gain = scheduler.ensemble.gains[0]
    scheduler.close()
    backend = "no process group"
    if in_group:
        told = torch.ones(8, device=device)
        dist.all_reduce(told)  # the card's backend, which a single replica does not need
        backend = str(dist.get_backend_config(dist.group.WORLD)).split(",")[-1].split(":")[-1]
    with torch.no_grad():
        after = _loss(bare, fixed).item()
    return {"backend": backend, "loss_before": before, "loss": after, "gain": gain, "seconds": seconds}


def _two_processes(config: ModelConfig, device: str) -> Iterator[dict[str, Any]]:
    _few_threads(device)
    torch.manual_seed(0)
    model = GPT(config, VOCABULARY).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = _ROUNDS * _EVERY
    settings: dict[str, Any] = {"model": model, "spread": 0.3, "converge_every": 10 * steps, "gradients": "local"}
    scheduler = hdet.OneCycleLR(optimizer, _LR, 100 * steps, **settings)
    batches = _tokens(config, device, dist.get_rank())
    for i in range(steps):
        loss = _loss(model, next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        if (i + 1) % _EVERY == 0 and i + 1 < steps:
            scheduler.converge()
    own = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    mean = own.double()
    dist.all_reduce(mean)
    mean /= 2
    started = time.perf_counter()
    report = scheduler.converge()
    seconds = processes.slowest(time.perf_counter() - started)
    assert report is not None
    after = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    theirs = after.clone()
    dist.broadcast(theirs, src=0)
    yield {
        "wire": str(scheduler.ensemble.replicas.device_for(next(model.parameters())).type),
        "parted": float((own.double() - mean).norm() / mean.norm()),
        "equal": processes.slowest(0.0 if torch.equal(after, theirs) else 1.0) == 0,
        "off_the_mean": float((after.double() - mean).norm() / mean.norm()),
        "bytes": report.converge_bytes,
        "seconds": seconds,
    }
    scheduler.close()


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return loss_of(model(tokens[:, :-1]), tokens[:, 1:])


def _tokens(config: ModelConfig, device: str, seed: int) -> Iterator[Tensor]:
    return (tokens.to(device) for tokens in random_walks(_BATCH, config.block_size, seed))
