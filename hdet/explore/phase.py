"""Explore, the first phase of a round: what each replica of this process trains under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hdet.explore.fan_out import FanOut, copied
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.virtual import VirtualReplicas


class ExplorePhase:
    """Draws once per round, and writes at every step, the settings of this process's replicas.

    Args:
        optimizer: whose learning rates fan out.
        hyperparameters: what else differs; attached to the optimizer here.
        virtual: ``K``, replicas of this process.
        rank: index of this process among those of the other replicas.
    """

    def __init__(
        self, optimizer: Optimizer, hyperparameters: Sequence[Hyperparameter], virtual: int, rank: int
    ) -> None:
        self._optimizer, self._rank = optimizer, rank
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
        """Raise where this optimizer is no longer the one that it was built on."""
        fan_out, groups = self._fan_out, self._optimizer.param_groups
        if fan_out.is_current and len(groups) == len(fan_out.base):
            return
        if not fan_out.is_current:
            raise RuntimeError("Another hdet scheduler was built on this optimizer since; step that one.")
        raise ValueError(
            f"The optimizer has {len(groups)} parameter groups and had {len(fan_out.base)} when hdet was built. Build "
            "the scheduler after the last add_param_group()."
        )

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
            self._fan_out.begin_round([gain * rho[own] for gain, rho in zip(gains, multipliers, strict=True)], held)
        else:  # the one optimizer takes its steps at the mean of the process's replicas
            self._multipliers = list(multipliers)
            self._fan_out.begin_round(gains, held)
            self.gather_in()

    def gather_in(self) -> None:
        """The virtual replicas are one, at the parameters as they are."""
        if self.virtual is not None:
            count, first = self.virtual.count, self._rank * self.virtual.count
            self.virtual.restart([rho[first : first + count] for rho in self._multipliers])

    def visit(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of a step, each at its virtual replica's point; see :meth:`hdet.Ensemble.each`."""
        return iter(micro_batches) if self.virtual is None else self.virtual.visit(micro_batches)

    def neutral(self, positions: Sequence[float]) -> list[AbstractContextManager[None]]:
        """The settings under which replicas are compared, by the centres' positions."""
        return [h.neutral(position) for h, position in zip(self.hyperparameters, positions, strict=True)]

    @property
    def base_lr(self) -> list[float | Tensor]:
        """[parameter group] the schedule's learning rate, before gain and multiplier."""
        return [copied(lr) for lr in self._fan_out.base]

    @property
    def plain_base_lr(self) -> tuple[float, ...]:
        """The same as floats. Waits for the device where they are tensors there."""
        return tuple(float(lr) for lr in self._fan_out.base)

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        return {"starts": {h.name: list(h.starts) for h in self.hyperparameters}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if :meth:`load` cannot."""
        for h in self.hyperparameters:
            starts = state["starts"].get(h.name, ())
            if len(starts) != len(h.starts):
                raise ValueError(
                    f"The saved state has {h.name} in {len(starts)} places, this run in {len(h.starts)}: other "
                    "parameter groups or modules."
                )

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        for h in self.hyperparameters:
            h.starts = list(state["starts"][h.name])
