"""A step of torch's OneCycleLR, in which what parameter groups have in common is computed once, not for each."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

_OWN = ("get_lr", "_update_lr", "_anneal_func", "_annealing_cos", "_annealing_linear")
"""What decides on the next learning rates. ``_update_lr`` is younger than the oldest torch that hdet runs with."""
_step = lr_scheduler.OneCycleLR.step  # looked up once, since it is called in steps


def is_plain(kind: type) -> bool:
    """Whether schedulers of this ``kind`` compute learning rates as torch's OneCycleLR does."""
    return all(getattr(kind, name, None) is getattr(lr_scheduler.OneCycleLR, name, None) for name in _OWN)


def advance(scheduler: lr_scheduler.OneCycleLR) -> list[Any] | None:
    """Do what ``torch.optim.lr_scheduler.OneCycleLR.step`` does, with the same result to the bit, but leave learning
    rates that are tensors to the caller to write.

    The position ``p`` in the schedule's phase, and the weight of the phase's ends, are those of all groups::

        lr = end + (start - end) / 2 * (1 + cos(pi p)),    or    start + (end - start) p    for "linear"

    Returns:
        The learning rates by parameter group, if those that are tensors have not been written.

    Raises:
        ValueError: beyond the last step.
    """
    step = scheduler.last_epoch + 1
    groups = scheduler.optimizer.param_groups
    # The first step may warn, and one beyond the last fails: both as in torch.
    if scheduler._step_count <= 1 or step > scheduler.total_steps:
        _step(scheduler)
        return None
    phases = scheduler._schedule_phases
    last, i, begin = len(phases) - 1, 0, 0.0
    while i < last and step > phases[i]["end_step"]:
        begin = phases[i]["end_step"]
        i += 1
    phase = phases[i]
    start, end = phase["start_lr"], phase["end_lr"]
    scheduler._step_count += 1
    scheduler.last_epoch = step
    p = (step - begin) / (phase["end_step"] - begin)
    is_cos = scheduler._anneal_func_type == "cos"
    if is_cos:
        weight = math.cos(math.pi * p) + 1
        rates = [(e := group[end]) + (group[start] - e) / 2.0 * weight for group in groups]
    else:
        rates = [(group[end] - (s := group[start])) * p + s for group in groups]
    if scheduler.cycle_momentum:
        start, end = phase["start_momentum"], phase["end_momentum"]
        for group in groups:
            s, e = group[start], group[end]
            momentum = e + (s - e) / 2.0 * weight if is_cos else (e - s) * p + s
            if scheduler.use_beta1:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum
    tensors = {}
    for i, group in enumerate(groups):
        lr = group["lr"]
        if type(lr) is not float and isinstance(lr, Tensor):
            tensors[i] = lr
        else:
            group["lr"] = rates[i]
    scheduler._last_lr = rates
    if not tensors:
        return None
    by_memory = {lr.data_ptr(): rates[i] for i, lr in tensors.items()}
    for i, lr in tensors.items():  # of groups that share one the last one's, as in torch
        rates[i] = float(by_memory[lr.data_ptr()])
    return rates
