"""The saved state of a torch scheduler, checked before it is loaded.

``LRScheduler.load_state_dict`` writes whatever it gets into the scheduler's attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hdet.errors import (
    check_choice,
    check_flag,
    check_item,
    check_list,
    check_mapping,
    check_number,
    check_whole,
    shown,
)

_OTHER_VERSIONS = {"verbose", "_verbose", "_get_lr_called_within_step", "_is_initial", "anneal_func", "_anneal_func"}
"""Attributes that schedulers have in other versions of torch, which do no harm."""
_LARGEST = 3e38
"""Bound of a learning rate that a tensor of fp32 can hold."""
_NEEDED = ("last_epoch", "base_lrs", "_last_lr", "lr_lambdas", "_schedulers")
_MAY_BE_INFINITE = ("best", "mode_worse")
_BY_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "lr_lambdas")


def parts_of(scheduler: Any) -> Iterator[Any]:
    """A scheduler and what its ``load_state_dict`` writes into: schedulers inside it, and its functions."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from parts_of(inner)
    for function in getattr(scheduler, "lr_lambdas", ()):
        if hasattr(function, "__dict__"):
            yield function


def check_scheduler_state(name: str, state: Any, scheduler: Any, own: Mapping[str, Any] | None = None) -> None:
    """Raise TypeError or ValueError for a state that ``scheduler`` could not go on from.

    It must have the kinds of values that the scheduler has now, and no others; numbers must be finite.

    Args:
        name: of the state in the error.
        state: what the scheduler is to load.
        scheduler: of the same class as the one that it was saved from.
        own: its state now; default what it says.
    """
    check_mapping(name, state, f"what the state_dict() of a {type(scheduler).__name__} returned")
    own = scheduler.state_dict() if own is None else own
    for key in _NEEDED:
        if key in own:
            check_item(name, state, key)
    for key, value in state.items():
        if not isinstance(key, str) or (key not in own and key not in _OTHER_VERSIONS):
            raise ValueError(
                f"{name} has {shown(key)}, which a {type(scheduler).__name__} has not: it was saved from another "
                "scheduler. Load it into one of the same class."
            )
        if key == "lr_lambdas":
            _check_functions(f"{name}[{key!r}]", value, scheduler)
        elif key == "_schedulers":
            inner = scheduler._schedulers
            states = check_list(f"{name}[{key!r}]", value, "the states of the schedulers inside", length=len(inner))
            for i, (one, saved) in enumerate(zip(inner, states, strict=True)):
                check_scheduler_state(f"{name}[{key!r}][{i}]", saved, one)
        elif key in own:
            _check_like(f"{name}[{key!r}]", value, own[key], key)
    for key in ("last_epoch", "_step_count"):
        if key in state:
            check_whole(f"{name}[{key!r}]", state[key], ">= -1", lambda n: n >= -1)
    for key in ("base_lrs", "_last_lr"):
        for lr in state.get(key, ()):
            value = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_meta else lr
            rule = "learning rates, finite in fp32 and >= 0"
            check_number(f"{name}[{key!r}]", value, rule, lambda lr: 0 <= lr < _LARGEST)
    if isinstance(scheduler, OneCycleLR):
        _check_one_cycle(name, state)


def _check_like(name: str, value: Any, own: Any, key: str) -> None:
    """Raise unless ``value`` is of the kind of ``own``, which the scheduler has now."""
    rule = f"of the kind that the scheduler has, {shown(own)}"
    if own is None or isinstance(own, (LRScheduler, ReduceLROnPlateau)):
        return
    if isinstance(own, bool):
        check_flag(name, value)
    elif isinstance(own, str):
        if not isinstance(value, str):
            raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    elif isinstance(own, (int, float)):
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        finite = key not in _MAY_BE_INFINITE and math.isfinite(own)
        check_number(name, value, rule, lambda x: not math.isnan(x), finite=finite)
    elif isinstance(own, Tensor):
        if isinstance(value, Tensor):
            if value.is_meta or value.shape != own.shape or not bool(value.isfinite().all()):
                raise ValueError(f"Invalid {name}={shown(value)}. Must be finite, and {rule}.")
        else:
            check_number(name, value, rule)
    elif isinstance(own, Mapping):
        check_mapping(name, value, rule)
    elif isinstance(own, (list, tuple)):
        length = len(own) if key in _BY_GROUP else None
        items = check_list(name, value, rule, length=length)
        for item in items if own else ():
            _check_like(name, item, own[0], key)


def _check_functions(name: str, value: Any, scheduler: Any) -> None:
    """The functions of a ``LambdaLR``: the attributes of each that is an object, or ``None``."""
    functions = scheduler.lr_lambdas
    rule = f"a dict of attributes, or None, for each of {len(functions)} functions"
    for function, attributes in zip(functions, check_list(name, value, rule, length=len(functions)), strict=True):
        if attributes is None:
            continue
        check_mapping(name, attributes, rule)
        known = vars(function) if hasattr(function, "__dict__") else {}
        if unknown := [key for key in attributes if key not in known]:
            raise ValueError(
                f"{name} has {shown(unknown[0])}, which {shown(function)} has not: another function was saved."
            )
        if is_dataclass(function) and not isinstance(function, type):  # its constructor has the rules
            now = {f.name: getattr(function, f.name) for f in fields(function) if f.init}
            type(function)(**{**now, **attributes})


def _check_one_cycle(name: str, state: Mapping[str, Any]) -> None:
    what = "total_steps"
    steps = check_whole(f"{name}[{what!r}]", check_item(name, state, what), ">= 1", lambda n: n >= 1)
    rule = f"in [0, total_steps={steps}]"
    check_whole(f"{name}['last_epoch']", state["last_epoch"], rule, lambda n: 0 <= n <= steps)
    phases = check_list(f"{name}['_schedule_phases']", check_item(name, state, "_schedule_phases"), "2 or 3 phases")
    if len(phases) not in (2, 3):
        raise ValueError(f"Invalid {name}['_schedule_phases'] of {len(phases)} phases. Must be 2 or 3.")
    for phase in phases:
        check_mapping(f"{name}['_schedule_phases']", phase, "a mapping")
        end = check_item(f"{name}['_schedule_phases']", phase, "end_step")
        # The middle one of three ends at 2 pct_start total_steps - 2.
        check_number(f"{name}['_schedule_phases']['end_step']", end, f"< {2 * steps}", lambda n: n < 2 * steps)
        for key, names in (("lr", ("initial_lr", "max_lr", "min_lr")), ("momentum", ("max_momentum", "base_momentum"))):
            for side in ("start", "end"):
                field = f"{side}_{key}"
                check_choice(f"{name}[{field!r}]", check_item(f"{name}['_schedule_phases']", phase, field), names)
    if "_anneal_func_type" in state:
        check_choice(f"{name}['_anneal_func_type']", state["_anneal_func_type"], ("cos", "linear"))
