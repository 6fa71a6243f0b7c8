"""The contenders beside hdet: plain training loops on one model, with the full batch.

All start from the same parameters, see the same batches (:func:`population` draws its own) and clip gradients to norm
1. Each takes ``(workload, max_lr, seed)`` and returns the final validation loss, which is not finite if it diverged.
What needs a learning rate gets OneCycle's, in absolute terms: also where an optimizer's own scale is another.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from hdet import schedules
from hdet.bench.measure import Unavailable
from hdet.bench.regret.data import Batch
from hdet.bench.regret.workloads import Workload

BETAS = (0.9, 0.95)
_WARM_UP = 0.05
_MEMBERS = 4
_TURNS = 20

# --------------------------------------------------------------------------------------------- what all contenders do


def build(workload: Workload, seed: int) -> nn.Module:
    """The model that a run with this seed starts from."""
    torch.manual_seed(seed)
    return workload.build()


def batches(seed: int) -> torch.Generator:
    """Where a run's batches are drawn from."""
    return torch.Generator().manual_seed(seed + 100)


def optimizer_of(workload: Workload, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """A new optimizer of the workload's kind, for what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = workload.weight_decay
    if workload.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=decay)
    if workload.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=decay)
    if workload.optimizer == "lion":
        return _library("lion_pytorch").Lion(trained, lr=lr, weight_decay=decay)
    if workload.optimizer == "adafactor":
        return torch.optim.Adafactor(trained, lr=lr, weight_decay=decay)
    if not hasattr(torch.optim, "Muon"):
        raise Unavailable(f"torch {torch.__version__} has no Muon: torch 2.9 and newer have")
    return torch.optim.Muon(trained, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


def schedule_of(workload: Workload, optimizer: torch.optim.Optimizer, max_lr: float, steps: int) -> LRScheduler:
    """The workload's schedule with this peak, over ``steps`` steps."""
    if workload.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr, steps, cycle_momentum=False)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = max_lr
    warm_up = max(1, round(_WARM_UP * steps))
    shape: Callable[[int], float]
    if workload.schedule == "cosine":
        shape = schedules.cosine(total_steps=steps, warmup_steps=warm_up)
    elif workload.schedule == "wsd":
        shape = schedules.warmup_stable_decay(total_steps=steps, decay_steps=steps // 5, warmup_steps=warm_up)
    else:
        shape = schedules.constant(warmup_steps=warm_up)
    return LambdaLR(optimizer, shape)


def backward(workload: Workload, model: nn.Module, batch: Batch) -> float:
    """Leave the batch's gradient in ``p.grad``, clipped to norm 1; returns the loss."""
    model.zero_grad()
    loss = workload.loss(model(batch.inputs), batch.targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def evaluate(workload: Workload, model: nn.Module, batch: Batch) -> float:
    """Loss in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = workload.loss(model(batch.inputs), batch.targets).item()
    model.train(was_training)
    return loss


def train(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None,
    seed: int,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train to the end and return the validation loss, or NaN as soon as a loss is not finite: with clipping, the
    parameters never are again."""
    generator = batches(seed)
    for _ in range(workload.steps):
        if not math.isfinite(backward(workload, model, workload.draw(workload.batch_size, generator))):
            return math.nan
        optimizer.step()
        after_step()
        if schedule:
            schedule.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return evaluate(workload, model, workload.validation())


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from None


# ------------------------------------------------------------------------------------------------------------- peers


def one_cycle(workload: Workload, max_lr: float, seed: int) -> float:
    """torch's OneCycleLR, or the schedule asked for, with the workload's optimizer. The best of its sweep is the
    oracle."""
    model = build(workload, seed)
    optimizer = optimizer_of(workload, model, max_lr)
    return train(workload, model, optimizer, schedule_of(workload, optimizer, max_lr, workload.steps), seed)


def schedule_free(workload: Workload, max_lr: float, seed: int) -> float:
    """schedulefree's own SGD or AdamW: averages of the iterates for a schedule, 5% warm-up."""
    library = _library("schedulefree")
    model = build(workload, seed)
    common = {
        "lr": max_lr,
        "weight_decay": workload.weight_decay,
        "warmup_steps": max(1, round(_WARM_UP * workload.steps)),
    }
    if workload.optimizer == "sgd":
        optimizer = library.SGDScheduleFree(model.parameters(), momentum=0.9, **common)
    else:
        optimizer = library.AdamWScheduleFree(model.parameters(), betas=BETAS, **common)
    optimizer.train()
    return train(workload, model, optimizer, None, seed)


def prodigy(workload: Workload, max_lr: float, seed: int) -> float:
    """prodigyopt's own Prodigy, lr = 1 with cosine annealing: Adam that estimates its step size. Knows no max_lr."""
    library = _library("prodigyopt")
    model = build(workload, seed)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
        optimizer = library.Prodigy(model.parameters(), lr=1.0, betas=BETAS, weight_decay=workload.weight_decay)
    return train(workload, model, optimizer, CosineAnnealingLR(optimizer, workload.steps), seed)


def d_adaptation(workload: Workload, max_lr: float, seed: int) -> float:
    """dadaptation's own SGD or Adam, lr = 1 with cosine annealing: estimates its step size. Knows no max_lr."""
    library = _library("dadaptation")
    model = build(workload, seed)
    common = {"lr": 1.0, "weight_decay": workload.weight_decay}
    if workload.optimizer == "sgd":
        optimizer = library.DAdaptSGD(model.parameters(), momentum=0.9, **common)
    else:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
            optimizer = library.DAdaptAdam(model.parameters(), betas=BETAS, decouple=True, **common)
    return train(workload, model, optimizer, CosineAnnealingLR(optimizer, workload.steps), seed)


def dog(workload: Workload, max_lr: float, seed: int) -> float:
    """dog-optimizer's own layer-wise DoG, an SGD whose step is the distance from the start over the gradients so far,
    and its polynomial average of the iterates, which is judged. Knows no max_lr."""
    library = _library("dog")
    model = build(workload, seed)
    optimizer = library.LDoG([p for p in model.parameters() if p.requires_grad], weight_decay=workload.weight_decay)
    average = library.PolynomialDecayAverager(model)
    loss = train(workload, model, optimizer, None, seed, after_step=average.step)
    return evaluate(workload, average.averaged_model, workload.validation()) if math.isfinite(loss) else loss


def mechanic(workload: Workload, max_lr: float, seed: int) -> float:
    """mechanic-pytorch's own tuner of the scale of all updates, around the workload's optimizer with lr = 1 and the
    workload's schedule. Knows no max_lr."""
    library = _library("mechanic_pytorch")
    model = build(workload, seed)
    plain = optimizer_of(workload, model, 1.0)
    optimizer = library.mechanize(type(plain))(plain.param_groups[0]["params"], **_options(plain))
    return train(workload, model, optimizer, schedule_of(workload, optimizer, 1.0, workload.steps), seed)


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What its class was called with, so that another of the class can be made."""
    known = inspect.signature(type(optimizer).__init__).parameters
    return {name: value for name, value in optimizer.defaults.items() if name in known}


def nadamw_cosine(workload: Workload, max_lr: float, seed: int) -> float:
    """torch's NAdam with decoupled weight decay, 5% linear warm-up and a cosine: also where the workload's optimizer is
    SGD, whose max_lr is far too large for it."""
    model = build(workload, seed)
    optimizer = torch.optim.NAdam(
        model.parameters(), lr=max_lr, betas=BETAS, weight_decay=workload.weight_decay, decoupled_weight_decay=True
    )
    warm_up = max(1, round(_WARM_UP * workload.steps))

    def shape(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, workload.steps - warm_up))

    return train(workload, model, optimizer, LambdaLR(optimizer, shape), seed)


# --------------------------------------------------------------------------------------- population-based training


@dataclass
class _Member:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    max_lr: float
    losses: deque[float]
    """Of the last training batches; not finite from the first such one on."""

    def copy(self, other: _Member) -> None:
        """Take over another member's parameters and optimizer state."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.losses = other.losses.copy()


def population(workload: Workload, max_lr: float, seed: int) -> float:
    """Population-based training: 4 members with a quarter of the batch each, so that all see as many examples together
    as the others see alone. max_lr starts log-uniform within a factor of 3; 20 times in a run the worst member on a
    common batch becomes a copy of the best, with its max_lr times 0.8 or 1.25. The member with the best last training
    batches is the result."""
    generator, own = batches(seed), torch.Generator().manual_seed(seed + 200)
    start = build(workload, seed)
    every = max(1, workload.steps // _TURNS)
    members = []
    for exponent in torch.empty(_MEMBERS).uniform_(-1, 1, generator=own).tolist():
        model = copy.deepcopy(start)
        members.append(
            _Member(model, optimizer_of(workload, model, max_lr), max_lr * 3.0**exponent, deque(maxlen=every))
        )

    for step, scale in enumerate(shape_of(workload)):
        for member in members:
            for group in member.optimizer.param_groups:
                group["lr"] = member.max_lr * scale
            batch = workload.draw(workload.batch_size // _MEMBERS, generator)
            member.losses.append(backward(workload, member.model, batch))
            member.optimizer.step()
        if (step + 1) % every == 0 and step + 1 < workload.steps:
            common = workload.draw(workload.batch_size, own)
            losses = [_finite(evaluate(workload, member.model, common)) for member in members]
            best, worst = losses.index(min(losses)), losses.index(max(losses))
            if best != worst:
                members[worst].copy(members[best])
                factor = 1.25 if torch.rand((), generator=own) < 0.5 else 0.8
                members[worst].max_lr = members[best].max_lr * factor

    result = min(members, key=lambda member: _finite(sum(member.losses)))
    return evaluate(workload, result.model, workload.validation())


def shape_of(workload: Workload) -> list[float]:
    """The schedule's learning rates for a max_lr of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = schedule_of(workload, optimizer, 1.0, workload.steps)
    shape: list[float] = []
    for _ in range(workload.steps):
        shape.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return shape


def _finite(loss: float) -> float:
    """The loss, comparable: infinite where it is NaN."""
    return loss if math.isfinite(loss) else math.inf
