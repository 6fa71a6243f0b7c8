"""What is noticed while a run goes on: gradients that are not what the settings say, and a second ensemble."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from hdet.model.gradients import fingerprint_gradients, warn_of_gradients
from hdet.model.guards import another_averages
from hdet.replicas.agreement import Term, same
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")


class GradientWatch:
    """Compares the replicas' gradients once, at the first converge after a step.

    Args:
        mode: ``shared``, ``grouped`` or ``local``.
        optimizer: whose parameters have the gradients.
        modules: ``model=``; without one there is nothing to compare.
        replicas: who takes part.
    """

    def __init__(self, mode: str, optimizer: Optimizer, modules: Sequence[nn.Module], replicas: Replicas) -> None:
        self._mode, self._optimizer, self._replicas = mode, optimizer, replicas
        self._has_model, self._is_over = bool(modules), False

    def terms(self, steps: int) -> dict[str, Term]:
        """A hash of this rank's gradients after ``steps`` steps; -1 where they are not compared."""
        mark = -1.0
        if not self._is_over and steps and self._has_model and self._replicas.size > 1:
            mark = fingerprint_gradients(p for group in self._optimizer.param_groups for p in group["params"])
        return {"gradients": Term(mark, lambda marks: -1.0 if min(marks) < 0 else same(marks))}

    def compare(self, steps: int, told: Sequence[Mapping[str, float]]) -> None:
        """Warn, once, if they are equal where they should differ, or the reverse."""
        if steps and not self._is_over:
            self._is_over = True
            warn_of_gradients(self._mode, [one["gradients"] for one in told], self._replicas)


class RivalWatch:
    """Warns, once, of a second ensemble that averages the same model.

    Args:
        modules: ``model=``.
        owner: the ensemble.
        replicas: who takes part.
    """

    def __init__(self, modules: Sequence[nn.Module], owner: object, replicas: Replicas) -> None:
        self._modules, self._owner, self._replicas, self._is_over = tuple(modules), weakref.ref(owner), replicas, False

    def look(self) -> None:
        """Call when a round's average begins."""
        if not self._is_over and another_averages(self._modules, self._owner()):
            self._is_over = True
            if self._replicas.writer:
                logger.warning(
                    "Two hdet schedulers average the same model in turn: the first to converge takes the replicas' "
                    "differences away before the second sees them. Give each the submodule that its optimizer trains."
                )
