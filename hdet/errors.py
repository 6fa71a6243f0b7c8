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
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class HdetError(RuntimeError):
    """Base of hdet's run-time errors."""


class ReplicaMismatchError(HdetError):
    """The replicas disagree about something on which they must agree; the message names the ranks and the values."""


class DivergedError(HdetError):
    """Every replica has non-finite parameters, so there is nothing left to average."""


# Checks of arguments: the only ones that hdet has. Each returns the value as it is to be kept, or raises TypeError for
# a wrong type and ValueError for a wrong value, naming the argument, its value and the rule. A bool is no number, a
# string is no flag, NaN is in no range, and a NumPy scalar is the number that it holds.


def shown(value: object) -> str:
    """``repr(value)`` for an error message, cut to a line or two; a type's name where it has none."""
    try:
        text = repr(value)
    except Exception:  # whatever an object's own repr does, the message is about something else
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


_LONGEST = 200
"""Characters of a value in an error message."""


def plain(value: Any) -> Any:
    """A number as Python's own int or float, which saved states and files can hold; anything else as it is."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_number(
    name: str,
    value: object,
    rule: str = "finite",
    ok: Callable[[float], bool] = lambda number: True,
    *,
    finite: bool = True,
) -> float:
    """``value`` as a float (or an int, if it is one), for which ``ok`` holds.

    Args:
        name: of the argument.
        value: what was passed for it.
        rule: what it must be, after "Must be".
        ok: whether a number is.
        finite: whether NaN and infinities are refused before ``ok`` is asked.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be a number, {rule}.")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(
            f"Invalid {name}={shown(value)}. Must be {rule}, and no more than a float can hold."
        ) from error
    if finite and not math.isfinite(number):
        raise ValueError(
            f"Invalid {name}={shown(value)}. Must be {rule if 'finite' in rule else f'finite, and {rule}'}."
        )
    if not ok(number):
        raise ValueError(f"Invalid {name}={shown(plain(value))}. Must be {rule}.")
    return plain(value)


def check_whole(name: str, value: object, rule: str, ok: Callable[[int], bool] = lambda number: True) -> int:
    """``value`` as an int, for which ``ok`` holds. Floats are none, 3.0 included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be a whole number, {rule}.")
    number = int(value)
    if not -_LARGEST_INT <= number <= _LARGEST_INT or not ok(number):
        raise ValueError(f"Invalid {name}={shown(number)}. Must be {rule}.")
    return number


_LARGEST_INT = 2**63 - 1
"""What a tensor, a file or another process can hold."""


def check_flag(name: str, value: object) -> bool:
    """``value``, if it is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be True or False.")
    return bool(value)


def check_text(name: str, value: object, rule: str = "a str that is not empty") -> str:
    """``value``, if it is a str and not empty."""
    if not isinstance(value, str):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    if not value:
        raise ValueError(f"Invalid {name}={value!r}. Must be {rule}.")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    rule = f"one of {', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    if value not in choices:
        raise ValueError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    return value


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], rule: str) -> Any:
    """``value``, if it is an instance of one of ``kinds``."""
    if not isinstance(value, kinds):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    return value


def check_callable(name: str, value: Any, rule: str) -> Any:
    """``value``, if it can be called."""
    if not callable(value):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    return value


def check_path(name: str, value: object, rule: str = 'a str or a path, for example "runs/x"') -> str:
    """``value`` as the str of a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}, and not bytes.")
    if not path or "\0" in path:
        raise ValueError(f"Invalid {name}={path!r}. Must not be empty, nor hold a null character: pass {rule}.")
    return path


def check_file(name: str, value: object) -> str:
    """``value`` as the str of a path at which a file can lie."""
    path = check_path(name, value, 'the path of a file, for example "runs/x/file"')
    if os.path.isdir(path):
        raise ValueError(f"Invalid {name}={path!r}. This is a directory: name a file in it.")
    return path


def check_list(name: str, value: Any, rule: str, *, length: int | None = None) -> list[Any]:
    """``value`` as a list, if it is a sequence and no text; with a ``length``, of as many items."""
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    try:
        items = list(value)
    except TypeError as error:  # an array of no dimension
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.") from error
    if length is not None and len(items) != length:
        raise ValueError(f"Invalid {name}={shown(value)}. It has {len(items)} items. Must be {rule}.")
    return items


def check_batches(name: str, value: Any, *, text: bool = False) -> Any:
    """``value``, if one can iterate over it and, unless ``text``, it is none."""
    rule = "an iterable of batches, such as a data loader"
    is_iterable = isinstance(value, Iterable) or hasattr(type(value), "__getitem__")
    is_other = isinstance(value, type) or (isinstance(value, (str, bytes)) and not text)
    # A tensor or an array of no dimension has the methods, and nothing to iterate over.
    if is_other or not is_iterable or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    return value


def check_mapping(name: str, value: Any, rule: str) -> Mapping[Any, Any]:
    """``value``, if it is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    return value


def check_item(name: str, of: Mapping[str, Any], key: str) -> Any:
    """``of[key]``; ``name`` is what the mapping is."""
    if key not in of:
        raise ValueError(
            f"{name} has no {key!r}. Must have all that its state_dict() saved: it was cut, or is another."
        )
    return of[key]


def check_gain(name: str, value: object) -> float:
    """``value`` as a gain that was saved or found. Beyond these numbers, whatever a controller's bounds are, it is an
    accident."""
    low, high = _GAINS
    return check_number(name, value, f"> 0, between {low:g} and {high:g}", lambda gain: low <= gain <= high)


_GAINS = (1e-9, 1e9)


def check_bounds(name: str, value: object) -> tuple[float, float]:
    """``value`` as the smallest and the largest gain of a controller."""
    rule = "a pair (low, high) with 0 < low <= 1 <= high < inf"
    low, high = (check_number(name, bound, rule) for bound in check_list(name, value, rule, length=2))
    if not 0 < low <= 1 <= high:
        raise ValueError(f"Invalid {name}={(low, high)}. Must be {rule}.")
    return low, high


def check_field(
    owner: object, name: str, check: Callable[..., Any], *rule: Any, prefix: str = "", **options: Any
) -> None:
    """Check field ``name`` of a frozen dataclass by ``check(name, value, *rule)``, and keep what that returns. Errors
    name it with the ``prefix``."""
    object.__setattr__(owner, name, check(prefix + name, getattr(owner, name), *rule, **options))
