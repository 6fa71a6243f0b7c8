"""Errors that hdet raises at run time, and the checks of arguments, which raise ``ValueError`` or ``TypeError``.

::

    HdetError (RuntimeError)
    ├── ReplicaMismatchError   the replicas do not run the same program: step, configuration or model layout differ
    └── DivergedError          no replica has finite parameters any more

Both are raised on every replica of the group at the same point, so that no rank is left waiting in a collective.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence


class HdetError(RuntimeError):
    """Base of hdet's run-time errors."""


class ReplicaMismatchError(HdetError):
    """The replicas disagree about something on which they must agree; the message names the ranks and the values."""


class DivergedError(HdetError):
    """Every replica has non-finite parameters, so there is nothing left to average."""


# Checks of arguments. Each returns nothing, or raises an error that names the argument, its value and the rule. A bool
# is no number, and NaN is in no range.


def check_number(name: str, value: object, rule: str, ok: Callable[[float], bool]) -> None:
    """Raises TypeError where ``value`` is no real number, ValueError where it is not finite or not ``ok``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}={value!r}. Must be a number, {rule}.")
    if not (math.isfinite(value) and ok(float(value))):
        raise ValueError(f"Invalid {name}={value}. Must be {rule}.")


def check_whole(name: str, value: object, rule: str, ok: Callable[[int], bool]) -> None:
    """Raises TypeError where ``value`` is no int, ValueError where it is not ``ok``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Invalid {name}={value!r}. Must be a whole number, {rule}.")
    if not ok(int(value)):
        raise ValueError(f"Invalid {name}={value}. Must be {rule}.")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError where ``value`` is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"Invalid {name}={value!r}. Must be True or False.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises TypeError where ``value`` is no str, ValueError where it is none of ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"Invalid {name}={value!r}. Must be one of {', '.join(choices)}.")
    if value not in choices:
        raise ValueError(f"Invalid {name}={value!r}. Must be one of {', '.join(choices)}.")
