"""Optimizers that are not what they seem: wrappers, sharded ones, and those with state in their parameter groups."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hdet.errors import shown
from hdet.replicas.topology import ranks_of

_INSIDE = ("optimizer", "optim", "base", "base_optimizer", "original_optimizer", "inner_optimizer", "_optimizer")
"""Attributes under which wrappers keep the optimizer inside."""
_SHARDED = {"ZeroRedundancyOptimizer", "OSS", "DistributedFusedAdam", "DistributedFusedLAMB"}
"""Optimizers of which every rank updates a part of the parameters, by the name of a class that they are."""
_AVERAGING = {"PostLocalSGDOptimizer"}
"""Optimizers that average parameters over the ranks themselves."""
_NO_STATE = {"lr", "initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "max_betas", "name"}
"""What schedules write into parameter groups."""
_STATE = {"step", "k", "d", "d_max", "d_numerator", "weight_sum", "lr_max", "numerator_weighted"}
"""State that optimizers put into their groups while they run."""


def inside(optimizer: object) -> Optimizer:
    """The optimizer that ``optimizer`` is, or wraps, as accelerate's does.

    Raises:
        TypeError: if there is none that hdet can work on.
    """
    seen: list[object] = []
    current = optimizer
    while True:
        if isinstance(current, Optimizer) and "_optimizer_state_dict_post_hooks" in vars(current):
            return current
        seen.append(current)
        found = [vars(current).get(name) for name in _INSIDE] if hasattr(current, "__dict__") else []
        within = next((one for one in found if hasattr(one, "param_groups") and not any(one is s for s in seen)), None)
        if not isinstance(optimizer, Optimizer):
            hint = ""
            if within is not None:
                name = next(name for name in _INSIDE if vars(current).get(name) is within)
                hint = f". Pass the one that it wraps, optimizer.{name}"
            kind = type(optimizer).__name__
            raise TypeError(f"Invalid optimizer={shown(optimizer)}. {kind} is not an Optimizer{hint}.")
        if within is None:
            raise TypeError(
                f"{type(optimizer).__name__} is an Optimizer that never called Optimizer.__init__(), and wraps none "
                "that did. It has no hooks, by which hdet keeps the saved state the same on every rank. Pass the "
                "optimizer that it wraps. For DeepSpeed use hdet.integrations.deepspeed.attach()."
            )
        current = within


def check_unsharded(optimizer: object) -> None:
    """Check that every rank updates the whole model, and leaves averaging to hdet.

    Args:
        optimizer: as it was passed to hdet, wrappers included.

    Raises:
        ValueError: if not, with the way out.
    """
    current: Any = optimizer
    while current is not None:
        names = {kind.__name__ for kind in type(current).__mro__}
        if (name := next(iter(names & _SHARDED), None)) and _ranks_of(current) > 1:
            raise ValueError(
                f"{name} lets every rank update a part of the model, so that a learning rate per rank would be one per "
                "part of the model, not one per replica. Use an optimizer without shards; or shard the model with "
                'FSDP2 on a (replicate x shard) mesh and pass replicas=mesh["replicate"]; or DeepSpeed with '
                "ReplicaGroups."
            )
        if name := next(iter(names & _AVERAGING), None):
            raise ValueError(
                f"{name} averages the parameters itself, which takes the replicas' differences away before hdet sees "
                f'them. Pass the optimizer that it wraps, and gradients="local" and converge_every= to hdet.'
            )
        found = [vars(current).get(inner) for inner in _INSIDE] if hasattr(current, "__dict__") else []
        current = next((one for one in found if isinstance(one, Optimizer)), None)


def group_state(optimizer: Optimizer) -> list[list[str]]:
    """By parameter group, the keys of numbers that the optimizer keeps there as state: Prodigy's ``d``, Schedule-Free's
    ``weight_sum``. Settings, which its constructor takes, are none; nor is what a schedule writes, or the user."""
    kind: Any = type(optimizer)
    settings = _settings_of(kind) | _NO_STATE
    kept = (set(optimizer.defaults) | _STATE) - settings
    return [sorted(key for key in kept if is_number(group.get(key))) for group in optimizer.param_groups]


def is_number(value: object) -> bool:
    """Whether it is an int, a float, or a tensor of one number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.dtype.is_complex and value.dtype.itemsize > 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def _settings_of(kind: Any) -> frozenset[str]:
    """Names of the arguments of its constructor, and of those that it is derived from."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base not in (object, Optimizer) and "__init__" in vars(base):
            names |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return frozenset(names)


def _ranks_of(optimizer: Any) -> int:
    groups = (getattr(optimizer, name, None) for name in ("process_group", "group"))
    group = next((one for one in groups if isinstance(one, dist.ProcessGroup)), None)
    return 1 if group is None else len(ranks_of(group))
