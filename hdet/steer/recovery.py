"""Rollback: finding that a round blew up, and restoring the last good converged state."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.errors import DivergedError
from hdet.model.snapshot import Snapshot
from hdet.model.weights import Weights, reshard, weights_of
from hdet.observe.training_loss import finite_mean

logger = logging.getLogger("hdet")

GAIN_DIVISOR = 3.0
"""What a rollback divides the gain by."""
MAX_ROLLBACKS = 8
_BLOWN_UP = 2.0
"""A round blew up if its mean loss is above this many times the first round's; after each rollback, this many times
more. A loss that stays high at a third of the learning rate has another cause: for example, single examples on which an
overfitted model is wrong with certainty."""
_BAD = 1.1
"""A state is not kept if its round's mean loss is above this many times the first round's: it has begun to blow up, and
restored, it would do so at a smaller learning rate too."""


class Recovery:
    """Keeps a copy of the last good converged state, and restores it after a round that blew up.

    Args:
        models, optimizer, device: as for :class:`hdet.model.snapshot.Snapshot`.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None) -> None:
        self._snapshot = Snapshot(models, optimizer, device)
        self._models, self._optimizer = models, optimizer
        self._has_snapshot = False
        self._before_step: RemovableHandle | None = None
        self.copy_before_next_step()
        self.first_loss = math.nan
        """The first round's mean loss."""
        self.count = 0
        """Rollbacks so far."""

    def copy_before_next_step(self) -> None:
        """At the start of a run, and after a resume: let the optimizer's next step copy the state before it changes it.

        By then everything has been loaded, in whatever order. Where a framework keeps the weights and its step may be
        in several parts, the first copy is made at the first converge."""
        self._has_snapshot = False
        if self._before_step is not None:
            self._before_step.remove()
            self._before_step = None
        if type(weights_of(tuple(self._models))) is not Weights:
            return
        begin = WeakMethod(self.begin)

        def before_step(*_: object) -> None:
            if (method := begin()) is not None:
                method()

        self._before_step = self._optimizer.register_step_pre_hook(before_step)

    def begin(self) -> None:
        """Make the first copy, unless it was made: before the optimizer's first step, or in place of one that AMP
        skipped."""
        if self._before_step is not None:
            self._before_step.remove()
            self._before_step = None
            reshard(self._models)
            self.keep()

    def observe(self, losses: Sequence[float]) -> None:
        """Take the first round's mean loss from [replica] ``losses`` of a round that was not undone."""
        if math.isnan(self.first_loss):
            self.first_loss = finite_mean(losses)

    def keep(self, mean_loss: float = math.nan) -> bool:
        """Copy the state as it is now, unless the loss of the round that led to it is far above the first round's.
        Returns whether it was copied."""
        if mean_loss > _BAD * abs(self.first_loss):
            return False
        self._snapshot.take()
        self._has_snapshot = True
        return True

    def copies(self) -> dict[int, Tensor]:
        """The state that is kept, by the address of the original."""
        return self._snapshot.copies()

    def is_needed(self, finite: Sequence[bool], losses: Sequence[float], *, watches_losses: bool) -> bool:
        """Whether the round that just ended is to be undone: no replica is finite, or the mean loss is above
        ``2 ** (count + 1)`` times the first round's.

        Args:
            finite: [replica] whether its parameters are.
            losses: [replica] mean loss of the round; empty if none was reported.
            watches_losses: whether the losses are considered at all.

        Raises:
            DivergedError: if it is, and there have been :data:`MAX_ROLLBACKS` rollbacks.
        """
        if not self._has_snapshot or not self._has_blown_up(finite, losses, watches_losses):
            return False
        if self.count >= MAX_ROLLBACKS:
            raise DivergedError(
                f"The run blew up again after {MAX_ROLLBACKS} rollbacks, each of which divided the learning rate by "
                f"{GAIN_DIVISOR:.3g}: the data or the model are bad, not the learning rate. The parameters are as they "
                "were in that round; look for what is not finite, or restore an earlier checkpoint."
            )
        return True

    def _has_blown_up(self, finite: Sequence[bool], losses: Sequence[float], watches_losses: bool) -> bool:
        if not any(finite):
            return True
        if not watches_losses or not losses or math.isnan(self.first_loss):
            return False
        mean = finite_mean(losses)
        return math.isnan(mean) or mean > _BLOWN_UP ** (self.count + 1) * abs(self.first_loss)

    def restore(self) -> None:
        """Put the state back as it was last kept."""
        self._snapshot.restore()
        self.count += 1

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        return {"first_loss": self.first_loss, "rollbacks": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self.first_loss, self.count = state["first_loss"], state["rollbacks"]

    def warn(self, step: int, mean_loss: float) -> None:
        """Log the rollback, after a round that ended at ``step`` with ``mean_loss``."""
        logger.warning(
            f"Step {step}: the run blew up (mean loss {mean_loss:.4g}). Back to the last good converged state, with "
            f"learning rates divided by {GAIN_DIVISOR:.3g} (rollback {self.count} of {MAX_ROLLBACKS})."
        )
