"""What is noticed while a run goes on: gradients that are not what the settings say, and a second ensemble."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.errors import ReplicaMismatchError
from hdet.model.gradients import fingerprint_gradients, warn_of_gradients
from hdet.model.guards import another_averages
from hdet.replicas.agreement import Term, differing, same
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")


class GradientWatch:
    """Compares the replicas' gradients once: at the first step, or at the first converge that finds gradients.

    Args:
        mode: ``shared``, ``grouped`` or ``local``.
        optimizer: whose parameters have the gradients.
        modules: ``model=``; without one there is nothing to compare.
        replicas: who takes part.
        own: ids of parameters that are each rank's own, whose gradients are not compared.
    """

    def __init__(
        self,
        mode: str,
        optimizer: Optimizer,
        modules: Sequence[nn.Module],
        replicas: Replicas,
        own: frozenset[int] = frozenset(),
    ) -> None:
        self._mode, self._optimizer, self._replicas, self._own = mode, optimizer, replicas, own
        self._modules, self._is_over = tuple(modules), False

    def terms(self) -> dict[str, Term]:
        """A hash of this rank's gradients; -1 where they are not compared."""
        mark = -1.0
        if not self._is_over and self._modules and self._replicas.size > 1:
            mark = fingerprint_gradients(self._compared())
        return {"gradients": Term(mark, lambda marks: -1.0 if min(marks) < 0 else same(marks))}

    def compare(self, told: Sequence[Mapping[str, float]], *, is_last: bool = False) -> None:
        """Once, if all replicas have gradients: look whether they differ as the mode says. Collective if they do not.

        Args:
            told: every replica's terms.
            is_last: whether not to look again where some have none now.

        Raises:
            ReplicaMismatchError: on every rank, under ``shared``, if they differ; where parameters are each rank's own,
                this is warned of instead, and so are equal ones under ``local``: equal batches can make them so.
        """
        marks = [one["gradients"] for one in told]
        if self._is_over or self._replicas.size == 1 or min(marks) < 0:
            self._is_over |= is_last
            return
        self._is_over = True
        if self._mode != "shared" or len(set(marks)) == 1 or self._own:
            warn_of_gradients(self._mode, marks, self._replicas)
            return
        names = {id(p): name for module in self._modules for name, p in module.named_parameters()}
        gradients = [
            {"name": f"the gradient of {names.get(id(p), 'a parameter')}", "values": fingerprint_gradients([p])}
            for p in self._compared()
        ]
        found = differing(self._replicas, gradients)
        raise ReplicaMismatchError(
            f'The replicas have different gradients under gradients="shared": {found}. If that is meant (Local SGD), '
            'pass gradients="local"; if not, wrap the model in DistributedDataParallel, or shard it on a mesh with a '
            "replicate dimension."
        )

    def _compared(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if id(p) not in self._own]


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
