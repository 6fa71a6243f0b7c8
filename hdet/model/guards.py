"""Checks for modules and training loops that do not work with replicas as written."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from hdet.model.weights import Weights, local
from hdet.replicas.topology import Replicas, ranks_of

_FRAMES = 6
"""Most stack frames between an adapter's ``step()`` and :func:`check_caller`."""

_converged_by: WeakKeyDictionary[nn.Module, list[ref[object]]] = WeakKeyDictionary()
"""By module: up to two ensembles that converged on it last, the latest at the end."""


def warn_of_batch_norm(modules: Sequence[nn.Module], mode: str, replicas: Replicas) -> None:
    """Warn, on the writer, where batch norm would use statistics of other replicas."""
    if replicas.size == 1 or not replicas.writer:
        return
    own = set(replicas.own_ranks)
    for ddp in (m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel)):
        if mode == "local" or not ddp.broadcast_buffers or set(ranks_of(ddp.process_group)) <= own:
            continue  # in local mode hdet has switched the broadcast off
        if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in ddp.modules()):
            warnings.warn(
                "The model has batch norm, and DistributedDataParallel overwrites its running statistics with rank 0's "
                "at every forward pass, though each replica has parameters of its own. Build it with "
                "broadcast_buffers=False (since torch 2.13: forward_sync_buffers=False): hdet averages the statistics "
                "when it converges.",
                stacklevel=3,
            )
            break
    for norm in (m for module in modules for m in module.modules() if isinstance(m, nn.SyncBatchNorm)):
        # Without a process group it uses the world.
        ranks = set(replicas.ranks) if norm.process_group is None else set(ranks_of(norm.process_group))
        if not ranks <= own:
            warnings.warn(
                "The model has SyncBatchNorm over ranks of several replicas: each replica is normalised by statistics "
                "of activations under the others' parameters, so that its loss and its gradient are not its own. Use "
                "BatchNorm, or convert_sync_batchnorm(model, process_group) with the group of a replica's members.",
                stacklevel=3,
            )
            break


def check_overlaps(weights: Weights) -> None:
    """Check that no two trained parameters lie in the same memory, unless they are the same parameter.

    Raises:
        ValueError: naming two that do.
    """
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.nbytes, (tuple(t.shape), t.stride(), t.dtype), slot.name)
        for slot in weights.slots()
        if slot.tensor.requires_grad
        for t in (local(slot.tensor),)
        if t.layout == torch.strided and t.is_contiguous() and t.numel() and t.data_ptr()
    )
    for (device, begin, end, kind, name), (device2, begin2, _, kind2, name2) in itertools.pairwise(spans):
        if device == device2 and begin2 < end and (begin, kind) != (begin2, kind2):
            raise ValueError(
                f"The parameters {name} and {name2} share memory, and are not the same parameter: an average would "
                f"write one into the other. Tie them by one Parameter in both places, or pass exclude={name2!r}."
            )


def check_caller() -> None:
    """At the first scheduler step: check that an optimizer step has only one.

    Raises:
        RuntimeError: if accelerate steps the scheduler once for each process.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "accelerate.scheduler":
            wrapper = frame.f_locals.get("self")
            count = frame.f_locals.get("num_processes", 1)
            if count > 1 and not getattr(wrapper, "split_batches", True):
                raise RuntimeError(
                    f"accelerate steps this scheduler {count} times for one step of the optimizer, once for each "
                    "process: rounds would be that much too short, and the schedule over too soon. Leave the scheduler "
                    "out of accelerator.prepare() and call scheduler.step(loss) after each optimizer step, or pass "
                    "Accelerator(step_scheduler_with_optimizer=False); or build it with "
                    "hdet.integrations.accelerate.attach(), which also saves and loads it."
                )
            return


class JoinGuard:
    """Refuses ``DistributedDataParallel.join()``.

    Args:
        modules: ``model=``.
        replicas: who takes part.
    """

    def __init__(self, modules: Sequence[nn.Module], replicas: Replicas) -> None:
        ddps = [m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel)]
        self._ddps = ddps if replicas.size > 1 else []

    def check(self) -> None:
        """Raise ValueError inside of ``join()``. To be called before communicating."""
        if any(ddp._join_config.enable for ddp in self._ddps):
            raise ValueError(
                "The model is inside of DistributedDataParallel.join(). A rank that has run out of data takes part in "
                "DDP's communication there, and cannot in hdet's. Give every rank as many batches, and leave join() "
                "out: DataLoader(drop_last=True) with a DistributedSampler, or stop all ranks when the first runs out. "
                "After an earlier join() wrap the model in DistributedDataParallel anew: torch leaves it in that mode."
            )


def another_averages(modules: Sequence[nn.Module], ensemble: object) -> bool:
    """Record that ``ensemble`` converges on these modules. True if another ensemble does so too, in turn with it."""
    result = False
    for module in modules:
        latest = _converged_by.setdefault(module, [])
        others = [one for one in latest if one() is not None and one() is not ensemble]
        result = result or (bool(others) and any(one() is ensemble for one in latest) and latest[-1]() is not ensemble)
        latest[:] = [*others[-1:], ref(ensemble)]
    return result
