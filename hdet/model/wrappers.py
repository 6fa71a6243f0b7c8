"""What is around the user's model, DistributedDataParallel, torch.compile, checkpointing; and the model without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which wrappers hold what they wrap: torch.compile, activation checkpointing, FSDP1."""


class Slot(NamedTuple):
    """Where a parameter or buffer stands in a model."""

    raw_name: str
    """As ``named_parameters()`` and ``named_buffers()`` say it."""
    name: str
    """The same without the parts that wrappers add."""
    module: nn.Module
    key: str
    is_parameter: bool
    tensor: Tensor


def slots(model: nn.Module) -> list[Slot]:
    """Every parameter, then every buffer, in the order of ``model.modules()``. A tied tensor comes as often as it
    stands there."""
    modules = list(_named_modules(model, "", "", set()))
    return [
        Slot(raw + key, name + key, module, key, is_parameter, tensor)
        for is_parameter in (True, False)
        for raw, name, module in modules
        for key, tensor in (module._parameters if is_parameter else module._buffers).items()
        if tensor is not None
    ]


def _named_modules(model: nn.Module, raw: str, name: str, seen: set[int]) -> Iterator[tuple[str, str, nn.Module]]:
    if id(model) in seen:
        return
    seen.add(id(model))
    yield raw, name, model
    wraps = isinstance(model, (DistributedDataParallel, DataParallel))
    for key, child in model._modules.items():
        if child is not None:
            is_hidden = key in _TRANSPARENT or (wraps and key == "module")
            yield from _named_modules(child, f"{raw}{key}.", name if is_hidden else f"{name}{key}.", seen)


@contextmanager
def without_ddp(models: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    """The models without ``DistributedDataParallel``, at whatever depth, and without a ``torch.compile`` around it.

    Inside the ``with`` block a module that holds one holds what it wraps; afterwards all is as it was. A compiled
    module that has none in it stays compiled.
    """
    replaced: list[tuple[dict[str, Any], str, nn.Module]] = []
    try:
        bare = tuple(_bare(model) for model in models)
        seen: set[int] = set()
        stack = list(bare)
        while stack:
            module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            for key, child in list(module._modules.items()):
                if child is None:
                    continue
                inner = _bare(child)
                if inner is not child:
                    replaced.append((module._modules, key, child))
                    module._modules[key] = inner
                stack.append(inner)
        yield bare
    finally:
        for children, key, child in reversed(replaced):
            children[key] = child


def _bare(module: nn.Module) -> nn.Module:
    """What a module wraps, if it is DDP or a compiled module with DDP in it; else itself."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module) and has_ddp((inner,)):
            module = inner
        else:
            return module


def has_ddp(models: Sequence[nn.Module]) -> bool:
    """Whether a model is ``DistributedDataParallel`` or has it in it."""
    return any(isinstance(module, DistributedDataParallel) for model in models for module in model.modules())
