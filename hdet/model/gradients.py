"""Gradient modes: over which ranks a step's gradients are averaged.

::

    shared    all ranks                    as DDP and HSDP do it; hdet changes nothing
    grouped   the members of a replica     replicas exchange nothing between converges
    local     no ranks of other replicas   Local SGD: each replica follows its own gradient between converges

In ``local`` and ``grouped`` hdet switches the synchronisation off; the user's model stays wrapped as it is:

- ``DistributedDataParallel`` over ranks of several replicas: in ``local`` its ``require_backward_grad_sync`` is cleared
  (the user's ``no_sync()`` restores it as cleared), and with it the broadcast of buffers; in ``grouped`` it gets a
  communication hook that averages over the members.
- FSDP2 on a (replicate x shard) mesh (HSDP): the all-reduce over the replicas is left out; the reduce-scatter inside
  the replica stays, and divides by the number of members.
- DDP or FSDP2 over a replica's members only: nothing is done.

The last ensemble built on a module decides: one with ``gradients="shared"`` switches the synchronisation on again.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdet.model.fingerprint import fingerprint
from hdet.model.weights import is_instance, local
from hdet.replicas.agreement import digest
from hdet.replicas.topology import GradientScope, Replicas, average_gradients, ranks_of

_undo: WeakKeyDictionary[nn.Module, Callable[[nn.Module], None]] = WeakKeyDictionary()
"""By module: a function that undoes what a mode has changed."""
_scopes: WeakKeyDictionary[nn.Module, GradientScope] = WeakKeyDictionary()
"""By DDP module: the state of its communication hook, which can be registered once and never removed."""


def check_gradients(mode: str, modules: Sequence[nn.Module], replicas: Replicas) -> None:
    """Check that a mode is possible with these modules. Changes nothing.

    Raises:
        ValueError: if it is not, saying what would be.
    """
    if mode == "shared" or replicas.size == 1:
        return
    if not modules:
        raise ValueError(f'gradients="{mode}" needs model=: hdet switches off the synchronisation of its gradients.')
    if mode == "grouped" and replicas.members == 1:
        raise ValueError(
            'gradients="grouped" averages inside a replica, and here every replica is one rank. Pass replicas= as a '
            'number of replicas smaller than the number of ranks, or one dimension of a mesh; or gradients="local".'
        )
    ddps, sharded = list(_ddp_modules(modules)), list(_fsdp_modules(modules))
    if mode == "grouped" and not ddps and not sharded:
        raise ValueError(
            'gradients="grouped" needs a model= that averages gradients: pass the DistributedDataParallel module '
            "itself (not the model inside it), or an FSDP2 model."
        )
    own = set(replicas.own_ranks)
    for ddp in ddps:
        ranks = set(ranks_of(ddp.process_group))
        if ranks <= own:
            continue
        if mode == "local" and replicas.members > 1:
            raise ValueError(
                f'gradients="local" would let the {replicas.members} members of a replica drift apart, which are '
                'copies of one model. Pass gradients="grouped": gradients are averaged inside each replica.'
            )
        if mode == "grouped":
            if not own <= ranks:
                raise ValueError(
                    f'gradients="grouped": the DistributedDataParallel module spans the ranks {sorted(ranks)}, and '
                    f"this replica is {sorted(own)}. One must hold the other: build it over the world or the replica."
                )
            if ddp not in _scopes and ddp._comm_hooks:
                name = getattr(ddp._comm_hooks[0][0], "__name__", "?")
                raise ValueError(
                    f'gradients="grouped" needs a communication hook of its own, and the DistributedDataParallel '
                    f"module has {name} already; DDP takes one. Leave that out, or build DDP over the members' process "
                    "group, whose hook may stay."
                )
    for module in sharded:
        for group in _parameter_groups(module):
            _mesh_without_replicas(group, own)


def set_gradients(mode: str, modules: Sequence[nn.Module], replicas: Replicas) -> Callable[[], None]:
    """Put the modules into a mode, which :func:`check_gradients` has checked.

    Returns:
        A function that switches the synchronisation on again, but for modules that have been put into a mode since.
    """
    for module in (*_ddp_modules(modules), *_fsdp_modules(modules)):
        undo = _undo.pop(module, None)
        if undo is not None:
            undo(module)
    if mode == "shared" or replicas.size == 1:
        return lambda: None
    own = set(replicas.own_ranks)
    for ddp in _ddp_modules(modules):
        if set(ranks_of(ddp.process_group)) <= own:
            continue
        if mode == "local":
            _disable_sync(ddp)
        else:
            _average_over_members(ddp, replicas)
    for module in _fsdp_modules(modules):
        _skip_all_reduce(module, own)
    changed: list[nn.Module] = [m for m in (*_ddp_modules(modules), *_fsdp_modules(modules)) if m in _undo]
    ours = [functools.partial(_undo[module]) for module in changed]  # each an object of its own
    _undo.update(zip(changed, ours, strict=True))

    def restore() -> None:
        for module, mine in zip(changed, ours, strict=True):
            if module in _undo and _undo[module] is mine:
                del _undo[module]
                mine(module)

    return restore


def fingerprint_gradients(parameters: Iterable[Tensor]) -> float:
    """A hash of the gradients' bits, below ``2**53``; -1 if there are no gradients. Not collective."""
    hashes: list[tuple[int, int]] = []
    for index, parameter in enumerate(parameters):
        gradient = None if parameter.grad is None else local(parameter.grad)
        if gradient is not None and gradient.layout == torch.strided and gradient.numel():
            hashes.append((index, fingerprint(gradient)))
    return float(digest(hashes)) if hashes else -1.0


def warn_of_gradients(mode: str, fingerprints: Sequence[float], replicas: Replicas) -> None:
    """Warn, on the writer, if the replicas' gradients are not what the mode says.

    Args:
        mode: ``"shared"``, ``"local"`` or ``"grouped"``.
        fingerprints: every replica's :func:`fingerprint_gradients`, by replica.
        replicas: the group.
    """
    if replicas.size == 1 or min(fingerprints) < 0 or not replicas.writer:
        return
    if mode == "shared" and len(set(fingerprints)) > 1:
        warnings.warn(
            'The replicas have different gradients under gradients="shared". If that is meant (Local SGD), pass '
            'gradients="local"; if not, wrap the model in DistributedDataParallel, or shard it on a mesh with a '
            "replicate dimension.",
            stacklevel=2,
        )
    elif mode == "local" and len(set(fingerprints)) == 1:
        warnings.warn(
            'All replicas have the same gradients under gradients="local": they are still synchronised. Pass the '
            "DistributedDataParallel or FSDP2 module itself as model=, not the model inside it.",
            stacklevel=2,
        )


def _disable_sync(ddp: DistributedDataParallel) -> None:
    # The first forward pass would clear the second too, but only after a broadcast of buffers.
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False
    _undo[ddp] = _enable_sync


def _enable_sync(ddp: Any) -> None:
    ddp.require_backward_grad_sync = ddp.require_forward_param_sync = True


def _average_over_members(ddp: DistributedDataParallel, replicas: Replicas) -> None:
    if ddp not in _scopes:
        _scopes[ddp] = GradientScope(ddp.process_group)
        ddp.register_comm_hook(_scopes[ddp], average_gradients)
    _scopes[ddp].replicas = replicas
    _undo[ddp] = _average_over_group


def _average_over_group(ddp: Any) -> None:
    _scopes[ddp].replicas = None


def _skip_all_reduce(module: nn.Module, own: set[int]) -> None:
    for group in _parameter_groups(module):
        mesh_info = _mesh_without_replicas(group, own)
        if mesh_info is not None:
            # set_requires_all_reduce(False) would not do: FSDP2 then keeps the gradients as parts of a sum that a later
            # all-reduce completes, and does not write them into the parameters.
            if group.post_forward_mesh_info is group.mesh_info:
                group.post_forward_mesh_info = mesh_info
            group.mesh_info = mesh_info
            _undo[module] = _restore_all_reduce


def _restore_all_reduce(module: Any) -> None:
    for group in _parameter_groups(module):
        original = group.fsdp_params[0].mesh_info
        if group.post_forward_mesh_info is group.mesh_info:
            group.post_forward_mesh_info = original
        group.mesh_info = original


def _mesh_without_replicas(group: Any, own: set[int]) -> Any:
    """The mesh of an FSDP2 parameter group without its replicate dimension; ``None`` if it has none over ranks of other
    replicas.

    Raises:
        ValueError: if this torch has another FSDP2.
    """
    try:
        info = group.mesh_info
        if info.replicate_mesh_dim is None or set(ranks_of(info.replicate_process_group)) <= own:
            return None
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

        if group.fsdp_params and info.shard_mesh_dim is not None:
            kept = {f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.init}
            return FSDPMeshInfo(**kept | {"replicate_mesh_dim": None})
    except (AttributeError, ImportError, TypeError):
        pass  # these parts of FSDP2 are not public, and may be others in another torch
    raise ValueError(
        "hdet cannot leave out the all-reduce of this FSDP2 module. Shard it inside the replica only, with "
        'fully_shard(model, mesh=mesh["shard"]): its gradients then stay in the replica without further ado.'
    )


def _parameter_groups(module: Any) -> list[Any]:
    """Of one FSDP2 module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in ([state._fsdp_param_group] if groups is None else groups) if g is not None]


def _ddp_modules(modules: Iterable[nn.Module]) -> Iterator[DistributedDataParallel]:
    return (m for module in modules for m in module.modules() if isinstance(m, DistributedDataParallel))


def _fsdp_modules(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    return (m for module in modules for m in module.modules() if is_instance(m, "torch.distributed.fsdp", "FSDPModule"))
