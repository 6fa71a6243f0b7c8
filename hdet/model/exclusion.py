"""What of a model is each rank's own: parameters and buffers that are neither averaged nor compared."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hdet.errors import shown
from hdet.model.wrappers import Slot, slots

ExcludeLike = str | Tensor | nn.Module | Iterable[str | Tensor | nn.Module]
"""What ``exclude=`` takes; see :class:`Exclusion`."""


def check_exclude(name: str, value: object) -> object:
    """``value``; raises TypeError where it is no :data:`ExcludeLike`. An iterator is refused: it can be read once."""
    items = _items(value) if isinstance(value, (str, Tensor, nn.Module, Sequence, set, frozenset)) else None
    if items is None or not all(isinstance(item, (str, Tensor, nn.Module)) for item in items):
        raise TypeError(
            f"Invalid {name}={shown(value)}. Must be a name pattern such as 'experts.*', a tensor, a module, or a list "
            "of these."
        )
    return value


class Exclusion:
    """The parameters and buffers of ``models`` that are each rank's own.

    Beside those given, these are what ``DistributedDataParallel`` has been told to ignore
    (``_set_params_and_buffers_to_ignore_for_model``). A tensor that is tied is excluded wherever it stands.

    Args:
        models: ``model=``.
        given: name patterns, as ``fnmatch`` reads them, of parameters and buffers: as ``named_parameters()`` and
            ``named_buffers()`` name them, or without the ``module.`` of ``DistributedDataParallel`` and the like of
            other wrappers, or with it; tensors; modules, for all that is in them.
        outside: further tensors that may be given: parameters of the optimizer that no model has.

    Raises:
        ValueError: for a pattern, a tensor or a module that matches nothing.
    """

    def __init__(self, models: Sequence[nn.Module], given: Any = (), outside: Iterable[Tensor] = ()) -> None:
        self._slots: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
        self._tensors: list[Tensor] = []
        places = [slot for model in models for slot in slots(model)]
        known = {id(slot.tensor) for slot in places} | {id(t) for t in outside}
        for item in _items(given):
            if isinstance(item, str):
                found = [slot for slot in places if _matches(slot, item)]
                if not found:
                    raise ValueError(
                        f"exclude={item!r} matches no parameter or buffer of model=. {_hint(item, places)}"
                    )
            elif isinstance(item, nn.Module):
                self._tensors += [t for t in (*item.parameters(), *item.buffers()) if id(t) in known]
                inside = set(item.modules())
                found = [slot for slot in places if slot.module in inside]
                if not found and not any(id(t) in known for t in item.parameters()):
                    raise ValueError(
                        f"exclude= got a {type(item).__name__} that has no parameter or buffer of model= or of the "
                        "optimizer. Pass a module inside model=."
                    )
            else:
                found = []
                if id(item) not in known:
                    raise ValueError(
                        f"exclude= got a tensor of shape {tuple(item.shape)} that is no parameter or buffer of model=, "
                        "and no parameter of the optimizer. Pass the object that the model has, not a copy or a view."
                    )
                self._tensors.append(item)
            self._add(found)
        for model in models:
            for module in model.modules():
                ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
                self._add([slot for slot in slots(module) if ignored & {slot.raw_name, slot.name}] if ignored else [])

    def _add(self, found: Iterable[Slot]) -> None:
        for slot in found:
            self._slots.setdefault(slot.module, set()).add(slot.key)

    def ids(self) -> frozenset[int]:
        """Of the tensors excluded, as they are now."""
        if not self._slots and not self._tensors:
            return frozenset()
        held = [
            tensor
            for module, keys in self._slots.items()
            for key in keys
            if (tensor := module._parameters.get(key, module._buffers.get(key))) is not None
        ]
        return frozenset(id(tensor) for tensor in (*held, *self._tensors))


def _items(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, (str, Tensor, nn.Module)) else tuple(value)


def _matches(slot: Slot, pattern: str) -> bool:
    names = (slot.raw_name, slot.name, f"module.{slot.name}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _hint(pattern: str, places: Sequence[Slot]) -> str:
    names = [slot.name for slot in places]
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"For all that is in the module {pattern}, pass {f'{pattern}.*'!r}."
    if close := difflib.get_close_matches(pattern, names, n=1, cutoff=0.5):
        return f"Did you mean {close[0]!r}?"
    return f"There are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}." if names else "It has none."
