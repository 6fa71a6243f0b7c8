"""Checks of a schedule's arguments, called from its ``__post_init__``. Each raises ``ValueError``. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real


def check_int(schedule: object, name: str, ok: Callable[[int], bool], rule: str) -> None:
    """Field ``name`` must be an int for which ``ok`` holds; ``rule`` says so in the error."""
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or not ok(int(value)):
        raise ValueError(f"Invalid {name}={value!r}. Must be an int {rule}.")
    # Stored as a plain int: a NumPy integer would not load with weights_only=True.
    object.__setattr__(schedule, name, int(value))


def check_float(schedule: object, name: str, ok: Callable[[float], bool], rule: str) -> None:
    """Field ``name`` must be a finite number for which ``ok`` holds; stored as a float."""
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not ok(float(value)):
        raise ValueError(f"Invalid {name}={value!r}. Must be a finite number, {rule}.")
    object.__setattr__(schedule, name, float(value))


def check_bool(schedule: object, name: str) -> None:
    """Field ``name`` must be ``True`` or ``False``."""
    value = getattr(schedule, name)
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}={value!r}. Must be True or False.")


def check_choice(schedule: object, name: str, choices: list[str]) -> None:
    """Field ``name`` must be one of ``choices``."""
    value = getattr(schedule, name)
    if value not in choices:
        raise ValueError(f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, choices))}.")
