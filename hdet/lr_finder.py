r"""``hdet.find_lr``: N replicas try N learning rates at once, from one state, and the state is put back.

Every candidate trains for a few dozen steps on batches of its own replica, without gradient synchronisation, at a
constant learning rate after a short warm-up. It is judged by the average of its second half's iterates: at the raw
iterate a high learning rate looks worse than it is, since annealing would remove its noise. What counts is the *gain*,
the loss before minus the loss after, both on batches that no candidate trains on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.errors import HdetError
from hdet.probe import LossFunction, cycle, evaluation, preserved_rng, scalar, unwrapped
from hdet.replicas import Replicas, ReplicasLike
from hdet.snapshot import Snapshot
from hdet.weights import is_sharded

_COARSE, _FINE = 10.0, 10 ** (1 / 3)
_ALMOST = 0.93


@dataclass(frozen=True)
class LRFinding:
    """What :func:`find_lr` found; the same on every rank."""

    max_lr: float
    """The suggestion: the largest candidate that lowers the loss by at least 93% as much as the best one. One counts
    only if the next lower one lowers it, too: a net that a high learning rate has killed may gain a little by chance.
    """
    lrs: tuple[float, ...]
    """The candidates, in increasing order."""
    losses: tuple[float, ...]
    """Loss after a candidate's steps, at its averaged iterate; infinite where it diverged."""
    start_loss: float
    """Loss before."""

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the learning rates into a file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        known = [(lr, loss) for lr, loss in zip(self.lrs, self.losses, strict=True) if math.isfinite(loss)]
        axes.plot(*zip(*known, strict=True), marker="o")
        axes.axhline(self.start_loss, color="grey", linestyle=":", label="before")
        axes.axvline(self.max_lr, color="tab:red", linestyle="--", label=f"max_lr = {self.max_lr:.3g}")
        losses = [loss for _, loss in known]
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
    replicas: ReplicasLike = None,
) -> LRFinding:
    """Try learning rates in ``[low, high]`` and suggest a ``max_lr`` for OneCycleLR. Collective.

    First factors of 10 apart over the whole range, then a third of that to both sides of the best (and of another, if
    that shows the first to be one of chance): with ``N`` replicas
    and the default range ``ceil(8 / N) + ceil(2 / N)`` times ``steps`` steps. Model, buffers and optimizer are
    afterwards as they were, whatever is raised; the data loader has moved on.

    Each candidate sees batches of one replica's size, not of all: where the noise of the gradient limits the learning
    rate, the suggestion is on the low side, by at most a factor of ``N``. ``auto_lr=True`` goes on from there.

    Args:
        model: the module or modules to train; ``DistributedDataParallel`` is taken off.
        optimizer: its groups' learning rates keep their proportions, the largest becomes the candidate.
        loss_fn: ``loss_fn(model, batch)``, the mean training loss; the same as ``probe=``.
        batches: this replica's training batches, for example the data loader. Begun again when it ends.
        low, high: the range, ``0 < low < high``.
        steps: per candidate, at least 4. The first third is a warm-up.
        max_grad_norm: clip gradients to this norm, as the training loop does: it changes which learning rates work.
        replicas: as for :class:`hdet.Ensemble`.

    Raises:
        ValueError: for a bad range, an empty ``batches``, or a sharded model.
        HdetError: on every rank, if no candidate lowers the loss.

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
    coarse = _ladder(low, high, _COARSE)
    search.measure(coarse)
    while lrs := search.untried(coarse):
        search.measure(lrs)
    lrs = sorted(search.losses)
    return LRFinding(search.suggestion(), tuple(lrs), tuple(search.losses[lr] for lr in lrs), search.start_loss)


class _Search:
    """Candidates tried so far, and the state that each begins from."""

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
        self._held_out = [next(batches) for _ in range(4)]
        self.losses: dict[float, float] = {}
        self.start_loss = _mean(self._gather(self._evaluate()))

    def measure(self, lrs: Sequence[float]) -> None:
        """Try each candidate on one replica, as many at a time as there are replicas."""
        size, rank = self._replicas.size, self._replicas.rank
        for first in range(0, len(lrs), size):
            rung = lrs[first : first + size]
            mine = self._try(rung[rank]) if rank < len(rung) else 0.0
            for lr, change in zip(rung, self._gather(mine), strict=False):
                self.losses[lr] = self.start_loss + change if math.isfinite(change) else math.inf

    def untried(self, coarse: Sequence[float]) -> list[float]:
        """What has not been tried yet around the best candidate, if that is one of the coarse ones."""
        best = min(self._credible(), key=lambda lr: self.losses[lr])
        near = [lr for lr in (best / _FINE, best * _FINE) if coarse[0] <= lr <= coarse[-1]]
        return [lr for lr in near if best in coarse and lr not in self.losses]

    def suggestion(self) -> float:
        """The largest candidate that lowers the loss almost as much as the best."""
        lrs = self._credible()
        enough = self.start_loss - _ALMOST * (self.start_loss - min(self.losses[lr] for lr in lrs))
        return max(lr for lr in lrs if self.losses[lr] <= enough)

    def _credible(self) -> list[float]:
        """Candidates that lower the loss, and the next lower of which does so, too."""
        lrs = sorted(self.losses)
        lower = [self.losses[lr] < self.start_loss for lr in lrs]
        found = [lr for i, lr in enumerate(lrs) if lower[i] and lower[max(0, i - 1)]]
        if not found:
            raise HdetError(
                f"No learning rate in [{lrs[0]:.3g}, {lrs[-1]:.3g}] lowered the loss of {self.start_loss:.4g} in "
                f"{self._steps} steps. Pass another range, or more steps."
            )
        return found

    def _try(self, lr: float) -> float:
        """Train at ``lr``; returns how the loss changed, on the replica's own held-out batches."""
        snapshot = Snapshot(self._models, self._optimizer)
        snapshot.take()
        rates = [group["lr"] for group in self._optimizer.param_groups]
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [p.grad for p in parameters]
        before = self._evaluate()
        try:
            with preserved_rng(self._models):
                after = self._train(lr, [float(rate) / max(map(float, rates)) for rate in rates], parameters)
        finally:
            snapshot.restore()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            _set_rates(self._optimizer, rates)
        return after - before

    def _train(self, lr: float, proportions: Sequence[float], parameters: Sequence[Tensor]) -> float:
        average: list[Tensor] = []
        for step in range(self._steps):
            now = lr * min(1.0, (step + 1) / (self._steps / 3))
            _set_rates(self._optimizer, [now * proportion for proportion in proportions])
            self._optimizer.zero_grad()
            loss = self._loss_fn(self._subject, next(self._batches))
            if not math.isfinite(scalar(loss)):
                return math.inf
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
        return self._evaluate()

    @property
    def _subject(self) -> Any:
        return self._models[0] if len(self._models) == 1 else self._models

    def _evaluate(self) -> float:
        with evaluation(self._models):
            return _mean([scalar(self._loss_fn(self._subject, batch)) for batch in self._held_out])

    def _gather(self, value: float) -> list[float]:
        return [row[0] for row in self._replicas.all_gather([value])]


def _ladder(low: float, high: float, factor: float) -> list[float]:
    """From ``low`` to ``high`` in equal ratios of at most ``factor``."""
    rungs = max(1, math.ceil(math.log(high / low) / math.log(factor) - 1e-9))
    return [low * (high / low) ** (i / rungs) for i in range(rungs + 1)]


def _set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
