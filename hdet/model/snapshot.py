"""A copy of a model and its optimizer's state that can be restored in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.model.weights import local, weights_of


class Snapshot:
    """Parameters, buffers and optimizer state at one moment.

    :meth:`take` and :meth:`restore` copy in place: no tensor of the model is replaced, and from the second
    :meth:`take` on none is allocated. Of DTensors each rank keeps its own shard; FSDP2 modules must be resharded.

    Args:
        models: whose parameters and buffers are copied.
        optimizer: whose parameters and state are copied; the settings of its groups, such as learning rates, are not.
        device: of the copies; ``None`` for that of the originals.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None = None) -> None:
        self._weights, self._optimizer, self._device = weights_of(tuple(models)), optimizer, device
        self._copies: list[Tensor] = []
        self._state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything as it is now."""
        tensors = list(self._originals())
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._copies]:
            self._copies = [t.to(self._device or t.device, copy=True) for t in tensors]
        else:
            for copied, t in zip(self._copies, tensors, strict=True):
                copied.copy_(t)
        self._state = {p: {k: self._copy_of(p, k, v) for k, v in s.items()} for p, s in self._optimizer.state.items()}

    def copies(self) -> dict[int, Tensor]:
        """What :meth:`take` has copied, by the address of the original. Empty before that, or if tensors have changed
        since."""
        originals = list(self._originals())
        if len(originals) != len(self._copies):
            return {}
        return {t.data_ptr(): copied for t, copied in zip(originals, self._copies, strict=True)}

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back. State that the optimizer has made since is dropped; its next step makes it anew."""
        for t, copied in zip(self._originals(), self._copies, strict=True):
            t.copy_(copied)
        self._weights.written()
        states = self._optimizer.state
        for p in [p for p in states if p not in self._state]:
            del states[p]
        for p, saved in self._state.items():
            state = states[p]
            for key in [key for key in state if key not in saved]:
                del state[key]
            for key, value in saved.items():
                current = state.get(key)
                if isinstance(value, Tensor) and isinstance(current, Tensor) and current.shape == value.shape:
                    local(current).copy_(local(value))
                else:
                    state[key] = value.to(p.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

    def _copy_of(self, p: Tensor, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        before = self._state.get(p, {}).get(key)
        if isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype:
            local(before).copy_(local(value))
            return before
        return value.to(self._device or value.device, copy=True)

    def _originals(self) -> Iterable[Tensor]:
        seen: set[int] = set()
        groups = (p for group in self._optimizer.param_groups for p in group["params"])
        for tensor in (*(tensor for tensor, _ in self._weights.tensors()), *groups):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield local(tensor).detach()
