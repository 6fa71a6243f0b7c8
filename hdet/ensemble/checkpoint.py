"""The saved state of an ensemble: plain values, the same on every rank; what depends on the rank is computed anew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

VERSION = 6
"""Of the format. A state of another version is refused."""

# Of parts that an ensemble may lack: a state has all keys, whichever parts there are.
_ABSENT = {
    "first_loss": math.nan,
    "rollbacks": 0,
}


class Stateful(Protocol):
    """A part of an ensemble that has something to save."""

    def state(self) -> dict[str, Any]:
        """Its keys and plain values or tensors. Not collective."""

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if :meth:`load` cannot, before anything is changed."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`check_state` has passed."""


def collect(parts: Iterable[Stateful], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all parts, beside the ensemble's ``own``."""
    state = {"version": VERSION, **own, **_ABSENT}
    for part in parts:
        state |= part.state()
    return state


def check(parts: Iterable[Stateful], state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``state`` cannot be loaded, before anything is changed."""
    if state.get("version") != VERSION:
        raise ValueError(
            f"Cannot load an hdet state of version {state.get('version')!r}; this hdet reads version {VERSION}."
        )
    for part in parts:
        part.check_state(state)


def load(parts: Iterable[Stateful], state: Mapping[str, Any]) -> None:
    """Load what :func:`collect` returned, once :func:`check` has passed it."""
    for part in parts:
        part.load(state)
