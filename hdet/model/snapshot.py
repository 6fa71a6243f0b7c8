"""A copy of a model and its optimizer's state that can be restored in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.model.finite import all_finite, is_float, wide
from hdet.model.optimizers import group_state
from hdet.model.weights import local, weights_of


class Snapshot:
    """Parameters, buffers and optimizer state at one moment.

    :meth:`take` and :meth:`restore` copy in place: no tensor of the model is replaced, and from the second
    :meth:`take` on none is allocated. Of DTensors each rank keeps its own shard; FSDP2 modules must be resharded.

    Args:
        models: whose parameters and buffers are copied.
        optimizer: whose parameters and state are copied, that in its groups too; the settings of its groups, such as
            learning rates, are not.
        device: of the copies; ``None`` for that of the originals.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None = None) -> None:
        self._weights, self._optimizer, self._device = weights_of(tuple(models)), optimizer, device
        self._models = tuple(models)
        self._copies: list[Tensor] = []
        self._state: dict[Tensor, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._early: list[tuple[nn.Module, str, Tensor]] = []
        self._versions: list[int] = []

    @torch.no_grad()
    def take_buffers(self) -> None:
        """Copy the buffers as they are now, for the next :meth:`take`: before a forward pass moves them."""
        buffers = {id(b): (m, k, b) for m in self._modules() for k, b in m._buffers.items() if b is not None}
        self._early = [(m, k, b.detach().clone()) for m, k, b in buffers.values()]
        self._versions = self._trained_versions()

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything as it is now; but buffers as :meth:`take_buffers` found them, unless trained parameters have
        been written since: then the model is another one."""
        tensors = list(self._originals())
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._copies]:
            self._copies = [t.to(self._device or t.device, copy=True) for t in tensors]
        else:
            for copied, t in zip(self._copies, tensors, strict=True):
                copied.copy_(t)
        self._state = {p: {k: self._copy_of(p, k, v) for k, v in s.items()} for p, s in self._optimizer.state.items()}
        pairs = zip(self._optimizer.param_groups, group_state(self._optimizer), strict=True)
        self._groups = [{key: copy.deepcopy(group[key]) for key in keys} for group, keys in pairs]
        if self._early and self._versions == self._trained_versions():
            found = {id(t): copied for t, copied in zip(self._tensors(), self._copies, strict=True)}
            for module, key, buffer in self._early:
                copied = found.get(id(module._buffers.get(key)))  # type: ignore[assignment]
                if copied is not None and copied.shape == buffer.shape:
                    copied.copy_(local(buffer))
        self._early, self._versions = [], []

    def is_finite(self) -> bool:
        """Whether the copies of what is trained, and of the optimizer's state, are finite, and no buffer is NaN."""
        trained = {id(t) for t in self._trained()}
        pairs = list(zip(self._tensors(), self._copies, strict=True))
        state = [local(v) for s in self._state.values() for v in s.values() if isinstance(v, Tensor)]
        plain = [t for t in state if type(t) is Tensor]  # a library's class may hold codes and scales
        has_nan = any(bool(wide(c).isnan().any()) for t, c in pairs if id(t) not in trained and is_float(c))
        return not has_nan and all_finite([*(c for t, c in pairs if id(t) in trained), *plain])

    @torch.no_grad()
    def moved(self) -> float:
        r"""How far the trained parameters are from the copies: the largest of the matrices' distances, each relative to
        its norm or, where that is larger, the norm with which torch would initialise it::

            max_W ||W - copy|| / max(||copy||, sqrt(rows / 3))

        In a model without matrices, of all trained parameters together, relative to their norm."""
        trained = {id(t) for t in self._trained()}
        largest, distance, norm, has_matrix = 0.0, 0.0, 0.0, False
        for t, copied in zip(self._tensors(), self._copies, strict=True):
            if id(t) not in trained or not copied.numel():
                continue
            own = float((local(t).detach().to(copied.device).double() - copied.double()).norm())
            size = float(copied.double().norm())
            distance, norm = math.hypot(distance, own), math.hypot(norm, size)
            if copied.dim() > 1:
                has_matrix = True
                largest = max(largest, own / max(size, math.sqrt(copied.shape[0] / 3))) if own == own else math.nan
        if has_matrix:
            return largest
        return distance / norm if norm else math.inf if distance else 0.0

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
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key, value in kept.items():
                group[key] = copy.deepcopy(value)
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
        return (local(tensor).detach() for tensor in self._tensors())

    def _tensors(self) -> Iterable[Tensor]:
        """Each once."""
        seen: set[int] = set()
        groups = (p for group in self._optimizer.param_groups for p in group["params"])
        for tensor in (*(tensor for tensor, _ in self._weights.tensors()), *groups):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    def _trained(self) -> list[Tensor]:
        groups = (p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad)
        return [*(t for t, trained in self._weights.tensors() if trained), *groups]

    def _trained_versions(self) -> list[int]:
        return [local(t)._version for t in self._trained()]

    def _modules(self) -> Iterable[nn.Module]:
        return (module for model in self._models for module in model.modules())
