r"""``hdet.find_lr``: N replicas try N learning rates at once, from one state, which is restored afterwards.

Every candidate trains for a few dozen steps on batches of its own replica, without gradient synchronisation, at a
constant learning rate after a short warm-up. It is evaluated at the average of its second half's iterates: at the last
iterate the loss of a high learning rate contains noise that annealing would remove. Candidates are compared by the
change of the loss on batches that no candidate trains on, and by its standard error there: where a few dozen steps
hardly lower the loss, chance decides which candidate is the best.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.errors import (
    HdetError,
    check_batches,
    check_field,
    check_file,
    check_flag,
    check_instance,
    check_list,
    check_number,
    check_whole,
    shown,
)
from hdet.explore.fan_out import check_lr
from hdet.model.snapshot import Snapshot
from hdet.model.weights import check_modules, is_sharded
from hdet.observe.probe import LossFunction, check_loss_function, cycle, evaluation, preserved_rng, scalar
from hdet.replicas.topology import Replicas, ReplicasLike
from hdet.steer.untouched import untouched

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
    twice that: a candidate's batches were those of one replica, and the controller corrects what is left."""
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

    def __post_init__(self) -> None:
        check_field(self, "max_lr", check_number, "> 0", lambda lr: lr > 0)
        check_field(self, "lrs", _numbers)
        for name in ("losses", "errors"):
            check_field(self, name, _numbers, len(self.lrs))
        check_field(self, "start_loss", check_number, "a loss", finite=False)
        check_field(self, "conclusive", check_flag)
        check_field(self, "steps", check_whole, ">= 1", lambda steps: steps >= 1)

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the learning rates into a file. Needs matplotlib."""
        path = check_file("path", path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        tried = zip(self.lrs, self.losses, self.errors, strict=True)
        known = [(lr, loss, error) for lr, loss, error in tried if math.isfinite(loss)]
        if not known:
            raise ValueError(f"Invalid losses={self.losses}. Must have one that is finite, to be drawn.")
        lrs, losses, errors = zip(*known, strict=True)
        axes.errorbar(lrs, losses, errors, marker="o")
        axes.axhline(self.start_loss, color="grey", linestyle=":", label="before")
        axes.axvline(self.max_lr, color="tab:red", linestyle="--", label=f"max_lr = {self.max_lr:.3g}")
        axes.set_ylim(min(losses) - 0.05 * (self.start_loss - min(losses)), 1.5 * self.start_loss - 0.5 * min(losses))
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        figure.savefig(path)


def _numbers(name: str, value: Any, length: int | None = None) -> tuple[float, ...]:
    rule = "a number for each candidate of lrs"
    return tuple(check_number(name, x, rule, finite=False) for x in check_list(name, value, rule, length=length))


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
    lowers the loss, as on a plateau, the search begins again with twice the steps, up to three times.

    All is afterwards as it was, whatever is raised: parameters, buffers, training flags and attributes of modules,
    gradients, the optimizer's state and settings, the random number generators of Python, numpy and torch, and those of
    a ``DataLoader``. Only an iterator passed as ``batches`` has advanced. ``DistributedDataParallel`` is taken off at
    whatever depth, with ``torch.compile`` around it, and is not run. Gradients are taken without the hooks that run
    when they are accumulated, and the optimizer steps without its hooks. ``loss_fn`` must call the model that it is
    given, and no collective.

    A candidate's batches are of one replica's size, not of all replicas': where the noise of the gradient limits the
    learning rate, the suggestion is too low, by at most a factor of ``N``. A run with ``auto_lr=True`` corrects that,
    and a suggestion that is coarse.

    Args:
        model: the module or modules to train.
        optimizer: its groups' learning rates keep their proportions, the largest becomes the candidate.
        loss_fn: ``loss_fn(model, batch)``, the mean training loss; the same as ``probe=``.
        batches: this replica's training batches, for example the data loader. Begun again when it ends.
        low, high: the range, ``0 < low < high``.
        steps: per candidate at first, at least 4. The first third is a warm-up.
        max_grad_norm: clip gradients to this norm, as the training loop does: it changes which learning rates work.
        auto_lr: whether the run has ``auto_lr=True``, by the default controller. The suggestion is then coarser, and
            made from the candidates in another way (:attr:`LRFinding.max_lr`).
        replicas: as for :class:`hdet.Ensemble`.

    Raises:
        TypeError, ValueError: for a bad argument, an empty ``batches``, a sharded model, learning rates that are all 0,
            or an optimizer whose ``step()`` needs a closure, such as LBFGS.
        HdetError: on every rank, if no candidate lowers the loss in ``8 * steps`` steps either. On the ranks whose
            ``loss_fn``, ``batches`` or optimizer raised nothing, if those of another did.

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
    rule = "0 < low < high < inf, and high / low finite"
    low, high = check_number("low", low, rule), check_number("high", high, rule)
    if not 0 < low < high or math.isinf(high / low):
        raise ValueError(f"Invalid {low=}, {high=}. Must satisfy {rule}.")
    steps = check_whole("steps", steps, "at least 4", lambda steps: steps >= 4)
    if max_grad_norm is not None:
        max_grad_norm = check_number("max_grad_norm", max_grad_norm, "> 0", lambda norm: norm > 0, finite=False)
    auto_lr = check_flag("auto_lr", auto_lr)
    check_loss_function("loss_fn", loss_fn)
    check_batches("batches", batches)
    models = check_modules("model", model)
    if not models:
        raise ValueError("Invalid model=(). Must be the module or modules to train.")
    _check_optimizer(optimizer)
    group = Replicas(replicas)
    group.doing = "find_lr()"
    if group.members > 1 or is_sharded(models):
        raise ValueError(
            "find_lr trains one whole model per rank, and here a replica is several ranks. Find max_lr with the "
            "unsharded model, or a smaller one, and replicas=None."
        )
    with untouched(models, optimizer, batches) as bare:
        search = _Search(bare, optimizer, loss_fn, cycle(batches), steps, max_grad_norm, group)
        search.run(_spaced(low, high, _COARSE), refine=not auto_lr)
        found = search.finding(auto_lr=auto_lr)
    if not found.conclusive and group.writer:
        logger.warning(
            f"find_lr: in {found.steps} steps no learning rate lowered the loss of {found.start_loss:.4g} by clearly "
            f"more than the noise of the batches: max_lr={found.max_lr:.3g} is little more than chance. Pass more "
            "steps=, or larger batches."
        )
    return found


def learning_rates(optimizer: Optimizer) -> list[float]:
    """[parameter group] the learning rates, of which proportions are taken.

    Raises:
        TypeError, ValueError: for one that is no finite number >= 0, or if all are 0.
    """
    rates = [float(check_lr(i, group)) for i, group in enumerate(optimizer.param_groups)]
    if not max(rates) > 0:
        raise ValueError(
            f"Invalid learning rates {rates} of the optimizer's parameter groups. Must be finite and >= 0, and not all "
            "0: find_lr keeps their proportions. Call it before a schedule is built that begins at 0, or set "
            "group['lr'] = 1."
        )
    return rates


def _check_optimizer(optimizer: Optimizer) -> None:
    check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    learning_rates(optimizer)
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("Invalid optimizer: no parameter of it requires a gradient. Must train at least one.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"find_lr cannot train with {type(optimizer).__name__}, whose step() needs a closure that evaluates the "
            "loss several times. Pass another optimizer, or try learning rates for this one in runs of their own."
        )


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
        self._trials: dict[float, _Trial] = {}
        self._is_first = True  # no gradient has been taken yet
        self._held_out: list[Any] = []
        self._before: list[float] = []
        self._start_loss = _mean([loss for (loss,) in self._gather(self._begin)])

    def _begin(self) -> tuple[float]:
        """Draw what candidates are compared on; the mean loss there."""
        self._held_out = [next(self._batches) for _ in range(_HELD_OUT)]
        self._before = self._evaluate()
        return (_mean(self._before),)

    def _gather(self, own: Callable[[], Sequence[float]], size: int = 1) -> list[list[float]]:
        """By replica, what ``own`` returns; if it raises on one, all raise. Collective."""
        failure: Exception | None = None
        values: Sequence[float] = (0.0,) * size
        try:
            values = own()
        except Exception as error:
            failure = error
        rows = self._replicas.all_gather([float(failure is not None), *values])
        if failure is not None:
            raise failure
        if failed := [self._replicas.name_of(i) for i, row in enumerate(rows) if row[0]]:
            raise HdetError(f"find_lr failed on {', '.join(failed)}: see there.")
        return [row[1:] for row in rows]

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
            own = functools.partial(self._try, now[rank]) if rank < len(now) else lambda: _Trial(0.0, 0.0)
            self._trials.update(zip(now, (_Trial(*row) for row in self._gather(own, 2)), strict=False))

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
        try:
            with preserved_rng(self._models):
                finite = self._train(lr, [float(rate) / max(map(float, rates)) for rate in rates], parameters)
            after = self._evaluate() if finite else [math.inf] * _HELD_OUT
        finally:
            snapshot.restore()
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
            loss = self._loss_fn(self._subject, next(self._batches))
            if not math.isfinite(scalar(loss)):
                return False
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise TypeError(
                    f"loss_fn returned {shown(loss)}, of which there is no gradient. Must return the loss on which "
                    "backward() is called."
                )
            self._take_gradients(loss, parameters)
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

    def _take_gradients(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """Write the parameters' gradients. ``backward()`` would run what hangs on their accumulation: the reducer of a
        DDP that is around the model, which counts what it sees, or optimizers that step there."""
        if self._is_first:
            self._is_first = False
            if _has_reentrant_checkpoint(loss):
                raise HdetError(
                    "find_lr cannot take gradients through torch.utils.checkpoint with use_reentrant=True. Pass "
                    "use_reentrant=False there."
                )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient

    @property
    def _subject(self) -> Any:
        return self._models[0] if len(self._models) == 1 else self._models

    def _evaluate(self) -> list[float]:
        """[held-out batch] loss."""
        with evaluation(self._models):
            return [scalar(self._loss_fn(self._subject, batch)) for batch in self._held_out]


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


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
