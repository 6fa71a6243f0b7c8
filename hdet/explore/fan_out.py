"""Writes this replica's hyperparameters into the optimizer, and keeps them out of its saved state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.errors import check_number, shown
from hdet.explore.by_hand import ByHand, read_by_hand
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField
from hdet.explore.rates import copied, like, put, scale, share_memory, version_of
from hdet.model.step_hook import BeforeStep
from hdet.transaction import AllOrNothing, attributes_of

_ATTACHED: WeakKeyDictionary[Optimizer, ref[FanOut]] = WeakKeyDictionary()
"""By optimizer: the last :class:`FanOut` that took it over."""


class FanOut:
    """Learning rates and other hyperparameters of one replica.

    A schedule writes base learning rates into the optimizer; :meth:`apply` reads them and writes this replica's. The
    optimizer's ``state_dict()`` holds the base learning rates and the other hyperparameters' centres, which are equal
    on all ranks. A learning rate that somebody else has written stands in it as it is.

    Learning rates that were written by hand between two steps are seen by :meth:`notice` at the next one, and become
    the base from which the schedule goes on: see :mod:`hdet.explore.by_hand`.

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
        count = len(self.base)
        self._gains, self._multipliers, self._scales = [1.0] * count, [1.0] * count, [1.0] * count
        self._differs = [False] * count  # between replicas
        self._settings: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._hyperparameters)
        self.written: list[Any] = list(self.base)
        """What stands in the optimizer, if nobody else has written it."""
        self._versions = [version_of(lr) for lr in self.base]
        self._owners: tuple[dict[int, Tensor], dict[int, int]] = ({}, {})  # see _owners_of()
        self._aside: list[Any] = []  # by group, this replica's learning rates while base ones stand in their place
        self.has_tensors = any(isinstance(lr, Tensor) for lr in self.base)
        """Whether a learning rate is a tensor, which can be written in place."""
        self._is_parked = False  # base learning rates stand in the optimizer, not this replica's
        self.expected: list[Any] | None = self.written
        """The same, or ``None`` where there is something to do even so."""
        self._before_step = BeforeStep(optimizer, self.come_back)
        self.by_hand: dict[int, ByHand] = {}
        """By parameter group, what was last written by hand since the replicas compared."""
        self.is_current = True
        """Whether no other :class:`FanOut` has been built on the optimizer since."""
        attached = _ATTACHED.get(optimizer)
        if attached is not None and (previous := attached()) is not None:
            previous.release()
        _ATTACHED[optimizer] = ref(self)
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_state_dict_post_hook(self._on_state_dict),
            optimizer.register_load_state_dict_post_hook(self._on_load),
        )

    def begin_round(
        self,
        gains: Sequence[float],
        multipliers: Sequence[float],
        settings: Sequence[tuple[float, float]],
        differs: Sequence[bool] = (),
    ) -> None:
        """Set what holds for a round. The hyperparameters are written at once, the learning rates by :meth:`apply`.

        Args:
            gains: by parameter group; times the multiplier it is what multiplies the base learning rate.
            multipliers: by parameter group, this replica's.
            settings: by hyperparameter, (position of its centre, level of this replica).
            differs: by parameter group, whether replicas of other processes have other multipliers.
        """
        self._gains, self._multipliers = list(gains), list(multipliers)
        self._scales = [gain * rho for gain, rho in zip(gains, multipliers, strict=True)]
        self._settings, self._differs = list(settings), list(differs) or [False] * len(self._gains)
        self._write_hyperparameters()

    def apply(self, rates: Sequence[float] | None = None) -> None:
        """Read the base learning rates that the schedule has written, and write this replica's.

        Args:
            rates: the base learning rates, by parameter group, where those that are tensors have not been written.
        """
        base, scales, written = self.base, self._scales, self.written
        tensors: dict[int, Tensor] = {}
        for i, group in enumerate(self._optimizer.param_groups):
            lr = group["lr"]
            if type(lr) is not float and isinstance(lr, Tensor):
                tensors[i] = lr
            else:
                base[i] = lr
                written[i] = group["lr"] = lr * scales[i]
        if tensors:
            self._apply_to_tensors(tensors, rates)

    def _apply_to_tensors(self, tensors: dict[int, Tensor], rates: Sequence[float] | None) -> None:
        # In place: compiled optimizers and CUDA graphs keep the tensor. Groups may share it: torch's optimizers take
        # one tensor for all groups. It is then multiplied once. In one launch, or in two where the rates must be read.
        owners = self._owners_of(tensors)
        lrs = {owner: tensors[owner] for owner in owners.values()}
        base: dict[int, float | Tensor]
        if rates is None:
            base = dict(zip(lrs, torch._foreach_mul([*lrs.values()], 1.0), strict=True))
            torch._foreach_mul_([*lrs.values()], [self._scales[i] for i in lrs])
        else:
            base = {i: rates[i] for i in lrs}
            gains, multipliers = ([factors[i] for i in lrs] for factors in (self._gains, self._multipliers))
            scale([*lrs.values()], [rates[i] for i in lrs], gains, multipliers)
        for i, lr in tensors.items():
            self.base[i] = base[owners[i]]
            self.written[i], self._versions[i] = lr, lr._version
        self.has_tensors = True

    def _owners_of(self, tensors: dict[int, Tensor]) -> dict[int, int]:
        """By parameter group whose learning rate is a tensor, the first group that has its memory."""
        known, owners = self._owners
        if len(known) != len(tensors) or not all(known.get(i) is lr for i, lr in tensors.items()):
            owners = {
                i: next(j for j, other in tensors.items() if share_memory(other, lr)) for i, lr in tensors.items()
            }
            self._owners = tensors, owners
        return owners

    def share(self, i: int, j: int) -> bool:
        """Whether two parameter groups have one learning rate."""
        groups = self._optimizer.param_groups
        return i == j or share_memory(groups[i]["lr"], groups[j]["lr"])

    def undo(self, rates: Sequence[float | Tensor] | None = None) -> None:
        """Write base learning rates, by default the last ones read. To be called before a schedule's step: chainable
        schedulers compute the next learning rate from the one in the optimizer."""
        if rates is not None:
            self._end_parking()
            self.by_hand.clear()
        for group, lr in zip(self._optimizer.param_groups, self.base if rates is None else rates, strict=True):
            put(group, lr)

    # ------------------------------------------------------------------------------------------- written by others

    def is_untouched(self) -> bool:
        """Whether this writes into the optimizer, and its learning rates stand there as they were last written."""
        if [group["lr"] for group in self._optimizer.param_groups] != self.expected:
            return False
        return not self.has_tensors or [version_of(lr) for lr in self.written] == self._versions

    def notice(self) -> list[int]:
        """Where it is not: take over what was written by hand as the base, and put this replica's rates back where they
        had been put aside. Returns the parameter groups that were written by hand."""
        was_parked, groups = self._is_parked, []
        seen: list[Any] = []
        for i, group in enumerate(self._optimizer.param_groups):
            lr = group["lr"]
            if self._is_own(i) or any(share_memory(lr, other) for other in seen):
                continue
            groups.append(i)
            seen.append(lr)
            self._take(i, lr, was_parked)
        if was_parked:
            self._end_parking()
            self._write_hyperparameters()
            for i, group in enumerate(self._optimizer.param_groups):
                if i not in groups:
                    put(group, self._aside[i])
        self._remember(range(len(self.base)))
        return groups

    def _remember(self, groups: Iterable[int]) -> None:
        """What stands in these groups is what was last written."""
        for i in groups:
            lr = self._optimizer.param_groups[i]["lr"]
            self.written[i], self._versions[i] = lr, version_of(lr)
        self.has_tensors = any(isinstance(lr, Tensor) for lr in self.written)

    def _take(self, i: int, lr: Any, was_parked: bool) -> None:
        """Make what was written into group ``i``, and those that share its tensor, the base."""
        if was_parked:
            new = copied(lr)
        elif not self._differs[i]:
            new = lr / self._gains[i]
        else:
            rho = self._scales[i] / self._gains[i]
            self.by_hand[i] = read_by_hand(float(lr), float(self.base[i]) * self._scales[i], rho)
            new = lr / (self._scales[i] if self.by_hand[i].is_factor else self._gains[i])
        self.set_base(i, new)

    def set_base(self, i: int, lr: float | Tensor) -> None:
        """Set the base learning rate of group ``i`` and of those that share its tensor."""
        for j in range(len(self.base)):
            if self.share(i, j):
                self.base[j] = lr

    def _is_own(self, i: int) -> bool:
        """Whether a group's learning rate is what was last written."""
        lr, written = self._optimizer.param_groups[i]["lr"], self.written[i]
        if isinstance(lr, Tensor):
            return lr is written and lr._version == self._versions[i]
        return lr is written or (not isinstance(written, Tensor) and lr == written)

    # ----------------------------------------------------------------------------------------------- handing it over

    def park(self, *, comes_back: bool, whole: bool) -> None:
        """Put the base learning rates and the other hyperparameters' centres into the optimizer, where nobody else has
        written since.

        Args:
            comes_back: whether this replica's are put back just before the optimizer's next step, unless somebody else
                has written by then.
            whole: whether hyperparameters outside the optimizer, which a forward pass reads, go to their centres too.
        """
        groups = self._optimizer.param_groups
        owned = [i for i in range(len(self.base)) if self._is_own(i)]
        # Tensors where the rates are: a compiled step, which calls come_back(), would be compiled anew for each float.
        self._aside = [
            like(group["lr"], base * factor)
            for group, base, factor in zip(groups, self.base, self._scales, strict=True)
        ]
        for i in owned:
            put(groups[i], self.base[i])
        for h, (position, _level) in zip(self._hyperparameters, self._settings, strict=True):
            if whole or isinstance(h, ParamGroupField):
                h.write(position)
        self._remember(owned)
        self._is_parked, self.expected = True, None
        if comes_back:
            self._before_step.arm()

    def come_back(self) -> None:
        """Undo :meth:`park`, where nobody else has written since."""
        groups = self._optimizer.param_groups
        if not all(group["lr"] is self.written[i] and self._is_own(i) for i, group in enumerate(groups)):
            self._before_step.disarm()  # another scheduler's now, or written by hand: notice() will say
            return
        self._end_parking()
        self._write_hyperparameters()
        for group, lr in zip(groups, self._aside, strict=True):
            put(group, lr)
        self._remember(range(len(groups)))

    def _end_parking(self) -> None:
        self._is_parked, self.expected = False, self.written
        self._before_step.disarm()

    def release(self) -> None:
        """Leave the optimizer to others: base learning rates and centres in it, and no hooks."""
        if not self.is_current:
            return
        if len(self._optimizer.param_groups) == len(self.base):
            self.park(comes_back=False, whole=True)
        self._before_step.remove()
        self.is_current, self.expected = False, None
        for hook in self._hooks:
            hook.remove()
        if (attached := _ATTACHED.get(self._optimizer)) is not None and attached() is self:
            del _ATTACHED[self._optimizer]

    @property
    def own(self) -> list[float | Tensor]:
        """This replica's learning rates, by group, also while they are put aside."""
        groups = self._optimizer.param_groups
        if self._is_parked and self.is_current:
            pairs = enumerate(zip(self._aside, groups, strict=True))
            return [copied(lr if self._is_own(i) else group["lr"]) for i, (lr, group) in pairs]
        return [copied(group["lr"]) for group in groups]

    # ------------------------------------------------------------------------------------------------- saved state

    def _write_hyperparameters(self) -> None:
        for h, (position, level) in zip(self._hyperparameters, self._settings, strict=True):
            h.write(position, level)

    def _on_state_dict(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Replace this replica's values by those that are equal on all ranks."""
        self.check_groups()
        live = self._optimizer.param_groups
        for i, (group, base) in enumerate(zip(state_dict["param_groups"], self.base, strict=True)):
            lr = like(live[i]["lr"], base) if self._is_own(i) else copied(live[i]["lr"])
            if isinstance(group.get("initial_lr"), Tensor) and share_memory(group["initial_lr"], live[i]["lr"]):
                group["initial_lr"] = copied(lr)
            group["lr"] = lr
        for h, (position, _level) in zip(self._hyperparameters, self._settings, strict=True):
            if isinstance(h, ParamGroupField):
                h.write_centre(state_dict["param_groups"], position)

    def _on_load(self, _: Optimizer) -> None:
        self.check_groups()
        self._end_parking()
        self.by_hand.clear()
        self.apply()
        self._write_hyperparameters()

    def check_groups(self) -> None:
        """Raise ValueError if the optimizer has other parameter groups than when this was built."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self.base):
            raise ValueError(
                f"The optimizer has {len(groups)} parameter groups and had {len(self.base)} when hdet was built. Build "
                "the scheduler after the last add_param_group()."
            )


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


def keep_fan_out(optimizer: Optimizer) -> Callable[[], None]:
    """What puts back, as it is now, who writes into the optimizer, and what that keeps; once the optimizer has been."""
    attached = _ATTACHED.get(optimizer)
    current = None if attached is None else attached()
    if current is None:

        def leave() -> None:
            _ATTACHED.pop(optimizer, None)

        return leave
    parts = [attributes_of(current), attributes_of(current._before_step), *(h.keep() for h in current._hyperparameters)]

    def undo() -> None:
        for part in parts:
            part()
        _ATTACHED[optimizer] = ref(current)

    return undo


def hand_over(optimizer: Optimizer) -> None:
    """If an hdet scheduler writes into the optimizer, let it put base learning rates and centres there and write no
    more: what is built next begins from them."""
    attached = _ATTACHED.get(optimizer)
    if attached is not None and (current := attached()) is not None:
        current.release()
