"""Recovery: noticing that a round blew up, and going back to the last good converged state."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.errors import DivergedError
from hdet.model.snapshot import Snapshot
from hdet.model.weights import Weights, reshard, weights_of

logger = logging.getLogger("hdet")

CUT = 3.0
"""What a rollback divides the gain by."""
MAX_ROLLBACKS = 8
_BLOWN_UP = 2.0
"""A round blew up if its mean loss is this many times the first round's; after each rollback, this many times more.
What stays high under a third of the learning rate is not its doing: say, single examples that a net which has learned
the others by heart is sure and wrong about."""
_BAD = 1.1
"""A state is not worth going back to if its round's mean loss is this many times the first round's: it is on its way
there, and no smaller learning rate would save it."""


class Recovery:
    """Keeps a copy of the last good converged state, as long as it may be needed.

    Args:
        models, optimizer, device: as for :class:`hdet.model.snapshot.Snapshot`.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None) -> None:
        self._snapshot = Snapshot(models, optimizer, device)
        self._models, self._optimizer = models, optimizer
        self._has_snapshot = False
        self._before_step: RemovableHandle | None = None
        self.watch()
        self.first_loss = math.nan
        """The first round's mean loss."""
        self.count = 0
        """Rollbacks so far."""

    def watch(self) -> None:
        """Where the run begins or goes on: copy the state just before the optimizer's next step. Only then is it known
        to have been loaded, in whatever order that was done. Where a framework keeps the weights, whose step may be in
        several parts, the first copy is that of the first converge."""
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
        """The optimizer is about to take its first step, or has let it pass."""
        if self._before_step is not None:
            self._before_step.remove()
            self._before_step = None
            reshard(self._models)
            self.keep()

    def observe(self, losses: Sequence[float]) -> None:
        """Take note of the replicas' losses in a round that was kept."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if math.isnan(self.first_loss) and finite:
            self.first_loss = math.fsum(finite) / len(finite)

    def keep(self, mean_loss: float = math.nan) -> None:
        """Copy the state as it is now, unless the loss of the round that led to it is far above the first round's."""
        if mean_loss > _BAD * abs(self.first_loss):
            return
        self._snapshot.take()
        self._has_snapshot = True

    def is_needed(self, finite: Sequence[bool], losses: Sequence[float], *, watches_losses: bool) -> bool:
        """Whether the round that just ended is to be undone: no replica is finite, or its losses lie far above the
        first round's, the farther the more rollbacks there have been.

        Args:
            finite: [replica] whether its parameters are.
            losses: [replica] mean loss of the round; empty if none was reported.
            watches_losses: whether the losses count at all.

        Raises:
            DivergedError: if it is, and there have been :data:`MAX_ROLLBACKS`.
        """
        if not self._has_snapshot or not self._is_bad(finite, losses, watches_losses):
            return False
        if self.count >= MAX_ROLLBACKS:
            raise DivergedError(
                f"The run blew up again after {MAX_ROLLBACKS} rollbacks, each of which divided the learning rate by "
                f"{CUT:.3g}: the data or the model are bad, not the learning rate. The parameters are as they were in "
                "that round; look for what is not finite, or restore an earlier checkpoint."
            )
        return True

    def _is_bad(self, finite: Sequence[bool], losses: Sequence[float], watches_losses: bool) -> bool:
        if not any(finite):
            return True
        if not watches_losses or not losses or math.isnan(self.first_loss):
            return False
        known = [loss for loss in losses if math.isfinite(loss)]
        return not known or math.fsum(known) / len(known) > _BLOWN_UP ** (self.count + 1) * abs(self.first_loss)

    def go_back(self) -> None:
        """The state as it was last kept."""
        self._snapshot.restore()
        self.count += 1

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        return {"first_loss": self.first_loss, "rollbacks": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self.first_loss, self.count = state["first_loss"], state["rollbacks"]

    def tell(self, step: int, mean_loss: float) -> None:
        """Log the rollback."""
        logger.warning(
            f"Step {step}: the run blew up (mean loss {mean_loss:.4g}). Back to the last good converged state, with "
            f"learning rates divided by {CUT:.3g} (rollback {self.count} of {MAX_ROLLBACKS})."
        )
