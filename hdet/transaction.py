"""All or nothing: what a constructor or a load has changed is put back if it fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

_CONTAINERS = (dict, OrderedDict, list, set)


class AllOrNothing:
    """A ``with`` block after whose failure the things passed are as they were before it, whatever was raised.

    Of an optimizer: the settings of its parameter groups (learning rates that are tensors in place), their order and
    number, its hooks and its ``step``. Its state and the parameters are not copied. Of any other object, and of all
    modules in a module: its attributes; of those that are a dict, list or set, what is in them.

    Args:
        things: optimizers and other objects.
    """

    def __init__(self, *things: Any) -> None:
        self._undo: list[Callable[[], None]] = []
        self.keep(*things)

    def keep(self, *things: Any) -> None:
        """Put these back, too, as they are now."""
        for thing in things:
            inside = thing.modules() if isinstance(thing, nn.Module) else (thing,)
            self._undo += [attributes_of(one) for one in inside]
            if isinstance(thing, Optimizer):
                self._undo.append(_groups_of(thing))
                if isinstance(inner := getattr(thing, "optimizer", None), Optimizer):  # one that wraps another
                    self.keep(inner)

    def on_failure(self, undo: Callable[[], None]) -> None:
        """Call this if the block fails. The last one is called first."""
        self._undo.append(undo)

    def __enter__(self) -> AllOrNothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                undo()
        self._undo.clear()


def attributes_of(thing: Any) -> Callable[[], None]:
    """What puts an object's attributes back as they are now, and what is in those that are a dict, list or set."""
    attributes: dict[str, Any] = getattr(thing, "__dict__", {})
    before = dict(attributes)
    # Of an optimizer these are its hooks and defaults: the groups have a copy of their own, the state is not copied.
    own = {"state", "param_groups"} if isinstance(thing, Optimizer) else set()
    held = {k: v.copy() for k, v in before.items() if type(v) in _CONTAINERS and k not in own}

    def undo() -> None:
        attributes.clear()
        attributes.update(before)
        for name, content in held.items():
            _refill(attributes[name], content)

    return undo


def _groups_of(optimizer: Optimizer) -> Callable[[], None]:
    groups = optimizer.param_groups
    before = list(groups)
    # A list of parameters is kept as it is; where a group was added, it is taken away.
    settings = [{k: v.copy() if type(v) in _CONTAINERS else v for k, v in group.items()} for group in before]
    inside = [v for group in before for k, value in group.items() if k != "params" for v in _items(value)]
    # Afterwards their versions are as they were, too: by these it is seen who has written them.
    tensors = [(v, v.detach().clone(), _unsafe_preserve_version_counter(v)) for v in inside if isinstance(v, Tensor)]
    for _, _, versions in tensors:
        versions.__enter__()

    def undo() -> None:
        groups[:] = before
        for group, content in zip(before, settings, strict=True):
            for name, value in list(content.items()):
                if type(value) in _CONTAINERS and type(value) is type(group.get(name)):
                    _refill(group[name], value)
                    content[name] = group[name]
            _refill(group, content)
        with torch.no_grad():
            for tensor, value, versions in tensors:
                tensor.copy_(value)
                versions.__exit__()

    return undo


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _refill(container: Any, content: Any) -> None:
    """Make a container hold ``content``, in place: others hold it, too."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
