"""Writes this replica's hyperparameters into the optimizer, and keeps them out of its saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.errors import check_number, shown
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField
from hdet.transaction import AllOrNothing

_ATTACHED: WeakKeyDictionary[Optimizer, ref[FanOut]] = WeakKeyDictionary()
"""By optimizer: the last :class:`FanOut` that took it over."""


class FanOut:
    """Learning rates and other hyperparameters of one replica.

    A schedule writes base learning rates into the optimizer; :meth:`apply` reads them and writes this replica's. The
    optimizer's ``state_dict()`` holds the base learning rates and the other hyperparameters' centres, which are equal
    on all ranks.

    Args:
        optimizer: whose parameter groups are written.
        hyperparameters: what else differs; attached to the optimizer here.

    Raises:
        TypeError, ValueError: for a learning rate that is no finite number >= 0, or a hyperparameter that the optimizer
            does not have; everything is then as it was.
    """

    def __init__(self, optimizer: Optimizer, hyperparameters: Sequence[Hyperparameter] = ()) -> None:
        self._optimizer, self._hyperparameters = optimizer, tuple(hyperparameters)
        with AllOrNothing(optimizer) as transaction:
            for h in self._hyperparameters:
                transaction.on_failure(h.keep())
                h.attach(optimizer)
            self.base: list[float | Tensor] = [check_lr(i, group) for i, group in enumerate(optimizer.param_groups)]
            """The schedule's learning rates, before gain and multiplier."""
        self._scales = [1.0] * len(self.base)
        self._settings: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._hyperparameters)
        self.is_current = False
        """Whether it has taken the optimizer over, and no other :class:`FanOut` has since."""
        self._hooks: tuple[RemovableHandle, ...] = ()

    def take_over(self) -> None:
        """Be the one that writes into the optimizer. To be called last, when all else about a scheduler is sure."""
        attached = _ATTACHED.get(self._optimizer)
        if attached is not None and (previous := attached()) is not None:
            previous.is_current = False
            for hook in previous._hooks:
                hook.remove()
        _ATTACHED[self._optimizer] = ref(self)
        self._hooks = (
            self._optimizer.register_state_dict_post_hook(self._on_state_dict),
            self._optimizer.register_load_state_dict_post_hook(self._on_load),
        )
        self.is_current = True

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

    def check_groups(self) -> None:
        """Raise ``ValueError`` where the optimizer has other parameter groups than when this was built."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self.base):
            raise ValueError(
                f"The optimizer has {len(groups)} parameter groups and had {len(self.base)} when hdet was built. Build "
                "the scheduler after the last add_param_group()."
            )

    def _write_hyperparameters(self) -> None:
        for h, (position, level) in zip(self._hyperparameters, self._settings, strict=True):
            h.write(position, level)

    def _on_state_dict(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Replace this replica's values by those that are equal on all ranks."""
        self.check_groups()
        for group, base in zip(state_dict["param_groups"], self.base, strict=True):
            group["lr"] = copied(base)
        for h, (position, _level) in zip(self._hyperparameters, self._settings, strict=True):
            if isinstance(h, ParamGroupField):
                h.write_centre(state_dict["param_groups"], position)

    def _on_load(self, _: Optimizer) -> None:
        self.check_groups()
        self.apply()
        self._write_hyperparameters()


def check_lr(index: int, group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of parameter group ``index``: a finite number >= 0, or a tensor of one element that is.

    Raises:
        TypeError, ValueError: for anything else.
    """
    name, rule = f"optimizer.param_groups[{index}]['lr']", "finite and >= 0, for the schedule to begin from"
    lr = group.get("lr")
    if not isinstance(lr, Tensor):
        check_number(name, lr, rule, lambda lr: lr >= 0)
        return lr  # type: ignore[return-value]
    if lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool:
        raise TypeError(f"Invalid {name}={shown(lr)}. Must be a tensor of one number, {rule}.")
    if not lr.is_meta:
        check_number(name, lr.item(), rule, lambda lr: lr >= 0)
    return lr


def copied(lr: Any) -> Any:
    """A copy of a learning rate; of a tensor, with memory of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr
