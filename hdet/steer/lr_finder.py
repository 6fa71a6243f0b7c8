r"""``hdet.find_lr``: N replicas try N learning rates at once, from one state, which is restored afterwards.

Every candidate trains for a few dozen steps on batches of its own replica, without gradient synchronisation, at a
constant learning rate after a short warm-up. It is evaluated at the average of its second half's iterates: at the last
iterate the loss of a high learning rate contains noise that annealing would remove. Candidates are compared by the
change of the loss on batches that no candidate trains on, and by its standard error there: where a few dozen steps
hardly lower the loss, chance decides which candidate is the best.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.errors import HdetError
from hdet.model.snapshot import Snapshot
from hdet.model.weights import is_sharded
from hdet.observe.probe import LossFunction, cycle, evaluation, preserved_rng, scalar, unwrapped
from hdet.replicas.topology import Replicas, ReplicasLike

logger = logging.getLogger("hdet")

_COARSE, _FINE = 10.0, 10 ** (1 / 3)
"""Ratios between neighbouring candidates."""
_ALMOST_BEST = 0.93
"""Share of the best candidate's decrease of the loss from which a candidate may be suggested."""
_CONCLUSIVE = 3.0
"""Standard errors by which the best candidate must lower the loss."""
_HELD_OUT = 16
"""Batches on which candidates are compared."""
_DOUBLINGS = 3
"""How often the search begins again with twice the steps."""
_HEAD_START = 2
"""Largest factor between the suggestion for ``auto_lr`` and the candidate it is made from."""


@dataclass(frozen=True)
class LRFinding:
    """What :func:`find_lr` found; the same on every rank."""

    max_lr: float
    """The suggestion: the largest candidate that lowers the loss by at least 93% as much as the best one. A candidate
    counts only if the next lower one lowers the loss, too: after training has broken down at a high learning rate, the
    loss may still be a little lower by chance. With ``auto_lr`` the smallest such candidate, since a rate that is too
    high for a long run may do well for a few dozen steps. If the search is conclusive and there are several replicas,
    twice that: a candidate's batches were those of one replica, and the controller corrects a rate that is somewhat too
    high in a few rounds, one that is too low in many."""
    lrs: tuple[float, ...]
    """The candidates, in increasing order."""
    losses: tuple[float, ...]
    """Loss after a candidate's steps, at its averaged iterate; infinite where it diverged."""
    errors: tuple[float, ...]
    """Standard errors of the candidates' changes of the loss; infinite where it diverged."""
    start_loss: float
    """Loss before any candidate's steps."""
    conclusive: bool
    """Whether the best candidate lowers the loss by at least 3 standard errors. If not, the suggestion is little more
    than chance; more ``steps`` would help, or larger batches."""
    steps: int
    """Steps of each candidate."""

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the learning rates into a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        tried = zip(self.lrs, self.losses, self.errors, strict=True)
        known = [(lr, loss, error) for lr, loss, error in tried if math.isfinite(loss)]
        lrs, losses, errors = zip(*known, strict=True)
        axes.errorbar(lrs, losses, errors, marker="o")
        axes.axhline(self.start_loss, color="grey", linestyle=":", label="before")
        axes.axvline(self.max_lr, color="tab:red", linestyle="--", label=f"max_lr = {self.max_lr:.3g}")
        axes.set_ylim(min(losses) - 0.05 * (self.start_loss - min(losses)), 1.5 * self.start_loss - 0.5 * min(losses))
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        figure.savefig(path)


def find_lr(
    model: nn.Module | Iterable[nn.Module],
    optimizer: Optimizer,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 40,
    max_grad_norm: float | None = None,
    auto_lr: bool = False,
    replicas: ReplicasLike = None,
) -> LRFinding:
    """Try learning rates in ``[low, high]`` and suggest a ``max_lr`` for OneCycleLR. Collective.

    Candidates are first factors of 10 apart over the whole range, then ``10 ** (1 / 3)`` to both sides of the best one
    (and of another, if the first turns out to be best by chance): with ``N`` replicas and the default range
    ``ceil(8 / N) + ceil(2 / N)`` times ``steps`` steps. With ``auto_lr`` the factors of 10 only. Where no candidate
    lowers the loss, as on a plateau, the search begins again with twice the steps, up to three times. Model, buffers
    and optimizer are afterwards as they were, whatever is raised; the data loader has advanced.

    A candidate's batches are of one replica's size, not of all replicas': where the noise of the gradient limits the
    learning rate, the suggestion is too low, by at most a factor of ``N``. A run with ``auto_lr=True`` corrects that,
    and a suggestion that is coarse.

    Args:
        model: the module or modules to train; ``DistributedDataParallel`` is taken off.
        optimizer: its groups' learning rates keep their proportions, the largest becomes the candidate.
        loss_fn: ``loss_fn(model, batch)``, the mean training loss; the same as ``probe=``.
        batches: this replica's training batches, for example the data loader. Begun again when it ends.
        low, high: the range, ``0 < low < high``.
        steps: per candidate at first, at least 4. The first third is a warm-up.
        max_grad_norm: clip gradients to this norm, as the training loop does: it changes which learning rates work.
        auto_lr: whether the run has ``auto_lr=True`` and a probe. The suggestion is then coarser, and made from the
            candidates in another way (:attr:`LRFinding.max_lr`).
        replicas: as for :class:`hdet.Ensemble`.

    Raises:
        ValueError: for a bad range, an empty ``batches``, or a sharded model.
        HdetError: on every rank, if no candidate lowers the loss in ``8 * steps`` steps either.

    Examples:
        >>> import torch, hdet
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> xs = torch.randn(64, 8, 4)
        >>> found = hdet.find_lr(model, optimizer, lambda m, x: (m(x) - x.sum(-1, keepdim=True)).square().mean(), xs)
        >>> 0.01 < found.max_lr < 1
        True
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"Invalid {low=}, {high=}. Must satisfy 0 < low < high < inf.")
    if steps < 4:
        raise ValueError(f"Invalid {steps=}. Must be at least 4.")
    models = tuple(unwrapped(m) for m in ((model,) if isinstance(model, nn.Module) else model))
    group = Replicas(replicas)
    if group.members > 1 or is_sharded(models):
        raise ValueError(
            "find_lr trains one whole model per rank, and here a replica is several ranks. Find max_lr with the "
            "unsharded model, or a smaller one, and replicas=None."
        )
    search = _Search(models, optimizer, loss_fn, cycle(batches), steps, max_grad_norm, group)
    search.run(_spaced(low, high, _COARSE), refine=not auto_lr)
    found = search.finding(auto_lr=auto_lr)
    if not found.conclusive and group.writer:
        logger.warning(
            f"find_lr: in {found.steps} steps no learning rate lowered the loss of {found.start_loss:.4g} by clearly "
            f"more than the noise of the batches: max_lr={found.max_lr:.3g} is little more than chance. Pass more "
            "steps=, or larger batches."
        )
    return found


def head_start(replicas: int, *, conclusive: bool) -> int:
    """The factor between the suggestion for ``auto_lr`` and the candidate it is made from."""
    return min(_HEAD_START, replicas) if conclusive else 1


class _Trial(NamedTuple):
    """One candidate's result; both infinite where it diverged."""

    change: float
    """Of the loss: after minus before."""
    error: float
    """Standard error of ``change``."""


class _Search:
    """The candidates tried so far, and what each is trained with."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizer: Optimizer,
        loss_fn: LossFunction,
        batches: Iterator[Any],
        steps: int,
        max_grad_norm: float | None,
        replicas: Replicas,
    ) -> None:
        self._models, self._optimizer, self._loss_fn, self._max_grad_norm = models, optimizer, loss_fn, max_grad_norm
        self._batches, self._steps, self._replicas = batches, steps, replicas
        self._held_out = [next(batches) for _ in range(_HELD_OUT)]
        self._trials: dict[float, _Trial] = {}
        self._before = self._evaluate()
        self._start_loss = _mean([loss for (loss,) in self._replicas.all_gather([_mean(self._before)])])

    def run(self, coarse: Sequence[float], *, refine: bool) -> None:
        """Try the candidates, then more around the best; again with twice the steps where none lowers the loss."""
        first = self._steps
        for doublings in range(_DOUBLINGS + 1):
            self._steps = first * 2**doublings
            self._trials.clear()
            self._measure(coarse)
            while refine and (lrs := self._untried(coarse)):
                self._measure(lrs)
            if self._eligible():
                return
        raise HdetError(
            f"No learning rate in [{coarse[0]:.3g}, {coarse[-1]:.3g}] lowered the loss of {self._start_loss:.4g} in "
            f"{self._steps} steps. Pass another range, or more steps."
        )

    def _measure(self, lrs: Sequence[float]) -> None:
        """Try each candidate on one replica, as many at a time as there are replicas."""
        size, rank = self._replicas.size, self._replicas.rank
        for first in range(0, len(lrs), size):
            now = lrs[first : first + size]
            own = self._try(now[rank]) if rank < len(now) else _Trial(0.0, 0.0)
            found = (_Trial(*row) for row in self._replicas.all_gather(own))
            self._trials.update(zip(now, found, strict=False))

    def _untried(self, coarse: Sequence[float]) -> list[float]:
        """The fine candidates around the best one that are still to be tried; none if the best is itself a fine one."""
        if not self._eligible():  # a fine candidate may have made its coarse neighbour ineligible
            return []
        best = self._best()
        near = [lr for lr in (best / _FINE, best * _FINE) if coarse[0] <= lr <= coarse[-1]]
        return [lr for lr in near if best in coarse and lr not in self._trials]

    def finding(self, *, auto_lr: bool) -> LRFinding:
        """The result, for a run with ``auto_lr`` or one without."""
        trials, best = self._trials, self._trials[self._best()]
        almost = [lr for lr in self._eligible() if trials[lr].change <= _ALMOST_BEST * best.change]
        lrs = tuple(sorted(trials))
        losses = tuple(self._start_loss + trials[lr].change for lr in lrs)
        errors = tuple(trials[lr].error for lr in lrs)
        conclusive = -best.change >= _CONCLUSIVE * best.error
        suggestion = min(almost) * head_start(self._replicas.size, conclusive=conclusive) if auto_lr else max(almost)
        return LRFinding(suggestion, lrs, losses, errors, self._start_loss, conclusive, self._steps)

    def _best(self) -> float:
        return min(self._eligible(), key=lambda lr: self._trials[lr].change)

    def _eligible(self) -> list[float]:
        """Candidates that lower the loss, if the next lower candidate does so, too."""
        lrs = sorted(self._trials)
        lower = [self._trials[lr].change < 0 for lr in lrs]
        return [lr for i, lr in enumerate(lrs) if lower[i] and lower[max(0, i - 1)]]

    def _try(self, lr: float) -> _Trial:
        """Train at ``lr``, restore the state, and return the change of the loss on this replica's held-out batches."""
        snapshot = Snapshot(self._models, self._optimizer)
        snapshot.take()
        rates = [group["lr"] for group in self._optimizer.param_groups]
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [p.grad for p in parameters]
        try:
            with preserved_rng(self._models):
                finite = self._train(lr, [float(rate) / max(map(float, rates)) for rate in rates], parameters)
            after = self._evaluate() if finite else [math.inf] * _HELD_OUT
        finally:
            snapshot.restore()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            _set_rates(self._optimizer, rates)
        changes = [a - b for a, b in zip(after, self._before, strict=True)]
        if not all(map(math.isfinite, changes)):
            return _Trial(math.inf, math.inf)
        return _Trial(_mean(changes), statistics.stdev(changes) / math.sqrt(len(changes)))

    def _train(self, lr: float, proportions: Sequence[float], parameters: Sequence[Tensor]) -> bool:
        """Leave the parameters at the average of the second half's iterates; whether all losses were finite."""
        average: list[Tensor] = []
        for step in range(self._steps):
            now = lr * min(1.0, (step + 1) / (self._steps / 3))
            _set_rates(self._optimizer, [now * proportion for proportion in proportions])
            self._optimizer.zero_grad()
            loss = self._loss_fn(self._subject, next(self._batches))
            if not math.isfinite(scalar(loss)):
                return False
            loss.backward()  # type: ignore[union-attr]
            if self._max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
            self._optimizer.step()
            if step == self._steps // 2:
                average = [p.detach().clone() for p in parameters]
            elif average:
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 / (step - self._steps // 2 + 1))
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in parameters], average)
        return True

    @property
    def _subject(self) -> Any:
        return self._models[0] if len(self._models) == 1 else self._models

    def _evaluate(self) -> list[float]:
        """[held-out batch] loss."""
        with evaluation(self._models):
            return [scalar(self._loss_fn(self._subject, batch)) for batch in self._held_out]


def _spaced(low: float, high: float, factor: float) -> list[float]:
    """From ``low`` to ``high`` in equal ratios of at most ``factor``."""
    intervals = max(1, math.ceil(math.log(high / low) / math.log(factor) - 1e-9))
    return [low * (high / low) ** (i / intervals) for i in range(intervals + 1)]


def _set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Write [parameter group] learning rates, those that are tensors in place."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _mean(values: Sequence[float]) -> float:
    """Infinite if a value is not finite."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
