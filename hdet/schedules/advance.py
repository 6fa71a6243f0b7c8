"""A step of torch's OneCycleLR, in which what parameter groups have in common is computed once, not for each."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

_OWN = ("get_lr", "_update_lr", "_anneal_func", "_annealing_cos", "_annealing_linear")
"""What decides on the next learning rates. ``_update_lr`` is younger than the oldest torch that hdet runs with."""
_step = lr_scheduler.OneCycleLR.step  # looked up once, since it is called in steps


Upcoming = tuple[list[Any], list[Any]]
"""By parameter group, the learning rates and the momenta of a step; no momenta where they are not cycled."""


def is_plain(kind: type) -> bool:
    """Whether schedulers of this ``kind`` compute learning rates as torch's OneCycleLR does."""
    return all(getattr(kind, name, None) is getattr(lr_scheduler.OneCycleLR, name, None) for name in _OWN)


def upcoming(scheduler: lr_scheduler.OneCycleLR) -> Upcoming | None:
    """The next step, to the bit as ``torch.optim.lr_scheduler.OneCycleLR.step`` takes it; ``None`` where torch itself
    must: its first step may warn, and one beyond the last fails.

    The position ``p`` in the schedule's phase, and the weight of the phase's ends, are those of all groups::

        lr = end + (start - end) / 2 * (1 + cos(pi p)),    or    start + (end - start) p    for "linear"
    """
    step = scheduler.last_epoch + 1
    if scheduler._step_count <= 1 or step > scheduler.total_steps:
        return None
    groups, phases = scheduler.optimizer.param_groups, scheduler._schedule_phases
    last, i, begin = len(phases) - 1, 0, 0.0
    while i < last and step > phases[i]["end_step"]:
        begin = phases[i]["end_step"]
        i += 1
    phase = phases[i]
    start, end = phase["start_lr"], phase["end_lr"]
    p = (step - begin) / (phase["end_step"] - begin)
    is_cos = scheduler._anneal_func_type == "cos"
    if is_cos:
        weight = math.cos(math.pi * p) + 1
        rates = [(e := group[end]) + (group[start] - e) / 2.0 * weight for group in groups]
    else:
        rates = [(group[end] - (s := group[start])) * p + s for group in groups]
    if not scheduler.cycle_momentum:
        return rates, []
    start, end = phase["start_momentum"], phase["end_momentum"]
    if is_cos:
        return rates, [(e := group[end]) + (group[start] - e) / 2.0 * weight for group in groups]
    return rates, [(group[end] - (s := group[start])) * p + s for group in groups]


def advance(scheduler: lr_scheduler.OneCycleLR, ahead: Upcoming | None) -> None:
    """Take the step, but for learning rates that are tensors: if the :func:`upcoming` step is given, these are left to
    be written with all the others.

    Raises:
        ValueError: beyond the last step.
    """
    if ahead is None:
        _step(scheduler)
        return
    rates, momenta = ahead
    scheduler._step_count += 1
    scheduler.last_epoch += 1
    scheduler._last_lr = rates
    for i, group in enumerate(scheduler.optimizer.param_groups):
        lr = group["lr"]
        if type(lr) is float or not isinstance(lr, Tensor):
            group["lr"] = rates[i]
        if not momenta:
            continue
        if scheduler.use_beta1:
            group["betas"] = (momenta[i], *group["betas"][1:])
        else:
            group["momentum"] = momenta[i]
