"""Checks for modules and training loops that do not work with replicas as written."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

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
                    "Accelerator(step_scheduler_with_optimizer=False)."
                )
            return


def another_averages(modules: Sequence[nn.Module], ensemble: object) -> bool:
    """Record that ``ensemble`` converges on these modules. True if another ensemble does so too, in turn with it."""
    result = False
    for module in modules:
        latest = _converged_by.setdefault(module, [])
        others = [one for one in latest if one() is not None and one() is not ensemble]
        result = result or (bool(others) and any(one() is ensemble for one in latest) and latest[-1]() is not ensemble)
        latest[:] = [*others[-1:], ref(ensemble)]
    return result
