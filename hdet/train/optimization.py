"""The optimizer and the schedule around it: the one place of this program where hdet comes in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import hdet
from hdet import schedules
from hdet.lr_scheduler import length_of, recompute
from hdet.monitor.base import Monitor
from hdet.observe.probe import LossFunction
from hdet.replicas.topology import ReplicasLike
from hdet.train.config import Config, ConfigError, OptimizerConfig
from hdet.train.shared import SHARED


def build_optimizer(config: OptimizerConfig, model: nn.Module, device: torch.device) -> Optimizer:
    """The optimizer, with the groups ``decay`` (two and more dimensions) and ``no_decay`` (the rest)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"name": "no_decay", "params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.known_max_lr, momentum=config.momentum)
    return AdamW(groups, lr=config.known_max_lr, betas=config.betas, fused=device.type == "cuda")


def find_max_lr(
    config: OptimizerConfig,
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    device: torch.device,
    *,
    auto_lr: bool,
) -> hdet.LRFinding:
    """``optimizer.max_lr=auto``: what ``hdet.find_lr`` finds, under this configuration's clipping. Collective.

    Raises:
        HdetError: on every rank, if no learning rate lowers the loss.
    """
    optimizer = build_optimizer(replace(config, max_lr=1.0), model, device)
    model.train()
    return hdet.find_lr(model, optimizer, loss_fn, batches, max_grad_norm=config.grad_clip or None, auto_lr=auto_lr)


class Schedule:
    """One face for hdet's schedulers and, with ``hdet.spread=0``, for torch's own.

    Args:
        config: the run; ``max_lr`` has been found.
        optimizer: on which the schedule is built.
        model: what is averaged.
        monitors: where the ensemble's reports go.
        probe: for ``hdet.probe=true``.
        replicas: who they are, for hdet.
        build: ``build(class, *args, **settings)`` makes a scheduler where hdet is not told optimizer, model and
            replicas, but finds them itself; default: on ``optimizer``.

    Raises:
        ConfigError: if the sections ``schedule`` or ``hdet`` do not make a schedule.
    """

    def __init__(
        self,
        config: Config,
        optimizer: Optimizer,
        model: nn.Module,
        monitors: list[Monitor],
        probe: hdet.Probe | None = None,
        replicas: ReplicasLike = None,
        build: Callable[..., Any] | None = None,
    ) -> None:
        try:
            explored = {} if config.hdet.is_baseline else _explore(config, model)
            self._scheduler = _build(
                config, optimizer, model, monitors, probe, replicas, build, list(explored.values())
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"In the sections schedule and hdet: {error}") from error
        scheduler = self._scheduler
        self._base: Any = scheduler.schedule if isinstance(scheduler, hdet.Ensemble) else scheduler
        self._length = length_of(self._base)
        if isinstance(self._base, LambdaLR):  # loading a state writes into these
            self._length = {"lr_lambdas": copy.deepcopy(self._base.lr_lambdas)}
        self.ensemble = scheduler if isinstance(scheduler, hdet.Ensemble) else getattr(scheduler, "ensemble", None)
        """The ensemble; ``None`` for the baseline."""
        self.label_smoothing: Any = explored.get("label_smoothing", config.optimizer.label_smoothing)
        """Of the training loss, read anew in every step: ``float()`` of it is this replica's value now."""

    def step(self, loss: torch.Tensor | list[torch.Tensor]) -> None:
        """Call after ``optimizer.step()``. Collective at the end of a round."""
        if isinstance(self._scheduler, LambdaLR):
            self._scheduler.step()
        else:
            self._scheduler.step(loss)

    def converge(self) -> None:
        """Make all replicas equal. Collective."""
        if not isinstance(self._scheduler, LambdaLR):
            self._scheduler.converge()

    def each(self, micro_batches: Iterable[int]) -> Iterable[int]:
        """The micro-batches of a step, one for each virtual replica."""
        return micro_batches if isinstance(self._scheduler, LambdaLR) else self._scheduler.each(micro_batches)

    @property
    def gains(self) -> dict[str, float]:
        """The gain of every parameter group; 1 in the baseline."""
        groups = self._scheduler.optimizer.param_groups
        gains = [1.0] * len(groups) if self.ensemble is None else self.ensemble.gains
        return {group["name"]: gain for group, gain in zip(groups, gains, strict=True)}

    @property
    def base_lr(self) -> float:
        """Schedule x gain of the first parameter group: the same on every rank."""
        if self.ensemble is None:
            return float(self._scheduler.get_last_lr()[0])
        return float(self.ensemble.get_base_lr()[0]) * self.ensemble.gains[0]

    def state_dict(self) -> dict[str, Any]:
        """Equal on every rank after :meth:`converge`."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; load the model and the optimizer first."""
        self._scheduler.load_state_dict(state)

    def continue_at(self, step: int) -> None:
        """After :meth:`load_state_dict` of a run of another length: the schedule for this run's length, at ``step``."""
        vars(self._base).update(self._length)
        recompute(self._base, step)
        if self.ensemble is not None:
            self.ensemble.resume_at(step, [group["lr"] for group in self._base.optimizer.param_groups])


def _explore(config: Config, model: nn.Module) -> dict[str, hdet.Hyperparameter]:
    """``hdet.hyperparameters``, by name."""
    spreads, optimizer = config.hdet.hyperparameters, config.optimizer
    momentum = "momentum" if optimizer.name == "sgd" else "betas[0]"
    kinds: dict[str, Callable[[float], hdet.Hyperparameter]] = {
        "weight_decay": lambda spread: hdet.param_group("weight_decay", spread=spread),
        "momentum": lambda spread: hdet.param_group(momentum, spread=spread, name="momentum"),
        "dropout": lambda spread: hdet.module_attribute(
            model, nn.Dropout, "p", spread=spread, bounds=(0, 0.95), name="dropout"
        ),
        "label_smoothing": lambda spread: hdet.scalar(
            "label_smoothing", optimizer.label_smoothing, spread=spread, bounds=(0, 0.95), neutral=0.0
        ),
    }
    return {name: kinds[name](spread) for name, spread in spreads.items()}


def _build(
    config: Config,
    optimizer: Optimizer,
    model: nn.Module,
    monitors: list[Monitor],
    probe: hdet.Probe | None,
    replicas: ReplicasLike,
    build: Callable[..., Any] | None,
    explored: list[hdet.Hyperparameter],
) -> hdet.OneCycleLR | hdet.Ensemble | LambdaLR:
    total_steps, schedule, ours = config.train.total_steps, config.schedule, config.hdet
    settings: dict[str, Any] = {}
    if ours.spread < 0:
        raise ValueError(f"Invalid spread={ours.spread}. Must be in [0, 1).")
    if not ours.is_baseline:
        settings = {
            "spread": ours.spread,
            "auto_lr": ours.auto_lr and ours.spread > 0,
            "hyperparameters": explored,
            "probe": probe if ours.probe else None,
            "controller": ours.posterior if ours.controller == "posterior" else ours.published,
            "virtual_replicas": config.train.accumulate if ours.virtual_replicas else 1,
            "rollback": ours.rollback,
            "monitor": monitors,
            **{name: getattr(ours, name) for name in SHARED},
        }
    if build is None:
        build = partial(_build_on, optimizer, {"model": model, "replicas": replicas} if settings else {})
    if schedule.name == "one_cycle":
        if schedule.options:
            raise ValueError(f"Invalid options={schedule.options}. For one_cycle set the section's own fields.")
        return build(
            hdet.OneCycleLR,
            config.optimizer.known_max_lr,
            total_steps,
            pct_start=schedule.pct_start,
            anneal_strategy=schedule.anneal_strategy,
            cycle_momentum=schedule.cycle_momentum,
            base_momentum=schedule.base_momentum,
            max_momentum=schedule.max_momentum,
            div_factor=schedule.div_factor,
            final_div_factor=schedule.final_div_factor,
            three_phase=schedule.three_phase,
            **settings,
        )
    factor = _factor(schedule.name, schedule.options, total_steps)
    if not settings:
        return build(LambdaLR, factor)
    return build(hdet.Ensemble, factor, total_steps=total_steps, **settings)


def _build_on(
    optimizer: Optimizer, known: dict[str, Any], kind: Callable[..., Any], *args: Any, **settings: Any
) -> Any:
    return kind(optimizer, *args, **known, **settings)


def _factor(name: str, options: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    if name not in schedules.__all__:
        raise ValueError(f"Invalid schedule.name={name!r}. Must be one of {', '.join(schedules.__all__)}.")
    factory = getattr(schedules, name)
    accepted = inspect.signature(factory).parameters
    unknown = [key for key in options if key not in accepted]
    if unknown:
        raise ValueError(f"Unknown schedule.options.{unknown[0]}. {name} takes {', '.join(accepted)}.")
    if "total_steps" in accepted:
        options = {"total_steps": total_steps, **options}
    return factory(**options)
