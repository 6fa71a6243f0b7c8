"""Recovery: noticing that a round blew up, and going back to the last converged state."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from hdet.snapshot import Snapshot

logger = logging.getLogger("hdet")

CUT = 3.0
"""What a rollback divides the gain by."""
MAX_ROLLBACKS = 8
_BLOWN_UP = 2.0
"""A round blew up if its mean loss is this many times the first round's."""


class Recovery:
    """Keeps a copy of the last converged state, as long as it may be needed.

    Args:
        models, optimizer, device: as for :class:`hdet.snapshot.Snapshot`.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None) -> None:
        self._snapshot = Snapshot(models, optimizer, device)
        self._has_snapshot = False
        self.first_loss = math.nan
        """The first round's mean loss."""
        self.count = 0
        """Rollbacks so far."""

    def observe(self, losses: Sequence[float]) -> None:
        """Take note of the replicas' losses in a round that was kept."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if math.isnan(self.first_loss) and finite:
            self.first_loss = math.fsum(finite) / len(finite)

    def keep(self) -> None:
        """Copy the state as it is now."""
        self._snapshot.take()
        self._has_snapshot = True

    def is_needed(self, finite: Sequence[bool], losses: Sequence[float], *, watches_losses: bool) -> bool:
        """Whether the round that just ended is to be undone: no replica is finite, or its losses lie far above the
        first round's.

        Args:
            finite: [replica] whether its parameters are.
            losses: [replica] mean loss of the round; empty if none was reported.
            watches_losses: whether the losses count at all.
        """
        if not self._has_snapshot or self.count >= MAX_ROLLBACKS:
            return False
        if not any(finite):
            return True
        if not watches_losses or not losses:
            return False
        known = [loss for loss in losses if math.isfinite(loss)]
        return not known or math.fsum(known) / len(known) > _BLOWN_UP * abs(self.first_loss)

    def go_back(self) -> None:
        """The state as it was last kept."""
        self._snapshot.restore()
        self.count += 1

    def tell(self, step: int, mean_loss: float) -> None:
        """Log the rollback."""
        logger.warning(
            f"Step {step}: the run blew up (mean loss {mean_loss:.4g}). Back to the last converged state, with "
            f"learning rates divided by {CUT:.3g} (rollback {self.count} of {MAX_ROLLBACKS})."
        )
