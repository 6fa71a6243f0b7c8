r"""The paired probe: what a batch's loss says about the learning rate, without the noise of different batches.

At the end of a round replica ``r`` stands at ``theta_r = m + delta_r``, with ``m`` the replicas' mean. It evaluates one
batch, with one forward pass each, at six points, most of which mirror one another::

    above_r = L(m + delta_r)      slow_above_r = L(e + (e - f))      mirror_r = L(e - (m - e))
    below_r = L(m - delta_r)      slow_below_r = L(e - (e - f))      far_r    = L(e + reach (e - f))

where ``e`` is the slow average of the means and ``f`` trails it (:class:`hdet.converge.SlowAverage`). In each
difference the batch's own level and all curvature cancel. What is left is a slope: along the replica's displacement,
which is what a larger learning rate would have added to the round; and along the lasting progress of the last few
rounds, which is what it would have added to them once its noise is averaged out. With ``m`` and its mirror image in
``e`` the slope between the two cancels likewise, and what is left is what the iterates' noise costs. The far point
tells whether much more of the same would still be better. Every replica uses a batch of its own,
so that the slopes rest on N batches. :mod:`hdet.steer` says what they mean.
"""

from __future__ import annotations

import math
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
from hdet.model.weights import Weights
from hdet.observe.slopes import ProbeLosses

FORGOTTEN = 32
"""Steps after which an optimizer has forgotten a batch: ``0.9**32`` is 3%."""

LossFunction = Callable[[Any, Any], Tensor | float]
"""``loss_fn(model, batch)``: the mean loss of a batch, as a scalar. ``model`` is what was passed as ``model=``, without
DDP around it."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How the paired probe is done. ``probe=loss_fn`` is short for ``probe=hdet.Probe(loss_fn=loss_fn)``.

    It takes memory for the slow average and its trail all along, and while it runs for the mean and the replica's
    displacement: four copies of the trainable parameters in fp32, each sharded like the parameters.

    Raises:
        TypeError, ValueError: for a bad value.
    """

    loss_fn: LossFunction
    """``loss_fn(model, batch)``: the mean loss of a batch under the settings to be compared, as a scalar. What it draws
    from torch's global random number generators, say a diffusion model's noise, is the same under all of them; what it
    draws elsewhere (numpy, a generator of its own) is noise in the comparison. A replica of several members takes the
    mean of theirs, each on a batch of its own. An error raises on every rank; where the model is sharded, one that
    strikes some members only must come after the forward pass, or the others wait in it."""
    batches: Iterable[Any] | None = None
    """One is taken per round: a data loader of this replica's own, over training or held-out data; begun again when it
    ends. Without it the batches passed to ``scheduler.step(loss, batch=batch)`` are used again, each at least
    :data:`FORGOTTEN` steps later: while an optimizer's momentum still carries a batch's gradient, its loss asks for a
    larger learning rate. For rounds of less than some hundred steps pass ``batches``."""
    held_out: bool = False
    """Whether ``batches`` are data that the model does not train on: what hyperparameters that only regularise need."""
    power: float = 0.25
    """>= 0: the slow average weighs round ``t`` by about ``t**power``. The larger, the less far it looks back; 0 is the
    plain average over all rounds."""
    dtype: torch.dtype | None = None
    """In which the slow averages are kept, for example ``torch.bfloat16``; default fp32. Less is rounded at random."""
    device: torch.device | str | None = None
    """Where they are kept, for example ``"cpu"``; default beside the parameters."""

    def __post_init__(self) -> None:
        if not callable(self.loss_fn):
            raise TypeError(f"Invalid probe={self.loss_fn!r}. Must be a function: probe(model, batch) -> scalar loss.")
        if self.held_out and self.batches is None:
            raise ValueError("Probe(held_out=True) needs batches=: those passed to step() are training data.")
        if not 0 <= self.power < math.inf:
            raise ValueError(f"Invalid Probe.power={self.power}. Must be finite and >= 0.")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TypeError(f"Invalid Probe.dtype={self.dtype}. Must be a floating-point dtype.")

    @property
    def place(self) -> torch.device | None:
        """``device`` as torch's."""
        return None if self.device is None else torch.device(self.device)


def evaluate(
    models: Sequence[nn.Module],
    loss_fn: LossFunction,
    batch: Any,
    points: Sequence[Point],
    slow: SlowAverage,
    weights: Weights,
    *,
    reach: float = 1.0,
    shares: Sequence[Sequence[tuple[int, float]]] | None = None,
    to_the_end: bool = False,
) -> tuple[float, ...]:
    """One rank's losses, in the order of :class:`ProbeLosses`. Collective among a replica's members, if
    ``loss_fn`` is: a sharded model's forward pass is, and all of them must then call the model equally often.

    The models are in eval mode meanwhile, without autograd, and with batch normalisation as in training
    (:func:`evaluation`); ``loss_fn`` finds torch's random number generators in the same state each time. They, the
    parameters and the training flags are afterwards as they were, whatever ``loss_fn`` raises. Other buffers are the
    model's own affair: torch's do not change in eval mode.

    Args:
        reach: how far away the far point is.
        shares: by bucket, of the slow average's progress; see :meth:`hdet.converge.slow_average.SlowAverage.point`.
        to_the_end: evaluate all points before raising, even if one fails, for the sake of members that take part
            in the others. That keeps them together if ``loss_fn`` fails after the model's forward pass. If it fails in
            it, or before it, on some members only, the rest wait there until their process group's timeout.

    Raises:
        TypeError, ValueError: if ``loss_fn`` does not return a scalar.
    """
    bare = tuple(unwrapped(model) for model in models)
    subject = bare[0] if len(bare) == 1 else bare
    losses = []
    failures: list[Exception] = []
    with evaluation(bare):
        try:
            for name in ProbeLosses._fields:
                for i, (bucket, mean, displacement) in enumerate(points):
                    if name in ("above", "below"):
                        point = mean.add(displacement, alpha=1 if name == "above" else -1)
                    elif name == "mirror":
                        point = slow.mirrored(i, mean)
                    elif name == "far":
                        point = slow.point(i, reach, mean)
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


class Batches:
    """Where a probe's batches come from.

    Args:
        probe: the probe.
        round_length: steps from one probe to the next.
    """

    def __init__(self, probe: Probe, round_length: int) -> None:
        self._own = None if probe.batches is None else cycle(probe.batches)
        self._kept: deque[Any] = deque(maxlen=1 - (-FORGOTTEN // round_length))

    @property
    def ready(self) -> bool:
        """Whether there is one for the round that ends now."""
        return self._own is not None or len(self._kept) == self._kept.maxlen

    def take(self) -> Any:
        """The batch for the round that ends now."""
        return self._kept[0] if self._own is None else next(self._own)

    def offer(self, batch: Any) -> None:
        """Keep a copy of the round's last training batch for later: the data loader may reuse its memory."""
        if self._own is None and batch is not None:
            self._kept.append(tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch))

    def forget(self) -> None:
        """Drop the batches kept."""
        self._kept.clear()


def cycle(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate again and again.

    Raises:
        ValueError: if there is nothing to iterate over.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches= is empty, or an iterator that has ended. Pass a data loader.")


def gathered(rows: Sequence[Sequence[float]]) -> ProbeLosses:
    """:func:`evaluate`'s results of all replicas."""
    return ProbeLosses(*map(tuple, zip(*rows, strict=True)))


def scalar(loss: object) -> float:
    """The value of what a loss function returned.

    Raises:
        TypeError: if it is no scalar loss.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss.item()
    if isinstance(loss, float):
        return loss
    what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"probe= returned {what}. Must be a scalar loss, such as F.cross_entropy(model(x), y).")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel, whose forward pass sends buffers."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def preserved_rng(models: Sequence[nn.Module]) -> Iterator[None]:
    """torch's random number generators, of the CPU and of the models' GPUs, come back as they were."""
    devices = {t.device for model in models for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        yield


@contextmanager
def evaluation(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode without autograd, but batch and instance normalisation by the input's own statistics wherever training
    does so: the running ones are those of recent parameters, and make a point elsewhere look worse than it is. Training
    flags, running statistics and torch's random number generators come back as they were."""
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
