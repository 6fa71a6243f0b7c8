"""What replicas must have in common when a run starts or goes on: tensors, their bits, the optimizer's settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.model.fingerprint import fingerprint
from hdet.model.guards import check_overlaps
from hdet.model.weights import Weights, local
from hdet.model.wrappers import Slot
from hdet.replicas.agreement import Term, differing, digest, same
from hdet.replicas.topology import Replicas

_NOISY: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Modules whose trained parameters differ between replicas by design."""


def mark_noisy(models: Iterable[nn.Module]) -> None:
    """From now on trained parameters of these modules may differ between replicas when a run starts."""
    for model in models:
        for module in model.modules():
            _NOISY[module] = True


_NOT_COMPARED = {"params", "lr", "initial_lr", "name"}
"""Keys of parameter groups: learning rates are compared as the schedule's."""


class Start:
    """Compares the replicas as they are before the optimizer's first step.

    Parameters have moved by the first ``step()`` of the scheduler, each replica's at its own learning rate. So the bits
    are hashed by a hook before the optimizer's first step, and compared at the scheduler's. The hook communicates
    nothing. Buffers that the first forward pass has written, such as BatchNorm's statistics, are not compared.

    Args:
        optimizer: whose settings are compared, and whose parameters' places in it.
        weights: what is averaged.
        modules: ``model=``.
        replicas: who takes part.
        explored: settings of parameter groups in which replicas differ by design: (group, key, index or ``None``).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Weights,
        modules: Sequence[nn.Module],
        replicas: Replicas,
        explored: Iterable[tuple[int, str, int | None]] = (),
    ) -> None:
        self._optimizer, self._weights, self._modules, self._replicas = optimizer, weights, tuple(modules), replicas
        self._explored = set(explored)
        self._hook: RemovableHandle | None = None
        self._buffers: dict[int, int | None] = {}  # by id, the hash of what may be written before the first step
        self._bits: list[int | None] = []
        self._groups: dict[str, Any] = {}
        self._is_captured = False
        self.arm()

    def arm(self) -> None:
        """Let the optimizer's next step hash everything before it changes it: at the start, and after a resume."""
        self._disarm()
        self._is_captured = False
        if self._replicas.size == 1 and self._replicas.members == 1:
            return
        buffers = [slot.tensor for slot in self._weights.slots() if not slot.is_parameter]
        self._buffers = {id(t): _hash(t) for t in buffers}
        capture = WeakMethod(self.capture)

        def before_step(optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            has_closure = any(callable(x) for x in arguments) or named.get("closure") is not None
            # A step without gradients is none.
            if (method := capture()) is not None and (has_closure or _has_gradients(optimizer)):
                method()

        self._hook = self._optimizer.register_step_pre_hook(before_step)

    def capture(self) -> None:
        """Hash everything, once."""
        if self._is_captured:
            return
        self._is_captured = True
        stepped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        self._bits = [self._hash_of(slot, stepped) for slot in self._weights.slots()]
        self._groups = self._settings()
        self._buffers.clear()

    def facts(self) -> dict[str, Any]:
        """Settings of the parameter groups, by name: the same on every rank."""
        return self._groups if self._is_captured else self._settings()

    def end(self) -> None:
        """Nothing is compared any more until :meth:`arm`."""
        self._disarm()  # not in the hook: the optimizer iterates over its hooks then

    def layout(self) -> int:
        """Hash of the names, shapes, strides, dtypes, flags and parameter groups of what is averaged.

        Raises:
            ValueError: if two parameters share memory.
        """
        check_overlaps(self._weights)
        if self._weights.slots() or not self._modules:
            return digest([sorted(one.items()) for one in self.describe(with_values=False)])
        tensors = [(tuple(t.shape), t.stride(), str(t.dtype), trained) for t, trained in self._weights.tensors()]
        return digest(tensors)

    def terms(self) -> dict[str, Term]:
        """A hash of this rank's bits, as they were before the optimizer's first step; -1 if it has taken none."""
        mark = float(digest(self._bits)) if self._is_captured else -1.0
        return {"bits": Term(mark, lambda marks: -1.0 if min(marks) < 0 else same(marks))}

    def is_known(self, told: Sequence[Mapping[str, float]]) -> bool:
        """Whether the optimizers of all replicas have taken a step."""
        return self._replicas.size == 1 or all(one["bits"] >= 0 for one in told)

    def compare(self, told: Sequence[Mapping[str, float]]) -> str:
        """The first tensor whose bits differ, in words; empty where none does. Collective."""
        if len({one["bits"] for one in told}) == 1:
            return ""
        return differing(self._replicas, self.describe())

    def describe(self, *, with_values: bool = True) -> list[dict[str, object]]:
        """Every tensor that is averaged, in order, then the optimizer's parameters in theirs."""
        slots = self._weights.slots()
        bits = self._bits if with_values and len(self._bits) == len(slots) else [None] * len(slots)
        groups = {
            id(p): (i, number)
            for i, group in enumerate(self._optimizer.param_groups)
            for number, p in enumerate(group["params"])
        }
        found: list[dict[str, object]] = []
        for slot, value in zip(slots, bits, strict=True):
            tensor = local(slot.tensor)
            group, number = groups.get(id(slot.tensor), ("none", "none"))
            fact: dict[str, object] = {
                "name": slot.name,
                "shape": tuple(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "strides": tensor.stride() if tensor.layout == torch.strided else str(tensor.layout),
            }
            if slot.is_parameter:
                fact |= {
                    "requires_grad": slot.tensor.requires_grad,
                    "parameter group": group,
                    "place in the group": number,
                }
            found.append({**fact, "values": value})
        return found

    def _hash_of(self, slot: Slot, stepped: set[int]) -> int | None:
        """Of the bits; ``None`` for what is not compared: what another optimizer may have moved, too."""
        is_trained = slot.is_parameter and slot.tensor.requires_grad
        if is_trained and (slot.module in _NOISY or id(slot.tensor) not in stepped):
            return None
        found = _hash(slot.tensor)
        return found if slot.is_parameter or self._buffers.get(id(slot.tensor)) == found else None

    def _settings(self) -> dict[str, Any]:
        groups = self._optimizer.param_groups
        facts: dict[str, Any] = {"optimizer": type(self._optimizer).__name__, "parameter groups": len(groups)}
        for i, group in enumerate(groups):
            name = group.get("name", f"group{i}")
            for key in sorted(set(group) - _NOT_COMPARED):
                value = None if (i, key, None) in self._explored else _plain(group[key])
                if isinstance(value, tuple):
                    value = tuple("explored" if (i, key, j) in self._explored else one for j, one in enumerate(value))
                if value is not None:
                    facts[f"{name}.{key}"] = value
        return facts

    def _disarm(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def warn_of_outside(outside: Sequence[Tensor], replicas: Replicas) -> None:
    """Warn, on the writer, of parameters that the optimizer trains and no module in ``model=`` has."""
    if not outside or replicas.size == 1 or not replicas.writer:
        return
    shapes = ", ".join(str(tuple(p.shape)) for p in outside[:4]) + (", ..." if len(outside) > 4 else "")
    warnings.warn(
        f"The optimizer trains {len(outside)} parameters that are not in model= (of shape {shapes}). They are not "
        "averaged: each replica keeps its own. To average them, pass the module that has them, too: model=[model, "
        "other], or nn.ParameterList(parameters) for those that no module has. If they are each rank's own, name them: "
        "exclude=parameters.",
        stacklevel=3,
    )


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _hash(tensor: Tensor) -> int | None:
    plain = local(tensor).detach()
    if plain.layout != torch.strided or plain.device.type == "meta" or not plain.numel():
        return None
    return fingerprint(plain)


def _plain(value: object) -> Any:
    """A setting as plain values; ``None`` for what is none."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 and value.device.type != "meta" else None
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and len(value) <= 16:
        return tuple(_plain(item) for item in value)
    return "None" if value is None else None
