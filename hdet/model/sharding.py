"""Which sharded models hdet can average: those of which every replica holds all shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hdet.model.weights import is_dtensor, is_instance, reshard
from hdet.replicas.topology import Replicas


def check_sharding(modules: Sequence[nn.Module], replicas: Replicas) -> None:
    """Check that no parameter is sharded over ranks of different replicas.

    A DTensor may be sharded, or held in any other way, along mesh dimensions whose ranks are members of one replica
    (FSDP2, tensor parallelism), and replicated along the one whose ranks are the replicas (HSDP).

    Raises:
        TypeError: for FSDP1, whose flat parameters do not say how they are sharded.
        ValueError: for a parameter that is.
    """
    if any(
        is_instance(m, "torch.distributed.fsdp", "FullyShardedDataParallel")
        for module in modules
        for m in module.modules()
    ):
        raise TypeError(
            "model= has FullyShardedDataParallel (FSDP1) modules, whose flat parameters do not say how they are "
            "sharded. Shard it with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    if replicas.size == 1:
        return
    reshard(modules)
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if is_dtensor(tensor):
                _check(name, tensor, replicas)


def _check(name: str, tensor: Any, replicas: Replicas) -> None:
    for dimension, placement in enumerate(tensor.placements):
        ranks = _ranks_along(tensor.device_mesh, dimension)
        if len(ranks) == 1 or set(ranks) <= set(replicas.own_ranks):
            continue
        if placement.is_replicate() and set(ranks) == set(replicas.peers):
            continue
        raise ValueError(
            f"model= has the parameter {name}, a DTensor placed as {placement} over ranks {_short(ranks)}, which "
            "belong to different replicas: a learning rate per replica would be one per shard, and averaging would "
            "mix shards. Make a 2-D mesh, mesh = init_device_mesh(device, (replicas, shards), "
            'mesh_dim_names=("replicate", "shard")), shard with fully_shard(model, mesh=mesh), and pass '
            'replicas=mesh["replicate"].'
        )


def _ranks_along(mesh: DeviceMesh, dimension: int) -> list[int]:
    """The ranks that differ from this one in one coordinate of the mesh."""
    ranks: Tensor = mesh.mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for other in reversed(range(ranks.ndim)):
        if other != dimension:
            ranks = ranks.select(other, coordinate[other])
    return ranks.tolist()


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown}, ..." if len(ranks) > 8 else shown
