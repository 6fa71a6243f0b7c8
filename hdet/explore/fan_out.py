"""Writes this replica's hyperparameters into the optimizer, and keeps them out of its saved state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField

_ATTACHED: WeakKeyDictionary[Optimizer, ref[FanOut]] = WeakKeyDictionary()
"""By optimizer: the last :class:`FanOut` built on it."""


class FanOut:
    """Learning rates and other hyperparameters of one replica.

    A schedule writes base learning rates into the optimizer; :meth:`apply` reads them and writes this replica's. The
    optimizer's ``state_dict()`` holds the base learning rates and the other hyperparameters' centres, which are equal
    on all ranks.

    Args:
        optimizer: whose parameter groups are written.
        hyperparameters: what else differs; attached to the optimizer here.
    """

    def __init__(self, optimizer: Optimizer, hyperparameters: Sequence[Hyperparameter] = ()) -> None:
        self._optimizer, self._hyperparameters = optimizer, tuple(hyperparameters)
        for h in self._hyperparameters:
            h.attach(optimizer)
        self.base: list[float | Tensor] = [group["lr"] for group in optimizer.param_groups]
        """The schedule's learning rates, before gain and multiplier."""
        self._scales = [1.0] * len(self.base)
        self._settings: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._hyperparameters)
        self.is_current = True
        """Whether no other :class:`FanOut` has been built on the optimizer since."""
        attached = _ATTACHED.get(optimizer)
        if attached is not None and (previous := attached()) is not None:
            previous.is_current = False
            for hook in previous._hooks:
                hook.remove()
        _ATTACHED[optimizer] = ref(self)
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_state_dict_post_hook(self._on_state_dict),
            optimizer.register_load_state_dict_post_hook(self._on_load),
        )

    def begin_round(self, scales: Sequence[float], settings: Sequence[tuple[float, float]]) -> None:
        """Set what holds for a round. The hyperparameters are written at once, the learning rates by :meth:`apply`.

        Args:
            scales: by parameter group, what multiplies the base learning rate: gain times multiplier.
            settings: by hyperparameter, (position of its centre, level of this replica).
        """
        self._scales, self._settings = list(scales), list(settings)
        self._write_hyperparameters()

    def apply(self) -> None:
        """Read the base learning rates that the schedule has written, and write this replica's."""
        base, scales = self.base, self._scales
        for i, group in enumerate(self._optimizer.param_groups):
            base[i] = lr = group["lr"]
            if type(lr) is not float and isinstance(lr, Tensor):
                base[i] = lr.clone()
                lr.mul_(scales[i])  # in place: compiled optimizers and CUDA graphs keep the tensor
            else:
                group["lr"] = lr * scales[i]

    def undo(self, rates: Sequence[float | Tensor] | None = None) -> None:
        """Write base learning rates, by default the last ones read. To be called before a schedule's step: chainable
        schedulers compute the next learning rate from the one in the optimizer."""
        for group, lr in zip(self._optimizer.param_groups, self.base if rates is None else rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _write_hyperparameters(self) -> None:
        for h, (position, level) in zip(self._hyperparameters, self._settings, strict=True):
            h.write(position, level)

    def _on_state_dict(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Replace this replica's values by those that are equal on all ranks."""
        for group, base in zip(state_dict["param_groups"], self.base, strict=True):
            group["lr"] = copied(base)
        for h, (position, _level) in zip(self._hyperparameters, self._settings, strict=True):
            if isinstance(h, ParamGroupField):
                h.write_centre(state_dict["param_groups"], position)

    def _on_load(self, _: Optimizer) -> None:
        self.apply()
        self._write_hyperparameters()


def copied(lr: Any) -> Any:
    """A copy of a learning rate; of a tensor, with memory of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr
