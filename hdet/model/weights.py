"""The tensors that make up a replica: what a converge averages, and how it reads and writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import Parameter


class Weights:
    """The parameters and buffers of modules, as plain tensors that share their memory: of a DTensor, this rank's shard.

    Where a framework keeps the weights elsewhere (fp32 masters, shards), a subclass says where.

    Args:
        models: the modules.
        extra: further parameters, such as an optimizer's that no module owns.
    """

    whole: bool = False
    """Whether this rank holds all of every tensor. False for a subclass that does not say otherwise: the wrong answer
    would average shards of different parameters."""

    def __init__(self, models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> None:
        self._models, self._extra = tuple(models), tuple(extra)
        parts = is_sharded(self._models) or any(is_dtensor(t) for t in self._extra)
        self.whole = type(self) is Weights and not parts

    def tensors(self) -> Iterable[tuple[Tensor, bool]]:
        """Every tensor and whether it is trained, in the same order on every rank. One that is tied may come twice."""
        reshard(self._models)
        modules = [module for model in self._models for module in model.modules()]
        parameters = [p for module in modules for p in module._parameters.values()]
        buffers = [b for module in modules for b in module._buffers.values()]
        return [(local(t), t.requires_grad) for t in (*parameters, *self._extra, *buffers) if t is not None]

    def written(self) -> None:
        """Called after trained tensors were written, before the model runs on them."""
        reshard(self._models)


def is_instance(value: object, module: str, name: str) -> bool:
    """``isinstance`` for a class of torch whose module takes a second to import: before somebody has imported it there
    are no instances."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    kind = type(tensor)
    return kind is not Parameter and kind is not Tensor and is_instance(tensor, "torch.distributed.tensor", "DTensor")


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    # to_local() would make another object each time, under autograd.
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reshard(models: Iterable[nn.Module]) -> None:
    """Let FSDP2 modules drop what they have gathered. A root module keeps its parameters whole after a forward pass
    that no backward pass follows: they would hide the shards, and outlive a change of them."""
    for model in models:
        for module in model.modules():
            if is_instance(module, "torch.distributed.fsdp", "FSDPModule"):
                module.reshard()  # type: ignore[operator]


def is_sharded(models: Iterable[nn.Module]) -> bool:
    """Whether a model has DTensor parameters or buffers."""
    reshard(models := tuple(models))
    return any(is_dtensor(t) for model in models for t in (*model.parameters(), *model.buffers()))


_ELSEWHERE: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()


def keep_elsewhere(model: nn.Module, weights: Weights) -> None:
    """For adapters: from now on ``weights`` are what ``model``'s weights are. They must not keep the model alive."""
    _ELSEWHERE[model] = weights


def weights_of(models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> Weights:
    """The weights of ``models``: where an adapter said they are, else the modules' own and ``extra``."""
    if len(models) == 1 and (elsewhere := _ELSEWHERE.get(models[0])) is not None:
        return elsewhere
    return Weights(models, extra)
