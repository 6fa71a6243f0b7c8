"""Two processes, one of which differs in one setting, tensor or call: does every rank end with an error that names it,
within seconds?"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import hdet
from hdet.bench import processes
from hdet.bench.faults.sections import Outcome, cases

FULL = 70
LIMIT = 20.0
"""Seconds within which every rank must have raised."""
_STEPS = 6


class Run(NamedTuple):
    """What a rank trains with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    """Of the ensemble."""


class Kind(NamedTuple):
    """One way to differ."""

    word: str
    """What the error must contain."""
    change: Callable[[Run, random.Random], Run | None]
    """What rank 1 does to its own run before the ensemble is built; may return another."""
    call: Callable[[hdet.Ensemble, Run, int], object] = lambda ensemble, run, step: None
    """What rank 1 does after each step."""


class Found(NamedTuple):
    """What became of one case on a rank."""

    seconds: float
    error: str
    """Empty if there was none."""


class _Net(nn.Module):
    def __init__(self, names: Sequence[str] = ("first", "second"), width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(width, width) for name in sorted(names)}
        for name in names:
            setattr(self, name, layers[name])
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = dict(self.named_children())
        for name in sorted(layers):
            x = layers[name](x)
        return x


def _setting(name: str, *values: Any, word: str | None = None) -> Kind:
    return Kind(word or name, lambda run, chance: run.settings.update({name: chance.choice(values)}))


def _group(key: str, *values: Any) -> Kind:
    def change(run: Run, chance: random.Random) -> None:
        run.optimizer.param_groups[0][key] = chance.choice(values)

    return Kind(key, change)


def _with_model(word: str, model: Callable[[], nn.Module]) -> Kind:
    def change(run: Run, chance: random.Random) -> Run:
        new = model()
        return Run(new, _adamw(new.parameters()), run.settings | {"model": new})

    return Kind(word, change)


def _with_optimizer(word: str, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Kind:
    return Kind(word, lambda run, chance: run._replace(optimizer=make(run.model)))


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def _probe(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def _probes(run: Run, chance: random.Random) -> None:
    run.settings.update(probe=_probe, auto_lr=True)


def _one_element(run: Run, chance: random.Random) -> None:
    tensor = chance.choice([*run.model.parameters(), *run.model.buffers()])
    with torch.no_grad():
        tensor.view(-1)[chance.randrange(tensor.numel())] += 1e-3


def _frozen(run: Run, chance: random.Random) -> None:
    chance.choice(list(run.model.parameters())).requires_grad_(False)


def _transposed(run: Run, chance: random.Random) -> None:
    weight: Any = next(run.model.parameters())
    weight.data = weight.data.t().contiguous().t()


def _converge_alone(ensemble: hdet.Ensemble, run: Run, step: int) -> None:
    if step == 1:
        ensemble.converge()


def _more_steps(ensemble: hdet.Ensemble, run: Run, step: int) -> None:
    if step == 1:
        ensemble.step(1.0)


def _rebuild(ensemble: hdet.Ensemble, run: Run, step: int) -> None:
    if step == 1:
        again = hdet.Ensemble(run.optimizer, **run.settings)
        run.optimizer.step()
        again.step(1.0)


def _resume(ensemble: hdet.Ensemble, run: Run, step: int) -> None:
    if step == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ensemble.load_state_dict(ensemble.state_dict())


def _reversed_order(model: nn.Module) -> torch.optim.Optimizer:
    return _adamw(list(model.parameters())[::-1])


def _two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return _adamw([{"params": [first]}, {"params": others}])


_NOTHING: Callable[[Run, random.Random], None] = lambda run, chance: None  # noqa: E731
KINDS: dict[str, Kind] = {
    "spread": _setting("spread", 0.1, 0.3),
    "converge_every": _setting("converge_every", 2, 4),
    "seed": _setting("seed", 1, 7),
    "total_steps": _setting("total_steps", 50, 200),
    "auto_lr": _setting("auto_lr", True),
    "controller": Kind(
        "controller",
        lambda run, chance: run.settings.update(
            controller=hdet.controller.Published(momentum=chance.uniform(0.1, 0.8))
        ),
    ),
    "probe": Kind(
        "probe: False on replica 0; True", lambda run, chance: run.settings.update(probe=_probe, auto_lr=True)
    ),
    "gradients": _setting("gradients", "shared"),
    "bucket": _setting("averaging", hdet.Averaging(bucket_mib=1.0), word="averaging.bucket_mib"),
    "overlap": _setting("averaging", hdet.Averaging(overlap_steps=1), word="averaging.overlap_steps"),
    "wire": _setting("averaging", hdet.Averaging(wire_dtype="bfloat16"), word="averaging.wire_dtype"),
    "optimizer_state": _setting("averaging", hdet.Averaging(optimizer_state="keep"), word="averaging.optimizer_state"),
    "outer": _setting("outer", hdet.Outer(momentum=0.9), hdet.Outer(momentum=0.5), word="outer.momentum"),
    "virtual": Kind(
        "virtual_replicas", lambda run, chance: run.settings.update(virtual_replicas=2, gradients="shared")
    ),
    "hyperparameters": _setting("hyperparameters", [hdet.param_group("weight_decay", spread=0.5, move=False)]),
    "schedule": _setting("schedule", lambda step: 0.5, lambda step: 1 / (1 + step), word="schedule"),
    "broadcast": _setting("broadcast", True),
    "weight_decay": _group("weight_decay", 0.0, 0.1, 5.0),
    "betas": _group("betas", (0.9, 0.95), (0.8, 0.999)),
    "eps": _group("eps", 1e-6),
    "amsgrad": _group("amsgrad", True),
    "lr": _group("lr", 1e-3, 0.02),
    "optimizer": _with_optimizer("optimizer", lambda model: torch.optim.Adam(model.parameters(), lr=1e-2)),
    "optimizer's order": _with_optimizer("place in the group", _reversed_order),
    "groups": _with_optimizer("parameter groups", _two_groups),
    "order": _with_model("second", lambda: _Net(("second", "first"))),
    "names": _with_model("third", lambda: _Net(("first", "third"))),
    "one more": _with_model("third", lambda: _Net(("first", "second", "third"))),
    "shape": _with_model("shape", lambda: _Net(width=5)),
    "dtype": _with_model("dtype", lambda: _Net().double()),
    "strides": Kind("strides", _transposed),
    "frozen": Kind("requires_grad", _frozen),
    "one element": Kind("start from different weights", _one_element),
    "excluded": _setting("exclude", "first.*", ["second.weight", "scale"], word="the tensors averaged"),
    "converges alone": Kind("converge()", _NOTHING, _converge_alone),
    "more steps": Kind("steps taken", _NOTHING, _more_steps),
    "resumes alone": Kind("the comparison before step", _NOTHING, _resume),
    "rebuilds": Kind("the first step()", _NOTHING, _rebuild),
}


def generated(count: int, seed: int) -> list[tuple[str, int]]:
    """Names of kinds, every one in turn, each with the seed of its values."""
    chance = random.Random(f"disagreements {seed}")
    names = list(KINDS)
    return [(names[i * len(names) // count if count < len(names) else i % len(names)], chance.getrandbits(32))
            for i in range(count)]  # fmt: skip


def try_one(name: str, seed: int, limit: float = LIMIT) -> Found:
    """Run one case in this process, which is rank 0 or 1. Collective."""
    rank, kind = dist.get_rank(), KINDS[name]
    group = dist.new_group(timeout=timedelta(seconds=limit))
    model = _Net()
    settings: dict[str, Any] = {
        "model": model, "spread": 0.2, "converge_every": 3, "total_steps": 100, "gradients": "local", "replicas": group,
    }  # fmt: skip
    run = Run(model, _adamw(model.parameters()), settings)
    if rank == 1:
        run = kind.change(run, random.Random(seed)) or run
    started = time.monotonic()
    try:
        schedule = run.settings.pop("schedule", None)
        ensemble = hdet.Ensemble(run.optimizer, schedule, **run.settings)
        for step in range(_STEPS):
            generator = torch.Generator().manual_seed(2 * step + rank)
            width = next(p for p in run.model.parameters() if p.dim() == 2).shape[1]
            x = torch.randn(2, width, generator=generator).to(next(run.model.parameters()).dtype)
            loss = run.model(x).square().mean()
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            ensemble.step(loss.detach().float())
            if rank == 1:
                kind.call(ensemble, run, step)
        ensemble.converge()
    except Exception as error:
        return Found(time.monotonic() - started, f"{type(error).__name__}: {error}")
    return Found(time.monotonic() - started, "")


def attempt(given: Sequence[tuple[str, int]]) -> Iterator[list[Found]]:
    """Both ranks' results, case by case."""
    warnings.simplefilter("ignore")
    for name, seed in given:
        found: list[Any] = [None, None]
        dist.all_gather_object(found, try_one(name, seed))
        yield found


def run(share: float, seed: int) -> Outcome:
    """Try the section."""
    tried = generated(cases(FULL, share), seed)
    outcome = Outcome(tried=len(tried))
    limit = 60 + 2 * LIMIT * len(tried)
    for (name, of), found in zip(tried, processes.run(attempt, 2, (tried,), device="cpu", limit=limit), strict=True):
        wrong = [
            f"rank {rank} after {seconds:.1f} s: {error or 'no error'}"
            for rank, (seconds, error) in enumerate(found)
            if KINDS[name].word not in error or seconds > LIMIT
        ]
        if wrong:
            outcome.failures.append(f"{name} (seed {of}), {'; '.join(wrong)}")
        else:
            outcome.refused[name] += 1
    return outcome
