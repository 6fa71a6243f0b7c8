"""The arguments of an ensemble, checked before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hdet.config import EnsembleConfig
from hdet.explore.design import Design
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.identification import check_identified
from hdet.explore.prior import Prior
from hdet.model.gradients import check_gradients
from hdet.model.sharding import check_sharding
from hdet.monitor.base import Monitor, MonitorLike, as_monitors
from hdet.observe.probe import LossFunction, Probe
from hdet.replicas.topology import Replicas, ReplicasLike
from hdet.steer.controllers import Controller
from hdet.steer.one_slope import OneSlope
from hdet.steer.published import Published
from hdet.steer.two_slope import TwoSlope


def round_length(total_steps: int) -> int:
    """The default of ``converge_every``: a hundred rounds; of 100 steps, as soon as that makes more; at most four
    hundred. Every probe costs about as much as two steps."""
    return int(max(1, total_steps // 400, min(100, total_steps // 100)))


def check_arguments(
    *,
    model: nn.Module | Iterable[nn.Module] | None,
    spread: float,
    converge_every: int | None,
    auto_lr: bool,
    probe: LossFunction | Probe | None,
    controller: Controller | None,
    per_group: bool,
    hyperparameters: Sequence[Hyperparameter],
    hyperparameter_controller: OneSlope | None,
    design: Design,
    virtual_replicas: int,
    prior: str | os.PathLike[str] | None,
    total_steps: int | None,
    rollback: bool | str | torch.device,
    replicas: ReplicasLike,
    seed: int,
    bucket_mib: float,
    overlap_steps: int,
    monitor: MonitorLike,
    gradients: str = "shared",
    outer_momentum: float = 0.0,
    outer_lr: float = 1.0,
    optimizer_state: str = "auto",
    wire_dtype: torch.dtype | None = None,
) -> tuple[EnsembleConfig, tuple[nn.Module, ...], Probe | None, tuple[Monitor, ...], Replicas]:
    """What an ensemble is made of, or the error that names the bad argument; changes nothing and sends nothing."""
    if converge_every is None and total_steps is not None:
        converge_every = round_length(total_steps)
    if converge_every is None and (spread > 0 or hyperparameters):
        raise ValueError("Pass converge_every, the round's length in steps, or total_steps, from which it follows.")
    if probe is not None and not isinstance(probe, Probe):
        probe = Probe(loss_fn=probe)
    if controller is None:
        controller = Published() if probe is None else TwoSlope()
    for h in hyperparameters:
        if not isinstance(h, Hyperparameter):
            raise TypeError(
                f"Invalid hyperparameters={h!r}. Must be made by hdet.param_group, hdet.module_attribute or "
                "hdet.scalar."
            )
    check_identified(
        hyperparameters,
        gradients=gradients,
        probe=probe is not None,
        held_out=probe is not None and probe.held_out,
    )
    if wire_dtype not in (None, torch.bfloat16):
        raise ValueError(f"Invalid wire_dtype={wire_dtype!r}. Must be None or torch.bfloat16.")
    if prior is not None:
        Prior.load(prior)
    config = EnsembleConfig(
        spread=spread,
        converge_every=1 if converge_every is None else converge_every,
        auto_lr=auto_lr,
        controller=controller,
        per_group=per_group,
        total_steps=total_steps,
        probe=probe is not None,
        hyperparameters=tuple(map(repr, hyperparameters)),
        hyperparameter_controller=OneSlope() if hyperparameter_controller is None else hyperparameter_controller,
        design=design,
        virtual_replicas=virtual_replicas,
        moves=auto_lr or any(h.move for h in hyperparameters),
        rollback=auto_lr and rollback is not False and not overlap_steps,
        seed=seed,
        bucket_mib=bucket_mib,
        overlap_steps=overlap_steps,
        gradients=gradients,
        outer_momentum=outer_momentum,
        outer_lr=outer_lr,
        optimizer_state=optimizer_state,
        wire_dtype="own" if wire_dtype is None else str(wire_dtype).removeprefix("torch."),
    )
    modules = () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model= takes an nn.Module or several, got {type(module).__name__}.")
    if (spread > 0 or hyperparameters) and not modules:
        raise ValueError(
            "To let replicas differ hdet needs model=: its parameters and buffers are averaged every "
            "converge_every steps."
        )
    if config.outer and not modules:
        raise ValueError("outer_momentum and outer_lr need model=: they move its averaged parameters.")
    group = Replicas(replicas)
    check_sharding(modules, group)
    check_gradients(gradients, modules, group)
    return config, modules, probe, as_monitors(monitor), group
