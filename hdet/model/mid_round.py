"""Says that a model is evaluated or saved in the middle of a round, where each rank has another one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("hdet")

_CALL = "Add scheduler.converge(), on every rank, before "


class MidRoundWatch:
    """Logs a warning, once for each, where the replicas are apart and

    - the model runs in eval mode without gradients;
    - ``state_dict()`` of the model is called.

    It watches the modules themselves, and what ``DistributedDataParallel`` and ``torch.compile`` wrap. A forward pass
    that is compiled together with one of these is not seen.

    Args:
        modules: ``model=``.
        apart: a bound method, held weakly: how many steps the replicas have trained apart; 0 where they have not, or
            another rank says it.
    """

    def __init__(self, modules: Sequence[nn.Module], apart: Callable[[], int]) -> None:
        self._method = WeakMethod(apart)
        self._is_evaluation_told = self._is_saving_told = False
        runs, saves = _Runs(self._look_at_run), _Saves(self._look_at_state)
        self._handles: list[RemovableHandle] = []
        for module in modules:
            for layer in _layers(module):
                self._handles.append(layer.register_forward_pre_hook(runs))
                self._handles.append(layer.register_state_dict_pre_hook(saves))

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _apart(self) -> int:
        method = self._method()
        return 0 if method is None else method()

    def _look_at_run(self) -> None:
        if not self._is_evaluation_told and (steps := self._apart()):
            self._is_evaluation_told = True
            logger.warning(
                f"The model was evaluated {steps} steps after the replicas last converged: each rank has run a replica "
                f"of its own, and not the model. {_CALL}evaluating."
            )

    def _look_at_state(self) -> None:
        if not self._is_saving_told and (steps := self._apart()):
            self._is_saving_told = True
            logger.warning(
                f"The model's state_dict() was taken {steps} steps after the replicas last converged: what is saved is "
                f"one replica, and not the model. {_CALL}saving."
            )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and the one that it only wraps."""
    while True:
        yield module
        inner = module.module if isinstance(module, DistributedDataParallel) else module._modules.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return
        module = inner


class _Hook:
    """Of modules. Copies of a module, and files that it is saved in whole, get one that does nothing, and need no
    hdet."""

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = WeakMethod(method)

    def _tell(self) -> None:
        if (method := self._method()) is not None:
            method()


class _Runs(_Hook):
    def __call__(self, module: nn.Module, _: Any) -> None:
        # Compilers go through this, too, and must find nothing to do.
        if not torch.compiler.is_compiling() and not module.training and not torch.is_grad_enabled():
            self._tell()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ({}, "get")  # returns the second argument: the inputs as they are


class _Saves(_Hook):
    def __call__(self, *_: Any) -> None:
        self._tell()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")  # takes any arguments
