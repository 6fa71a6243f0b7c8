"""A copy of a model and its optimizer that can be put back in place."""

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
        models: whose parameters and buffers are kept.
        optimizer: whose state is kept; its parameters too. Learning rates and other settings of its groups are not.
        device: where the copy lies; ``None`` for beside the original.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None = None) -> None:
        self._weights, self._optimizer, self._device = weights_of(tuple(models)), optimizer, device
        self._tensors: list[Tensor] = []
        self._state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything as it is now."""
        tensors = list(self._live())
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._tensors]:
            self._tensors = [t.to(self._device or t.device, copy=True) for t in tensors]
        else:
            for kept, t in zip(self._tensors, tensors, strict=True):
                kept.copy_(t)
        self._state = {p: {k: self._kept(p, k, v) for k, v in s.items()} for p, s in self._optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back. State that the optimizer has made since is dropped, and made anew at its next step."""
        for t, kept in zip(self._live(), self._tensors, strict=True):
            t.copy_(kept)
        self._weights.written()
        live = self._optimizer.state
        for p in [p for p in live if p not in self._state]:
            del live[p]
        for p, kept_state in self._state.items():
            state = live[p]
            for key in [key for key in state if key not in kept_state]:
                del state[key]
            for key, kept in kept_state.items():
                now = state.get(key)
                if isinstance(kept, Tensor) and isinstance(now, Tensor) and now.shape == kept.shape:
                    local(now).copy_(local(kept))
                else:
                    state[key] = kept.to(p.device, copy=True) if isinstance(kept, Tensor) else copy.deepcopy(kept)

    def _kept(self, p: Tensor, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        before = self._state.get(p, {}).get(key)
        if isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype:
            local(before).copy_(local(value))
            return before
        return value.to(self._device or value.device, copy=True)

    def _live(self) -> Iterable[Tensor]:
        seen: set[int] = set()
        groups = (p for group in self._optimizer.param_groups for p in group["params"])
        for tensor in (*(tensor for tensor, _ in self._weights.tensors()), *groups):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield local(tensor).detach()
