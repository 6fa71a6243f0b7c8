r"""The paired probe: losses of one batch at several points, whose differences do not contain the noise between batches.

At the end of a round replica ``r`` has the parameters ``theta_r = m + delta_r``, with ``m`` the replicas' mean. It
evaluates one batch, with one forward pass each, at five points::

    above_r = L(m + delta_r)      slow_above_r = L(e + (e - f))      mirror_r = L(e - (m - e))
    below_r = L(m - delta_r)      slow_below_r = L(e - (e - f))

where ``e`` is the slow average of the means and ``f`` trails it (:class:`hdet.converge.SlowAverage`). In each
difference ``above - below`` the batch's own level and all even orders cancel. A slope is left: along the replica's
displacement, which is what a larger learning rate would have added to the round; and along the lasting progress of the
last few rounds, which is what it would have added to them once its noise is averaged out. In the mean of ``m`` and its
mirror image in ``e`` the slope between the two cancels, and the loss above that at ``e`` is the cost of the iterates'
noise. Every replica uses a batch of its own, so that the slopes rest on N batches. :mod:`hdet.observe.slopes` computes
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.errors import check_batches, check_callable, check_field, check_flag, check_number
from hdet.model.devices import check_device, check_float_dtype
from hdet.model.weights import Weights
from hdet.model.wrappers import without_ddp
from hdet.observe.slopes import ProbeLosses

REUSED_AFTER = 32
"""Steps after which a training batch may be probed: with momentum 0.9 its gradient then weighs ``0.9**32``, or 3%."""

LossFunction = Callable[[Any, Any], Tensor | float]
"""``loss_fn(model, batch)``: the mean loss of a batch, as a scalar. ``model`` is what was passed as ``model=``, without
DDP around it."""


def check_loss_function(name: str, value: Any) -> Any:
    """``value``, if it can be a :data:`LossFunction`."""
    rule = "a function: loss_fn(model, batch) -> scalar loss"
    if isinstance(value, type):
        raise TypeError(f"Invalid {name}={value.__name__}. That is a class. Must be {rule}.")
    return check_callable(name, value, rule)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Settings of the paired probe. ``probe=loss_fn`` is short for ``probe=hdet.Probe(loss_fn=loss_fn)``.

    Memory: the slow average and its trail, always; the mean and the replica's displacement, while the probe runs. These
    are four copies of the trainable parameters in fp32, each sharded like the parameters.

    Raises:
        TypeError, ValueError: for a bad value.
    """

    loss_fn: LossFunction
    """``loss_fn(model, batch)``: the mean loss of a batch, as a scalar. What it draws from torch's global random number
    generators, for example a diffusion model's noise, is the same at all points; what it draws elsewhere (numpy, a
    generator of its own) is noise in the comparison. A replica of several members takes the mean of theirs, each on a
    batch of its own. An error raises on every rank. Where the model is sharded, an error on some members only must come
    after the forward pass, or the others wait in it."""
    batches: Iterable[Any] | None = None
    """A data loader of this replica's own, over training or held-out data; begun again when it ends. One batch is used
    per round. Without it the batches passed to ``scheduler.step(loss, batch=batch)`` are used again, each at least
    :data:`REUSED_AFTER` steps later: while the optimizer's momentum contains a batch's gradient, the slope on that
    batch favours a larger learning rate. For rounds of less than some hundred steps pass ``batches``."""
    held_out: bool = False
    """Whether ``batches`` are data that the model does not train on. Hyperparameters that only regularise need that."""
    power: float = 0.25
    """>= 0: the slow average weighs round ``t`` by about ``t**power``; 0 is the plain average over all rounds."""
    dtype: torch.dtype | None = None
    """Of the slow averages, for example ``torch.bfloat16``; default fp32. Narrower ones are rounded stochastically."""
    device: torch.device | str | None = None
    """Of the slow averages, for example ``"cpu"``; default that of the parameters."""

    def __post_init__(self) -> None:
        check_field(self, "loss_fn", check_loss_function, prefix="Probe.")
        if self.batches is not None:
            check_batches("Probe.batches", self.batches)
        check_field(self, "held_out", check_flag, prefix="Probe.")
        if self.held_out and self.batches is None:
            raise ValueError("Probe(held_out=True) needs batches=: those passed to step() are training data.")
        check_field(self, "power", check_number, "finite and >= 0", lambda power: power >= 0, prefix="Probe.")
        if self.dtype is not None:
            check_field(self, "dtype", check_float_dtype, prefix="Probe.")
        if self.device is not None:
            check_field(self, "device", check_device, prefix="Probe.")

    @property
    def torch_device(self) -> torch.device | None:
        """``device`` as a ``torch.device``."""
        return None if self.device is None else torch.device(self.device)


def evaluate(
    models: Sequence[nn.Module],
    loss_fn: LossFunction,
    batch: Any,
    points: Sequence[Point],
    slow: SlowAverage,
    weights: Weights,
    *,
    shares: Sequence[Sequence[tuple[int, float]]] | None = None,
    to_the_end: bool = False,
) -> tuple[float, ...]:
    """This rank's losses at the five points, in the order of :class:`ProbeLosses`' fields.

    Collective among a replica's members if ``loss_fn`` is, as a sharded model's forward pass is: all members must then
    call the model equally often.

    Meanwhile the models are in eval mode, without autograd, and with batch normalisation as in training
    (:func:`evaluation`); at every point ``loss_fn`` starts from the same state of torch's random number generators.
    These, the parameters and the training flags are afterwards as they were, whatever ``loss_fn`` raises. Other buffers
    are not restored: those of torch's modules do not change in eval mode.

    Args:
        models: evaluated without ``DistributedDataParallel``, whose forward pass broadcasts buffers.
        loss_fn: as :attr:`Probe.loss_fn`.
        batch: what it is evaluated on.
        points: by bucket, the replicas' mean and this replica's displacement from it.
        slow: the slow average of the means.
        weights: what the buckets write to.
        shares: by bucket, of the slow average's progress; see :meth:`hdet.converge.slow_average.SlowAverage.point`.
        to_the_end: evaluate all points before raising, even if one fails, so that other members can take part in the
            rest. This helps if ``loss_fn`` fails after the model's forward pass. If it fails earlier, on some members
            only, the others wait until their process group's timeout.

    Raises:
        TypeError, ValueError: if ``loss_fn`` does not return a scalar.
    """
    losses = []
    failures: list[Exception] = []
    with without_ddp(models) as bare, evaluation(bare):
        subject = bare[0] if len(bare) == 1 else bare
        try:
            for name in ProbeLosses._fields:
                for i, (bucket, mean, displacement) in enumerate(points):
                    if name in ("above", "below"):
                        point = mean.add(displacement, alpha=1 if name == "above" else -1)
                    elif name == "mirror":
                        point = slow.mirrored(i, mean)
                    else:
                        point = slow.point(i, 1 if name == "slow_above" else -1, mean, shares[i] if shares else ())
                    bucket.write(point)
                weights.written()
                try:
                    with preserved_rng(bare):  # a loss that draws noise draws the same at every point
                        losses.append(scalar(loss_fn(subject, batch)))
                except Exception as error:
                    if not to_the_end:
                        raise
                    failures.append(error)
        finally:
            for bucket, mean, _ in points:
                bucket.write(mean)
            weights.written()
    if failures:
        raise failures[0]
    return tuple(losses)


class ProbeBatches:
    """A probe's batches: those of :attr:`Probe.batches`, or else training batches of earlier rounds.

    Args:
        probe: its settings.
        round_length: steps from one probe to the next.
    """

    def __init__(self, probe: Probe, round_length: int) -> None:
        self._loader = None if probe.batches is None else cycle(probe.batches)
        self._kept: deque[Any] = deque(maxlen=1 - (-REUSED_AFTER // round_length))

    @property
    def ready(self) -> bool:
        """Whether there is a batch for the round that ends now."""
        return self._loader is not None or len(self._kept) == self._kept.maxlen

    def next(self) -> Any:
        """The batch for the round that ends now."""
        return self._kept[0] if self._loader is None else next(self._loader)

    def keep(self, batch: Any) -> None:
        """Keep a copy of the round's last training batch for a later round, if there is no loader; ``None`` is none.

        A copy, since the data loader may reuse the batch's memory."""
        if self._loader is None and batch is not None:
            self._kept.append(tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch))

    def clear(self) -> None:
        """Drop the batches kept."""
        self._kept.clear()


def cycle(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over ``batches`` without end.

    Raises:
        ValueError: if a pass over them yields nothing.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches= is empty, or an iterator that has ended. Pass a data loader.")


def losses_by_point(rows: Sequence[Sequence[float]]) -> ProbeLosses:
    """[replica] results of :func:`evaluate`, by point."""
    return ProbeLosses(*map(tuple, zip(*rows, strict=True)))


def scalar(loss: object) -> float:
    """The value of what a loss function returned.

    Raises:
        TypeError: if that is not a floating-point scalar.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss.item()
    if isinstance(loss, float):
        return loss
    what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"probe= returned {what}. Must be a scalar loss, such as F.cross_entropy(model(x), y).")


@contextmanager
def preserved_rng(models: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards torch's random number generators, of the CPU and of the models' GPUs, are as they were."""
    devices = {t.device for model in models for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        yield


@contextmanager
def evaluation(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode without autograd, with batch and instance normalisation by the input's own statistics where training
    does so: running statistics are those of recent parameters, and raise the loss at points far from them.

    Afterwards training flags, running statistics and torch's random number generators are as they were."""
    training = [module for model in models for module in model.modules() if module.training]
    norms = [module for module in training if isinstance(module, _BatchNorm | _InstanceNorm)]
    running = [(norm.running_mean, norm.running_var, norm.track_running_stats) for norm in norms]
    with torch.no_grad(), preserved_rng(models):
        for model in models:
            model.eval()
        try:
            for norm in norms:  # in eval mode without running statistics, also SyncBatchNorm takes the local batch's
                norm.running_mean = norm.running_var = None
                norm.track_running_stats = False
            yield
        finally:
            for norm, (mean, variance, tracked) in zip(norms, running, strict=True):
                norm.running_mean, norm.running_var, norm.track_running_stats = mean, variance, tracked
            for module in training:
                module.training = True
