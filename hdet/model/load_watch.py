"""Notices that a model was given other weights than it had, by loading or by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.model.step_hook import BeforeStep

_ELEMENTS = 16
"""Sampled of every tensor."""


class LoadWatch:
    """Compares a sample of the weights before and after the times at which they may be loaded:

    - between a converge and the optimizer's next step, whatever writes them;
    - at any other time by ``load_state_dict()`` of the model or of a part of it.

    Weights that were put back by then, as after an evaluation with averaged ones, count as the same. What is written
    in place in the middle of a round without ``load_state_dict()`` counts as part of the step. What is loaded before
    the first step of a run, or between :meth:`restart` and the next step, belongs to its start.

    Args:
        modules: what may be loaded.
        optimizer: whose steps change the weights.
        tensors: the trained tensors.
    """

    def __init__(
        self, modules: Sequence[nn.Module], optimizer: Optimizer, tensors: Callable[[], Sequence[Tensor]]
    ) -> None:
        self._tensors = tensors
        self._expected: list[Tensor] | None = None
        self._is_starting = True
        self.has_loaded = False
        """Whether other weights have been found since :meth:`forget`."""
        self.when_loaded: Callable[[], None] | None = None
        """Called when other weights are found."""
        self._before_step = BeforeStep(optimizer, self._at_step)
        self._before_step.arm()
        sign = _Sign(self.begin_load)
        self._handles: list[RemovableHandle] = [
            part.register_load_state_dict_pre_hook(sign) for module in modules for part in module.modules()
        ]

    def settle(self) -> None:
        """The weights are right as they are now."""
        self._expected = self._sample()
        self._before_step.arm()

    def restart(self) -> None:
        """Another run goes on from here: what is loaded before its first step belongs to it."""
        self._expected, self._is_starting, self.has_loaded = None, True, False
        self._before_step.arm()

    def forget(self) -> None:
        """What was found has been dealt with."""
        self.has_loaded = False

    def begin_load(self) -> None:
        """The model is about to be loaded."""
        if self._expected is None and not self._is_starting:
            self._expected = self._sample()
            self._before_step.arm()

    def look(self) -> bool:
        """Compare, where there is something to compare with; whether the weights are others."""
        expected, self._expected = self._expected, None
        if expected is None:
            return False
        now = self._sample()
        same = len(now) == len(expected) and all(map(_same, expected, now))
        if not same:
            self.has_loaded = True
            if self.when_loaded is not None:
                self.when_loaded()
        return not same

    def close(self) -> None:
        """Take all hooks away."""
        self._before_step.remove()
        for handle in self._handles:
            handle.remove()
        self._expected = None

    def _at_step(self) -> None:
        self._before_step.disarm()
        self.look()
        self._is_starting = False

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        """By device, some elements of every tensor."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in self._tensors():
            part = tensor.flatten()
            if part.numel() > _ELEMENTS:
                part = part[:: part.numel() // _ELEMENTS][:_ELEMENTS]
            part = torch.view_as_real(part).flatten() if part.is_complex() else part
            is_narrow = part.is_floating_point() and part.element_size() <= 4
            by_device.setdefault(tensor.device, []).append(part.to(torch.float32 if is_narrow else torch.float64))
        return [torch.cat(parts).double() for parts in by_device.values()]


class _Sign:
    """A hook of modules. Copies of the module, and files that it is saved in whole, get one that does nothing, and need
    no hdet."""

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = WeakMethod(method)

    def __call__(self, *_: Any) -> None:
        if (method := self._method()) is not None:
            method()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")  # takes any arguments


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
