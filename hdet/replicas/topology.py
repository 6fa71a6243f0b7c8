"""The replicas: who they are and how they talk. This is the only file of hdet that calls a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

ReplicasLike = dist.ProcessGroup | DeviceMesh | int | None
"""What ``replicas=`` takes; see :class:`Replicas`."""

T = TypeVar("T")

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
_groups_of: list[object] = [None]  # the world in which they were made


class Replicas:
    """The ranks of an ensemble: ``size`` replicas of ``members`` ranks each.

    A replica of several members is one model whose shards, or whose copies, those ranks hold; they share its learning
    rate. Building this object communicates nothing; process groups that are missing are made at their first use.

    Args:
        group: one of

            - ``None``: every rank of the world is a replica;
            - an int: that many replicas, each of as many ranks with consecutive numbers;
            - a ``ProcessGroup``: every rank in it is a replica;
            - a 1-D ``DeviceMesh``: the same. If it is one dimension of a larger mesh (``mesh["replicate"]``), the ranks
              along the other dimensions are the replica's members.

            Without an initialised process group there is one replica and nothing is ever sent.

    Raises:
        TypeError: for anything else.
        ValueError: for a number that does not divide the world, a mesh of more than one dimension, or a group this rank
            does not belong to.
    """

    def __init__(self, group: ReplicasLike = None) -> None:
        known = group is None or isinstance(group, (dist.ProcessGroup, DeviceMesh, int))
        if not known or isinstance(group, bool):
            raise TypeError(
                "replicas= takes a number of replicas, a torch.distributed ProcessGroup, a 1-D DeviceMesh or None, got "
                f"{type(group).__name__}."
            )
        active = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if active else 1
        # What new_group() returns on the ranks that it leaves out is an int too.
        if active and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(_not_a_member())
        if isinstance(group, int) and (group < 1 or world % group):
            raise ValueError(
                f"Invalid replicas={group}. Must divide the number of ranks, {world}: every replica has as many "
                "members, with consecutive ranks."
            )
        if isinstance(group, DeviceMesh) and group.ndim != 1:
            raise ValueError(
                f"replicas= takes a 1-D DeviceMesh, got {group.ndim} dimensions {group.mesh_dim_names}. "
                'Pass the dimension that replicates, for example replicas=mesh["replicate"].'
            )
        self.kind = "the world" if group is None else type(group).__name__
        """What was passed, which must be the same on every rank: with another kind a rank uses other process groups."""
        self.copies = isinstance(group, int)
        """Whether the members of a replica hold the same model each, as far as it is not sharded."""
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        if not active:
            self.ranks: tuple[int, ...] = (0,)
            """Every rank of the ensemble, replica by replica."""
            self.size, self.rank, self.members, self.member, self._is_active = 1, 0, 1, 0, False
            return
        table = _table(group, world)
        self.size, self.members = table.shape
        self.ranks = tuple(table.flatten().tolist())
        me = dist.get_rank()
        if me not in self.ranks:
            raise ValueError(_not_a_member())
        self.rank, self.member = divmod(self.ranks.index(me), self.members)
        if isinstance(group, DeviceMesh):
            self._group = group.get_group()
        elif self.members == 1 and self._group is None:
            self._group = dist.group.WORLD
        if self.members == 1:
            self._order = range(self.size)
        else:  # collectives over everyone answer in the order of the ranks
            self._order = [sorted(self.ranks).index(rank) for rank in self.ranks]  # type: ignore[assignment]
        self._is_active = len(self.ranks) > 1

    @property
    def writer(self) -> bool:
        """True on the one rank of the ensemble that writes files."""
        return self.rank == 0 and self.member == 0

    @property
    def own_ranks(self) -> tuple[int, ...]:
        """The ranks of this replica's members."""
        return self.ranks[self.rank * self.members : (self.rank + 1) * self.members]

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks that hold in the other replicas what this one holds here, by replica; this one is among them."""
        return self.ranks[self.member :: self.members]

    def name_of(self, index: int) -> str:
        """What an error calls the rank that comes ``index``-th in :attr:`ranks`."""
        return f"replica {index}" if self.members == 1 else f"rank {self.ranks[index]}"

    def by_replica(self, of_ranks: Sequence[T]) -> list[Sequence[T]]:
        """Cut what :meth:`all_gather` returned into replicas: for each, what its members said."""
        return [of_ranks[i : i + self.members] for i in range(0, len(of_ranks), self.members)]

    def device_for(self, tensor: Tensor) -> torch.device:
        """The device on which ``tensor``'s bucket must lie to be sent: its own where the backend can, else one that
        the backend has."""
        if not self._is_active or tensor.device.type in self._device_types():
            return tensor.device
        return self._device()

    def all_gather(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """Every rank's ``values``, replica by replica. All must pass the same number of them."""
        if not self._is_active:
            return [list(values)]
        rows = self._gather(values, dtype, len(self.ranks), self._everyone())
        return rows if self.members == 1 else [rows[i] for i in self._order]

    def all_gather_peers(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """The same among the ranks that hold the same part of each replica, by replica."""
        return self._gather(values, dtype, self.size, self._peers_group()) if self.size > 1 else [list(values)]

    def all_gather_object(self, value: object) -> list[Any]:
        """Every rank's picklable ``value``, replica by replica. For error messages, not for the hot path."""
        if not self._is_active:
            return [value]
        values: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self._everyone())
        return [values[i] for i in self._order]

    def all_reduce(self, buffer: Tensor, op: dist.ReduceOp.RedOpType, *, everyone: bool = False) -> dist.Work | None:
        """Start reducing ``buffer`` in place over the replicas, among the ranks that hold the same part of each, or
        among ``everyone``; wait on the result before reading it."""
        if not self._is_active:
            return None
        group = self._everyone() if everyone else self._peers_group()
        return dist.all_reduce(buffer, op=op, group=group, async_op=True)

    def members_group(self) -> dist.ProcessGroup:
        """The process group of this replica's members. Collective among them the first time."""
        return _group_of(self.own_ranks)

    def _gather(
        self, values: Sequence[float], dtype: torch.dtype, size: int, group: dist.ProcessGroup
    ) -> list[list[Any]]:
        mine = torch.tensor(values, dtype=dtype, device=self._device())
        theirs = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(theirs, mine, group=group)
        return torch.stack(theirs).tolist()

    def _everyone(self) -> dist.ProcessGroup:
        if self.members == 1:
            assert self._group is not None
            return self._group
        return _group_of(self.ranks)

    def _peers_group(self) -> dist.ProcessGroup:
        if self._group is None:
            self._group = _group_of(self.peers)
        return self._group

    def _device_types(self) -> list[str]:
        # e.g. {"cpu": "gloo", "cuda": "nccl"}; "cpu:gloo,cuda:nccl" configures both.
        config = str(dist.get_backend_config(self._everyone()))
        return [part.split(":")[0] for part in config.split(",")]

    def _device(self) -> torch.device:
        """Where small messages live: the CPU if the backend serves it, which spares a device synchronisation."""
        types = self._device_types()
        if "cpu" in types:
            return torch.device("cpu")
        return torch.device(types[0], torch.accelerator.current_device_index())


def forget_groups() -> None:
    """Drop the process groups made here, before they are destroyed: a group that is still referred to is freed at the
    interpreter's end."""
    _groups.clear()
    _groups_of[0] = None


class GradientScope:
    """Over whom :func:`average_gradients` averages: a replica's members, or the whole group of the DDP module.

    Args:
        group: of the DDP module.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.replicas: Replicas | None = None
        """If set, only the members of a replica share gradients."""


def average_gradients(scope: GradientScope, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of ``DistributedDataParallel``."""
    group = scope.group if scope.replicas is None else scope.replicas.members_group()
    buffer = bucket.buffer().div_(group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# DDP reads the annotations, and wants the classes themselves.
average_gradients.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The ranks in a process group."""
    return tuple(dist.get_process_group_ranks(group))


def _not_a_member() -> str:
    return (
        f"Rank {dist.get_rank()} is not a member of the group passed as replicas=. Every rank must pass the group that "
        "it belongs to."
    )


def _table(group: ReplicasLike, world: int) -> Tensor:
    """Ranks by replica and member."""
    if group is None:
        return torch.arange(world).view(world, 1)
    if isinstance(group, int):
        return torch.arange(world).view(group, -1)
    if isinstance(group, dist.ProcessGroup):
        # A group that this rank is not in knows no ranks.
        return torch.tensor(dist.get_process_group_ranks(group) if dist.get_rank(group) >= 0 else []).view(-1, 1)
    if hasattr(group, "_get_root_mesh"):
        root = group._get_root_mesh()
    else:  # before torch 2.9
        from torch.distributed.device_mesh import _mesh_resources

        root = _mesh_resources.get_root_mesh(group)
    if root.ndim == 1:
        return group.mesh.view(-1, 1)
    name = (group.mesh_dim_names or ("",))[0]
    if name not in (root.mesh_dim_names or ()):
        raise ValueError(
            f"replicas= got the mesh {name!r}, which is no dimension of the mesh {root.mesh_dim_names} that it was "
            'made from. Pass one of its dimensions, for example replicas=mesh["replicate"], or a ProcessGroup.'
        )
    table = root.mesh.movedim((root.mesh_dim_names or ()).index(name), 0)
    return table.reshape(table.shape[0], -1)


def _group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """The process group of some ranks, made once. Collective among them, and no others, if it must be made."""
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    if _groups_of[0] is not world:
        _groups.clear()
        _groups_of[0] = world
    key = tuple(sorted(ranks))
    if key not in _groups:
        _groups[key] = dist.new_group(list(key), use_local_synchronization=True)
    return _groups[key]
