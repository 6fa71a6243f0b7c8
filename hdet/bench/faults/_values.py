"""Values that no argument is meant to take, which of them an annotation forbids, and what a call has changed."""

from __future__ import annotations

import collections.abc
import decimal
import fractions
import inspect
import random
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class _Silent:
    """An object whose ``repr`` fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _recursive() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


HOSTILE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "3": lambda: 3,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "0.0": lambda: 0.0,
    "-0.5": lambda: -0.5,
    "0.5": lambda: 0.5,
    "1.5": lambda: 1.5,
    "1e308": lambda: 1e308,
    "1e-308": lambda: 1e-308,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "complex": lambda: 1 + 1j,
    "''": lambda: "",
    "'x'": lambda: "x",
    "'1'": lambda: "1",
    "'nul'": lambda: "a\0b",
    "long text": lambda: "x" * 5000,
    "bytes": lambda: b"x",
    "[]": list,
    "[1]": lambda: [1],
    "['x']": lambda: ["x"],
    "[None]": lambda: [None],
    "recursive": _recursive,
    "{}": dict,
    "{'x': 1}": lambda: {"x": 1},
    "()": tuple,
    "(1, 2)": lambda: (1, 2),
    "(nan, nan)": lambda: (float("nan"), float("nan")),
    "set": lambda: {1},
    "iterator": lambda: iter([1]),
    "object": object,
    "silent": _Silent,
    "function": lambda: lambda: 0,
    "class": lambda: int,
    "module class": lambda: nn.Linear,
    "np.float32": lambda: np.float32(0.5),
    "np.float64(nan)": lambda: np.float64("nan"),
    "np.int64": lambda: np.int64(3),
    "np.bool": lambda: np.bool_(True),
    "np 0-d": lambda: np.array(1.0),
    "np 1-d": lambda: np.array([1.0, 2.0]),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "huge Fraction": lambda: fractions.Fraction(10**400),
    "Decimal": lambda: decimal.Decimal("0.5"),
    "tensor nan": lambda: torch.tensor(float("nan")),
    "tensor int": lambda: torch.tensor(1),
    "tensor 1-d": lambda: torch.tensor([1.0, 2.0]),
    "tensor complex": lambda: torch.tensor(1j),
    "tensor meta": lambda: torch.empty((), device="meta"),
    "tensor sparse": lambda: torch.ones(2).to_sparse(),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "dtype": lambda: torch.int8,
    "float dtype": lambda: torch.float8_e5m2,
    "device meta": lambda: torch.device("meta"),
    "module": lambda: nn.Linear(1, 1),
    "optimizer": lambda: torch.optim.SGD([torch.ones(1)], lr=0.1),
}
"""By name, how each is made."""

_ABSTRACT = (
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Mapping,
    list,
    tuple,
    dict,
    set,
)


def is_of(value: Any, annotation: Any) -> bool:
    """Whether ``annotation`` admits the type of ``value``; where it is not clear, it does."""
    if annotation in (Any, inspect.Parameter.empty, object):
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, one) for one in typing.get_args(annotation))
    if origin is typing.Annotated:
        return is_of(value, typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(annotation)
    if annotation in (None, type(None)):
        return value is None
    if annotation is bool:
        return isinstance(value, (bool, np.bool_))
    if annotation is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float, np.number, fractions.Fraction)) and not isinstance(value, bool)
    if origin is collections.abc.Callable:
        return callable(value)
    kind = origin or annotation
    if not isinstance(kind, type):
        return True
    if kind in _ABSTRACT and isinstance(value, (str, bytes)):
        return False
    return isinstance(value, kind) or (kind in _ABSTRACT and isinstance(value, (list, tuple, np.ndarray, Tensor, set)))


def forbids(annotation: Any, value: Any) -> bool:
    """Whether an argument so annotated must not take ``value``: another type, or NaN where there is to be a number."""
    if not is_of(value, annotation):
        return True
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value)) and annotation not in (Any, object)


def random_state() -> tuple[Any, ...]:
    """Of the global generators."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().tolist()


def picture(*things: Any) -> list[Any]:
    """Everything that can be reached from ``things``, as plain values that compare equal if nothing has changed."""
    seen: dict[int, int] = {}
    kept: list[Any] = []
    return [_picture(thing, seen, kept) for thing in things]


def _picture(thing: Any, seen: dict[int, int], kept: list[Any]) -> Any:
    if thing is None or isinstance(thing, (bool, int, float, str, bytes, complex)):
        return repr(thing)
    if id(thing) in seen:
        return f"<{seen[id(thing)]}>"
    seen[id(thing)] = len(seen)
    kept.append(thing)  # alive, so that no other gets its id
    if isinstance(thing, Tensor):
        content = thing.detach()
        values = None if content.is_meta or content.is_sparse else content.tolist()
        return (
            "tensor",
            tuple(thing.shape),
            str(thing.dtype),
            thing.requires_grad,
            repr(values),
            _picture(thing.grad, seen, kept) if thing.is_leaf else None,
        )
    if isinstance(thing, Mapping):
        return [type(thing).__name__, [(_picture(k, seen, kept), _picture(v, seen, kept)) for k, v in thing.items()]]
    if isinstance(thing, (list, tuple)):
        return [type(thing).__name__, [_picture(one, seen, kept) for one in thing]]
    if isinstance(thing, (weakref.ref, types.MethodType, types.FunctionType, types.BuiltinFunctionType, type)):
        return id(thing) if isinstance(thing, (types.FunctionType, type)) else type(thing).__name__
    if isinstance(thing, Iterator):
        return id(thing)
    attributes = getattr(thing, "__dict__", None)
    if attributes is None or not type(thing).__module__.startswith(
        ("torch.optim", "torch.nn", "hdet", "torch.utils.hooks")
    ):
        return id(thing)
    return [type(thing).__name__, [(name, _picture(value, seen, kept)) for name, value in sorted(attributes.items())]]
