"""Explore, the first phase of a round: what each replica of this process trains under."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hdet.errors import check_batches, check_item, check_mapping
from hdet.explore.by_hand import agree
from hdet.explore.fan_out import FanOut
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.rates import like
from hdet.explore.virtual import VirtualReplicas

logger = logging.getLogger("hdet")
_lr_of = itemgetter("lr")


class ExplorePhase:
    """Draws once per round, and writes at every step, the settings of this process's replicas.

    Args:
        optimizer: whose learning rates fan out.
        hyperparameters: what else differs; attached to the optimizer here.
        virtual: ``K``, replicas of this process.
        rank: index of this process among those of the other replicas.
        may_park: whether the optimizer's step calls hooks, with the parameter groups that it has between steps.
        overwritten_by: name of a schedule that computes learning rates from the step alone; empty for one that goes on
            from the last ones. For a warning.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hyperparameters: Sequence[Hyperparameter],
        virtual: int,
        rank: int,
        *,
        may_park: bool = True,
        overwritten_by: str = "",
    ) -> None:
        self._optimizer, self._rank = optimizer, rank
        self._may_park = may_park
        self.overwritten_by = overwritten_by
        """Name of the schedule, if it computes learning rates from the step alone."""
        self._has_told = self._is_closed = False
        self.hyperparameters = tuple(hyperparameters)
        """What differs beside the learning rates."""
        self._fan_out = FanOut(optimizer, self.hyperparameters)
        self.virtual = VirtualReplicas(optimizer, virtual) if virtual > 1 else None
        """The replicas of this process, if it has several."""
        self._multipliers: list[Sequence[float]] = []
        # Bound once: they are called in every step.
        self.fan_out = self._fan_out.apply
        """Read the schedule's learning rates and write this replica's."""
        self.undo = self._fan_out.undo
        """Put base learning rates back, by default the last ones read."""

    def check(self) -> None:
        """Take over what was written into the optimizer by hand; raise where this is not what writes into it."""
        fan_out = self._fan_out
        # In every step: as short as can be. Lists compare their items by identity first.
        if [*map(_lr_of, self._optimizer.param_groups)] == fan_out.expected and not fan_out.has_tensors:
            return
        if fan_out.is_untouched():
            return
        if not fan_out.is_current:
            raise RuntimeError(
                "Another hdet scheduler was built on this optimizer since; step that one."
                if not self._is_closed
                else "This hdet scheduler is closed: it has handed the optimizer back. Build another to go on."
            )
        fan_out.check_groups()
        by_hand = fan_out.notice()
        if by_hand and not self._has_told and self.overwritten_by:
            self._has_told = True
            logger.warning(
                f"The learning rate of parameter group {by_hand[0]} was written by hand. {self.overwritten_by} "
                "computes it from the step alone, so that it lasts until the schedule's next step, as in torch. Pass "
                "what you want as max_lr or in the function of the step, or take a schedule that goes on from the last "
                "learning rate."
            )

    @property
    def by_hand(self) -> tuple[int, ...]:
        """Parameter groups whose learning rates were written by hand, and have not been compared."""
        return tuple(sorted(self._fan_out.by_hand))

    @property
    def by_hand_together(self) -> list[int]:
        """The same, with all groups that share a tensor with one of them."""
        return [j for j in range(len(self._fan_out.base)) if any(self._fan_out.share(i, j) for i in self.by_hand)]

    def readings(self) -> list[float]:
        """What these were, to be gathered from all ranks."""
        fan_out = self._fan_out
        return [x for i in self.by_hand for x in fan_out.by_hand[i].readings(float(fan_out.base[i]))]

    def agree(self, rows: Sequence[Sequence[float]], names: Sequence[str]) -> None:
        """Make one base learning rate of all ranks' :meth:`readings`.

        Raises:
            ReplicaMismatchError: on every rank, if there is none.
        """
        fan_out = self._fan_out
        for k, i in enumerate(self.by_hand):
            agreed, base = agree(names[i], [row[3 * k : 3 * k + 3] for row in rows]), fan_out.base[i]
            fan_out.set_base(i, torch.full_like(base, agreed) if isinstance(base, Tensor) else agreed)
        fan_out.by_hand.clear()

    @property
    def is_current(self) -> bool:
        """Whether this writes into the optimizer, and no scheduler that was built on it since."""
        return self._fan_out.is_current

    def park(self, *, finally_: bool) -> None:
        """Put base learning rates and centres into the optimizer, between a converge and the next step.

        Args:
            finally_: whether no step follows. Else this replica's are put back just before the optimizer's next one,
                unless somebody else has written there; they stay where they are if the optimizer does not call hooks.
        """
        if not self._fan_out.is_current:
            return
        if finally_:
            self._fan_out.park(comes_back=False, whole=True)
        elif self._may_park and not any(group.get("capturable") for group in self._optimizer.param_groups):
            self._fan_out.park(comes_back=True, whole=False)

    def close(self) -> None:
        """Hand the optimizer and the hyperparameters back: base learning rates, centres, no hooks."""
        if self.virtual is not None:
            self.virtual.close()
        self._is_closed = True
        self._fan_out.release()

    def draw(
        self,
        gains: Sequence[float],
        multipliers: Sequence[Sequence[float]],
        positions: Sequence[float],
        levels: Sequence[Sequence[float]],
    ) -> None:
        """Begin a round. The learning rates are written by the next :meth:`fan_out`, the rest at once.

        Args:
            gains: [parameter group]
            multipliers: [parameter group][replica] ``rho``.
            positions: [hyperparameter] of its centre.
            levels: [hyperparameter][replica]
        """
        own = self._rank
        held = [(position, of[own]) for position, of in zip(positions, levels, strict=True)]
        if self.virtual is None:
            differs = [len(set(rho)) > 1 for rho in multipliers]
            self._fan_out.begin_round(gains, [rho[own] for rho in multipliers], held, differs)
        else:  # the one optimizer takes its steps at the mean of the process's replicas
            self._multipliers = list(multipliers)
            self._fan_out.begin_round(gains, [1.0] * len(gains), held)
            self.gather_in()

    def gather_in(self) -> None:
        """The virtual replicas are one, at the parameters as they are."""
        if self.virtual is not None:
            count, first = self.virtual.count, self._rank * self.virtual.count
            self.virtual.restart([rho[first : first + count] for rho in self._multipliers])

    def visit(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of a step, each at its virtual replica's point; see :meth:`hdet.Ensemble.each`."""
        check_batches("micro_batches", micro_batches, text=True)
        return iter(micro_batches) if self.virtual is None else self.virtual.visit(micro_batches)

    def neutral(self, positions: Sequence[float]) -> list[AbstractContextManager[None]]:
        """The settings under which replicas are compared, by the centres' positions."""
        return [h.neutral(position) for h, position in zip(self.hyperparameters, positions, strict=True)]

    @property
    def own_lr(self) -> list[float | Tensor]:
        """[parameter group] this replica's learning rate."""
        return self._fan_out.own

    @property
    def base_lr(self) -> list[float | Tensor]:
        """[parameter group] the schedule's learning rate, before gain and multiplier."""
        pairs = zip(self._fan_out.written, self._fan_out.base, strict=True)
        return [like(lr, base) for lr, base in pairs]

    @property
    def plain_base_lr(self) -> tuple[float, ...]:
        """The same as floats. Waits for the device where they are tensors there."""
        return tuple(float(lr) for lr in self._fan_out.base)

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        return {"starts": {h.name: list(h.starts) for h in self.hyperparameters}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot. The centres' positions, which the last phase has saved,
        have been checked."""
        starts = check_mapping("starts", check_item("The saved state", state, "starts"), "a mapping by hyperparameter")
        for h in self.hyperparameters:
            h.check_place(starts.get(h.name, ()), state["hyperparameters"][h.name][0])

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        for h in self.hyperparameters:
            h.starts = [float(start) for start in state["starts"][h.name]]
