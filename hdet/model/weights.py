"""The tensors of a replica that a converge averages."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from hdet.errors import check_instance, shown
from hdet.model.exclusion import Exclusion
from hdet.model.wrappers import Slot, slots


class Weights:
    """The parameters and buffers of modules, as plain tensors that share their memory: of a DTensor, this rank's shard.

    For a framework that trains other tensors than the modules' (fp32 masters, shards) there is a subclass, which
    :func:`register_weights` attaches to a model.

    Args:
        models: the modules.
        exclusion: what of them is each rank's own, and left out; default nothing.
    """

    whole: bool = False
    """Whether this rank holds all elements of every tensor. A subclass must set it to say so: if it were wrongly True,
    shards of different parameters would be averaged."""

    def __init__(self, models: Sequence[nn.Module], exclusion: Exclusion | None = None) -> None:
        self._models, self._exclusion = tuple(models), exclusion
        self.whole = type(self) is Weights and not is_sharded(self._models)

    def tensors(self) -> Iterable[tuple[Tensor, bool]]:
        """Every tensor and whether it is trained, in the same order on every rank. A tied tensor may come twice."""
        # Asked for at every converge: a plain tensor is told without a call.
        return [(t if type(t) in _PLAIN else local(t), t.requires_grad) for t in self._whole_tensors()]

    def shapes(self) -> Iterable[tuple[int, ...]]:
        """The shapes of the whole tensors, in the order of :meth:`tensors`, where it holds shards of them."""
        return [tuple(t.shape) for t in self._whole_tensors()]

    def _whole_tensors(self) -> list[Tensor]:
        reshard(self._models)
        modules = [module for model in self._models for module in model.modules()]
        parameters = [p for module in modules for p in module._parameters.values()]
        buffers = [b for module in modules for b in module._buffers.values()]
        own = self.own_ids()
        return [t for t in (*parameters, *buffers) if t is not None and (not own or id(t) not in own)]

    def slots(self) -> list[Slot]:
        """The same tensors with their names, parameters first; none where a framework keeps them elsewhere."""
        if type(self) is not Weights:
            return []
        reshard(self._models)
        several, own = len(self._models) > 1, self.own_ids()
        found = [
            slot._replace(name=f"model[{i}].{slot.name}") if several else slot
            for i, model in enumerate(self._models)
            for slot in slots(model)
            if id(slot.tensor) not in own
        ]
        return sorted(found, key=lambda slot: not slot.is_parameter)

    def own_ids(self) -> frozenset[int]:
        """Ids of the tensors that are each rank's own."""
        return frozenset() if self._exclusion is None else self._exclusion.ids()

    def written(self) -> None:
        """Must be called after trained tensors were written, before the model runs."""
        reshard(self._models)


def check_modules(name: str, value: Any) -> tuple[nn.Module, ...]:
    """A module, or several, as a tuple.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, nn.Module):
        return (value,)
    rule = "an nn.Module or several"
    if isinstance(value, (str, bytes, type, Tensor, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}, got {type(value).__name__}.")
    if getattr(value, "ndim", 1) == 0:
        raise TypeError(f"Invalid {name}={shown(value)}. Must be {rule}.")
    modules = tuple(value)
    for module in modules:
        check_instance(name, module, nn.Module, f"{rule}, got {type(module).__name__} among them")
    return modules


def is_instance(value: object, module: str, name: str) -> bool:
    """``isinstance`` for a class of torch whose module takes a second to import. If it has not been imported there are
    no instances, and it is not imported here."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


_PLAIN = frozenset({Parameter, Tensor})
"""What no DTensor is an exact instance of."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _PLAIN and is_instance(tensor, "torch.distributed.tensor", "DTensor")


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    # to_local() would make a new object each time, and record it for autograd.
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def groups_of(tensors: Iterable[Tensor], optimizer: Optimizer) -> list[int]:
    """[tensor] index of the parameter group that trains it, or trains what it is a part of; -1 for none."""
    groups = enumerate(optimizer.param_groups)
    plain = [(local(p), group) for group, settings in groups for p in settings["params"]]
    empty = {id(t): group for t, group in plain if not t.numel()}
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, group) for t, group in plain if t.numel())
    starts = [start for start, _, _ in spans]

    def group_of(tensor: Tensor) -> int:
        if not tensor.numel():
            return empty.get(id(tensor), -1)
        i = bisect_right(starts, tensor.data_ptr()) - 1
        return spans[i][2] if i >= 0 and tensor.data_ptr() < spans[i][1] else -1

    return [group_of(tensor) for tensor in tensors]


def reshard(models: Iterable[nn.Module]) -> None:
    """Free the gathered parameters of FSDP2 modules. After a forward pass without a backward pass a root module keeps
    them: its parameters would not be the shards, and would not follow a change of these."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not kind.__subclasses__():  # fully_shard() derives one: without it there is nothing to look for
        return
    for model in models:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def is_sharded(models: Iterable[nn.Module]) -> bool:
    """Whether a model has DTensor parameters or buffers."""
    reshard(models := tuple(models))
    return any(is_dtensor(t) for model in models for t in (*model.parameters(), *model.buffers()))


_REGISTERED: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()
"""Weights that an adapter has attached to a model."""


def register_weights(model: nn.Module, weights: Weights) -> None:
    """For adapters: :func:`weights_of` the model are these from now on. They must not hold a strong reference to it."""
    _REGISTERED[model] = weights


def weights_of(models: Sequence[nn.Module], exclusion: Exclusion | None = None) -> Weights:
    """The weights of ``models``: those that an adapter has registered, else the modules' own but for the exclusion."""
    if len(models) == 1 and (registered := _REGISTERED.get(models[0])) is not None:
        return registered
    return Weights(models, exclusion)
