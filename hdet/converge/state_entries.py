"""The values in an optimizer's state, one parameter at a time: what they are, and how each kind is averaged.

Kinds of values::

    mean        a tensor of floats: averaged
    maximum     a tensor of integers: the maximum is taken
    number      a float, or a 0-dim tensor of floats: averaged
    counter     an int, a 0-dim tensor of integers, or a step count: the maximum is taken
    quantised   a tensor of another class or of one-byte elements: left alone
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdet.model.fingerprint import fingerprint
from hdet.model.weights import local

_COUNTERS = {"step", "steps", "k"}
"""Keys under which optimizers count steps, as floats too."""
_WEIGHTS = {"z", "ax", "slow_buffer", "slow_param", "slow_params", "ema", "master", "master_param", "master_params"}
"""Keys under which optimizers keep weights: Schedule-Free, ASGD, Lookahead, moving averages, fp32 masters."""


class Entry(NamedTuple):
    """What one value is. Ranks exchange entries where their states differ, so that all fields are plain."""

    parameter: int
    """The parameter's index, in the order of the parameter groups. After the parameters come the groups themselves."""
    path: tuple[Any, ...]
    """Keys that lead to the value, from the parameter's state."""
    kind: str
    """``mean``, ``maximum``, ``number``, ``counter`` or ``quantised``."""
    shape: tuple[int, ...]
    """Of this rank's shard; ``()`` for a Python number."""
    dtype: str
    """Of a tensor, such as ``torch.float32``; else ``int`` or ``float``."""
    on_device: bool
    """Whether it is a tensor on the parameter's device."""
    is_weight: bool
    """Whether it holds weights."""


class Value(NamedTuple):
    """One value, and where it is stored."""

    entry: Entry
    container: Any
    """The dict or list that holds the value under the last key of ``entry.path``."""

    @property
    def current(self) -> Any:
        """The value itself: a tensor, an int or a float."""
        return self.container[self.entry.path[-1]]


def values_of(index: int, parameter: Tensor, state: Any) -> list[Value]:
    """The values in one parameter's state, at any depth, in the same order on every rank.

    ``None``, flags, names and foreign objects are passed over. If any value is quantised all of them count as such:
    codes averaged without their scales, or scales without their codes, would mean nothing.
    """
    values = list(raw_values_of(index, parameter, state))
    if "quantised" in [value.entry.kind for value in values]:
        return [Value(v.entry._replace(kind="quantised", is_weight=False), v.container) for v in values]
    return values


def values_in_group(index: int, group: dict[str, Any], keys: Iterable[str]) -> Iterator[Value]:
    """The numbers under ``keys`` in a parameter group, as values of an entry's parameter ``index``."""
    for key in keys:
        value = group[key]
        if isinstance(value, Tensor):
            kind = "number" if value.is_floating_point() and key not in _COUNTERS else "counter"
            shape, dtype = tuple(value.shape), str(value.dtype)
        else:
            kind = "counter" if isinstance(value, int) or key in _COUNTERS else "number"
            shape, dtype = (), type(value).__name__
        yield Value(Entry(index, (key,), kind, shape, dtype, False, False), group)


def raw_values_of(index: int, parameter: Tensor, state: Any) -> Iterator[Value]:
    """The same, each value by its own kind whatever the others are."""
    whole, device = tuple(local(parameter).shape), parameter.device
    for path, container, value in leaves(state):
        key = path[-1]
        if isinstance(value, Tensor):
            shard = local(value)
            kind, shape, on_device = _kind(shard, key), tuple(shard.shape), value.device == device
            is_weight = key in _WEIGHTS and shape == whole and kind == "mean"
            yield Value(Entry(index, path, kind, shape, str(shard.dtype), on_device, is_weight), container)
        else:
            kind = "counter" if isinstance(value, int) or key in _COUNTERS else "number"
            yield Value(Entry(index, path, kind, (), type(value).__name__, False, False), container)


def leaves(container: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """The same values in the same order, without saying what each is: its path, what holds it, and the value itself."""
    is_dict = isinstance(container, dict)
    items = sorted(container.items(), key=lambda item: str(item[0])) if is_dict else enumerate(container)
    for key, value in items:
        at = (*path, key)
        if isinstance(value, (dict, list, tuple)):
            yield from leaves(value, at)
        elif isinstance(value, Tensor):
            if local(value).dtype != torch.bool:
                yield at, container, value
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not isinstance(container, tuple):
            yield at, container, value


def _kind(tensor: Tensor, key: Any) -> str:
    if not is_plain(tensor):
        return "quantised"
    floats = tensor.is_floating_point() or tensor.is_complex()
    if tensor.dim() == 0 and not tensor.is_complex():
        return "number" if floats and key not in _COUNTERS else "counter"
    if tensor.element_size() == 1:
        return "quantised"
    return "mean" if floats else "maximum"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is of torch's own class and strided; a library's class may hold codes and scales."""
    shard = local(tensor)
    return type(shard) in (Tensor, torch.nn.Parameter) and shard.layout == torch.strided


def is_scalar(value: Any) -> bool:
    """Whether it is one real number: of Python, or a 0-dim tensor."""
    return not isinstance(value, Tensor) or (value.dim() == 0 and not value.is_complex())


def write_scalar(value: Value, new: float) -> None:
    """Set a scalar: a tensor in place, a number in its container."""
    current = value.current
    if isinstance(current, Tensor):
        current.fill_(new)
    else:
        value.container[value.entry.path[-1]] = type(current)(new)


def fingerprint_of(value: Any) -> Any:
    """Hash of a tensor's bits; 0 for a tensor that has none to hash; a number as it is."""
    if not isinstance(value, Tensor):
        return value
    shard = local(value)
    return fingerprint(shard) if is_plain(shard) and shard.numel() else 0


def by_parameter(entries: Iterable[Entry], count: int) -> list[list[Entry]]:
    """Entries by parameter, for ``count`` parameters."""
    lists: list[list[Entry]] = [[] for _ in range(count)]
    for entry in entries:
        lists[entry.parameter].append(Entry(*entry))
    return lists


def zero_state(entries: Iterable[Entry], parameter: Tensor) -> dict[Any, Any]:
    """A parameter's state with these entries, all values zero."""
    state: dict[Any, Any] = {}
    for entry in entries:
        container = state
        for key in entry.path[:-1]:
            container = container.setdefault(key, {})
        key = entry.path[-1]
        if not entry.dtype.startswith("torch."):
            container[key] = 0 if entry.dtype == "int" else 0.0
            continue
        dtype = getattr(torch, entry.dtype.removeprefix("torch."))
        if entry.shape == tuple(local(parameter).shape):
            container[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            device = parameter.device if entry.on_device else torch.device("cpu")
            container[key] = torch.zeros(entry.shape, dtype=dtype, device=device)
    return state
