"""The tensors of a replica that a converge averages."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import Parameter


class Weights:
    """The parameters and buffers of modules, as plain tensors that share their memory: of a DTensor, this rank's shard.

    For a framework that trains other tensors than the modules' (fp32 masters, shards) there is a subclass, which
    :func:`register_weights` attaches to a model.

    Args:
        models: the modules.
        extra: further parameters, such as an optimizer's that no module owns.
    """

    whole: bool = False
    """Whether this rank holds all elements of every tensor. A subclass must set it to say so: if it were wrongly True,
    shards of different parameters would be averaged."""

    def __init__(self, models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> None:
        self._models, self._extra = tuple(models), tuple(extra)
        has_shards = is_sharded(self._models) or any(is_dtensor(t) for t in self._extra)
        self.whole = type(self) is Weights and not has_shards

    def tensors(self) -> Iterable[tuple[Tensor, bool]]:
        """Every tensor and whether it is trained, in the same order on every rank. A tied tensor may come twice."""
        reshard(self._models)
        modules = [module for model in self._models for module in model.modules()]
        parameters = [p for module in modules for p in module._parameters.values()]
        buffers = [b for module in modules for b in module._buffers.values()]
        return [(local(t), t.requires_grad) for t in (*parameters, *self._extra, *buffers) if t is not None]

    def written(self) -> None:
        """Must be called after trained tensors were written, before the model runs."""
        reshard(self._models)


def is_instance(value: object, module: str, name: str) -> bool:
    """``isinstance`` for a class of torch whose module takes a second to import. If it has not been imported there are
    no instances, and it is not imported here."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    kind = type(tensor)
    return kind is not Parameter and kind is not Tensor and is_instance(tensor, "torch.distributed.tensor", "DTensor")


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    # to_local() would make a new object each time, and record it for autograd.
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reshard(models: Iterable[nn.Module]) -> None:
    """Free the gathered parameters of FSDP2 modules. After a forward pass without a backward pass a root module keeps
    them: its parameters would not be the shards, and would not follow a change of these."""
    for model in models:
        for module in model.modules():
            if is_instance(module, "torch.distributed.fsdp", "FSDPModule"):
                module.reshard()  # type: ignore[operator]


def is_sharded(models: Iterable[nn.Module]) -> bool:
    """Whether a model has DTensor parameters or buffers."""
    reshard(models := tuple(models))
    return any(is_dtensor(t) for model in models for t in (*model.parameters(), *model.buffers()))


_REGISTERED: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()
"""Weights that an adapter has attached to a model."""


def register_weights(model: nn.Module, weights: Weights) -> None:
    """For adapters: :func:`weights_of` the model are these from now on. They must not hold a strong reference to it."""
    _REGISTERED[model] = weights


def weights_of(models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> Weights:
    """The weights of ``models``: those that an adapter has registered, else the modules' own and ``extra``."""
    if len(models) == 1 and (registered := _REGISTERED.get(models[0])) is not None:
        return registered
    return Weights(models, extra)
