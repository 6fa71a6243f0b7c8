"""The saved state of an ensemble: plain values, the same on every rank; what depends on the rank is computed anew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hdet.errors import check_item, check_list, check_mapping, check_number, check_whole, shown

VERSION = 6
"""Of the format. A state of another version is refused."""

# Of parts that an ensemble may lack: a state has all keys, whichever parts there are.
_ABSENT = {
    "first_loss": math.nan,
    "rollbacks": 0,
    "loss_level": [],
    "undone_jump": [],
}


class Stateful(Protocol):
    """A part of an ensemble that has something to save."""

    def state(self) -> dict[str, Any]:
        """Its keys and plain values or tensors. Not collective."""

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot, before anything is changed."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`check_state` has passed."""


def collect(parts: Iterable[Stateful], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all parts, beside the ensemble's ``own``."""
    state = {"version": VERSION, **own, **_ABSENT}
    for part in parts:
        state |= part.state()
    return state


def check(parts: Iterable[Stateful], state: Mapping[str, Any], groups: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` if ``state`` cannot be loaded, before anything is changed.

    Args:
        parts: which are to load it.
        state: as :func:`collect` returned it.
        groups: number of parameter groups.
    """
    check_mapping("state_dict", state, "what state_dict() returned")
    version = state.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(f"Cannot load an hdet state of version {shown(version)}; this hdet reads version {VERSION}.")
    what = "The saved state"
    check_place(check_item(what, state, "steps"), check_item(what, state, "base_lr"), groups)
    for part in parts:
        part.check_state(state)


def check_place(steps: Any, base_lr: Any, groups: int) -> tuple[int, list[float | Tensor]]:
    """A number of steps, and the schedule's learning rate for each of as many groups.

    Raises:
        TypeError, ValueError: for anything else.
    """
    steps = check_whole("steps", steps, ">= 0", lambda steps: steps >= 0)
    rates: list[float | Tensor] = []
    rule = f"a learning rate, finite and >= 0, for each of {groups} parameter groups"
    for lr in check_list("base_lr", base_lr, rule, length=groups):
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or lr.is_complex() or lr.is_meta:
                raise TypeError(f"Invalid base_lr={shown(lr)}. Must be {rule}.")
            check_number("base_lr", lr.item(), rule, lambda lr: lr >= 0)
            rates.append(lr)
        else:
            rates.append(float(check_number("base_lr", lr, rule, lambda lr: lr >= 0)))
    return steps, rates


def load(parts: Iterable[Stateful], state: Mapping[str, Any]) -> None:
    """Load what :func:`collect` returned, once :func:`check` has passed it."""
    for part in parts:
        part.load(state)
