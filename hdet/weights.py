"""The tensors that make up a replica: what a converge averages, and how it reads and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn


class Weights:
    """The parameters and buffers of modules, as plain tensors that share their memory.

    Where a framework keeps the weights elsewhere (fp32 masters, shards), a subclass says where.

    Args:
        models: the modules.
        extra: further parameters, such as an optimizer's that no module owns.
    """

    def __init__(self, models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> None:
        self._models, self._extra = tuple(models), tuple(extra)

    def tensors(self) -> Iterator[tuple[Tensor, bool]]:
        """Every tensor and whether it is trained, in the same order on every rank. One that is tied may come twice."""
        modules = [module for model in self._models for module in model.modules()]
        parameters = (p for module in modules for p in module._parameters.values())
        buffers = (b for module in modules for b in module._buffers.values())
        return ((t, t.requires_grad) for t in (*parameters, *self._extra, *buffers) if t is not None)

    def written(self) -> None:
        """Called after trained tensors were written, before the model runs on them."""


_ELSEWHERE: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()


def keep_elsewhere(model: nn.Module, weights: Weights) -> None:
    """For adapters: from now on ``weights`` are what ``model``'s weights are. They must not keep the model alive."""
    _ELSEWHERE[model] = weights


def weights_of(models: Sequence[nn.Module], extra: Iterable[Tensor] = ()) -> Weights:
    """The weights of ``models``: where an adapter said they are, else the modules' own and ``extra``."""
    if len(models) == 1 and (elsewhere := _ELSEWHERE.get(models[0])) is not None:
        return elsewhere
    return Weights(models, extra)
