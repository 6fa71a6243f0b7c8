"""The replicas: who they are and how they talk. This is the only file of hdet that calls a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Replicas:
    """The group of ranks that hold one replica each.

    Args:
        group: a ``ProcessGroup``, a 1-D ``DeviceMesh``, or ``None`` for the whole world. Without an initialised process
            group there is one replica and nothing is ever sent.

    Raises:
        TypeError: for anything else.
        ValueError: for a mesh of more than one dimension, or a group this rank does not belong to.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"replicas= takes a 1-D DeviceMesh, got {group.ndim} dimensions {group.mesh_dim_names}. "
                    'Pass the dimension that replicates, for example replicas=mesh["replicate"].'
                )
            group = group.get_group()
        elif group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"replicas= takes a torch.distributed ProcessGroup, a 1-D DeviceMesh or None, got "
                f"{type(group).__name__}."
            )
        self._group = group
        if not (dist.is_available() and dist.is_initialized()):
            self.size, self.rank, self._is_active = 1, 0, False
            return
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                f"Rank {dist.get_rank()} is not a member of the group passed as replicas=. Every rank must pass the "
                "group that it belongs to."
            )
        self._is_active = self.size > 1

    @property
    def writer(self) -> bool:
        """True on the one rank of the group that writes files."""
        return self.rank == 0

    def device_for(self, tensor: Tensor) -> torch.device:
        """The device on which ``tensor``'s bucket must lie to be sent: its own where the backend can, else one that
        the backend has."""
        if not self._is_active or tensor.device.type in self._device_types():
            return tensor.device
        return self._device()

    def all_gather(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """Every replica's ``values``, by replica. All must pass the same number of them."""
        if not self._is_active:
            return [list(values)]
        mine = torch.tensor(values, dtype=dtype, device=self._device())
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(theirs, mine, group=self._group)
        return torch.stack(theirs).tolist()

    def all_gather_object(self, value: object) -> list[Any]:
        """Every replica's picklable ``value``. For error messages, not for the hot path."""
        if not self._is_active:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_reduce(self, buffer: Tensor, op: dist.ReduceOp.RedOpType) -> dist.Work | None:
        """Start reducing ``buffer`` in place over the replicas; wait on the result before reading it."""
        if not self._is_active:
            return None
        return dist.all_reduce(buffer, op=op, group=self._group, async_op=True)

    def _device_types(self) -> list[str]:
        # e.g. {"cpu": "gloo", "cuda": "nccl"}; "cpu:gloo,cuda:nccl" configures both.
        config = str(dist.get_backend_config(self._group))
        return [part.split(":")[0] for part in config.split(",")]

    def _device(self) -> torch.device:
        """Where small messages live: the CPU if the backend serves it, which spares a device synchronisation."""
        types = self._device_types()
        if "cpu" in types:
            return torch.device("cpu")
        return torch.device(types[0], torch.accelerator.current_device_index())
