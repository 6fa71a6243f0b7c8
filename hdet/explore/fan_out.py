"""Fan-out in place: writing what this replica trains under into the optimizer, and keeping it out of saved state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.explore.hyperparameters import Hyperparameter, ParamGroupField

_ATTACHED: WeakKeyDictionary[Optimizer, ref[FanOut]] = WeakKeyDictionary()
"""What fans out an optimizer's learning rates: the last one built on it."""


class FanOut:
    """Learning rates and other hyperparameters of one replica.

    A schedule writes the base learning rates into the optimizer, :meth:`apply` reads them there and writes this
    replica's. The optimizer's saved state holds the base, and the other hyperparameters' centres.

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
        self._factors = [1.0] * len(self.base)
        self._held: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._hyperparameters)
        self.is_current = True
        """Whether no other has been built on the optimizer since."""
        attached = _ATTACHED.get(optimizer)
        if attached is not None and (previous := attached()) is not None:
            previous.is_current = False
            for hook in previous._hooks:
                hook.remove()
        _ATTACHED[optimizer] = ref(self)
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_state_dict_post_hook(self._clean),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        )

    def draw(self, factors: Sequence[float], held: Sequence[tuple[float, float]]) -> None:
        """Begin a round: by group what multiplies the base learning rate, and by hyperparameter its centre's position
        and this replica's level, written at once."""
        self._factors, self._held = list(factors), list(held)
        self._write_hyperparameters()

    def apply(self) -> None:
        """Read the schedule's learning rates and write this replica's."""
        base, factors = self.base, self._factors
        for i, group in enumerate(self._optimizer.param_groups):
            base[i] = lr = group["lr"]
            if type(lr) is not float and isinstance(lr, Tensor):
                base[i] = lr.clone()
                lr.mul_(factors[i])  # in place: compiled optimizers and CUDA graphs hold on to the tensor
            else:
                group["lr"] = lr * factors[i]

    def undo(self, rates: Sequence[float | Tensor] | None = None) -> None:
        """Put base learning rates back (by default the last ones read): chainable schedulers compute the next rate from
        the one they find."""
        for group, lr in zip(self._optimizer.param_groups, self.base if rates is None else rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _write_hyperparameters(self) -> None:
        for h, (position, level) in zip(self._hyperparameters, self._held, strict=True):
            h.write(position, level)

    def _clean(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Rank 0's own learning rates would load as everybody's."""
        for group, base in zip(state_dict["param_groups"], self.base, strict=True):
            group["lr"] = copied(base)
        for h, (position, _level) in zip(self._hyperparameters, self._held, strict=True):
            if isinstance(h, ParamGroupField):
                h.write_centre(state_dict["param_groups"], position)

    def _loaded(self, _: Optimizer) -> None:
        self.apply()
        self._write_hyperparameters()


def copied(lr: Any) -> Any:
    """A learning rate that does not change with the original."""
    return lr.clone() if isinstance(lr, Tensor) else lr
