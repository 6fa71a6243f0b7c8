"""The replicas: their ranks, and the collectives among them. No other file of hdet calls a collective."""

from __future__ import annotations

import logging
import numbers
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hdet.errors import HdetError, ReplicaMismatchError, shown
from hdet.replicas.notes import PATIENCE, WARNS_AFTER, Notes

logger = logging.getLogger("hdet")

ReplicasLike = dist.ProcessGroup | DeviceMesh | int | None
"""What ``replicas=`` takes; see :class:`Replicas`."""

T = TypeVar("T")

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""Process groups that hdet has made, by their ranks."""
_groups_world: list[object] = [None]
"""The world in which they were made."""
_meetings: dict[str, int] = {}
"""How often the ranks of a process group have met, by its name."""


class Replicas:
    """The ranks of an ensemble: ``size`` replicas of ``members`` ranks each.

    The members of a replica hold shards, or copies, of one model, and share its learning rate. The **peers** of a rank
    are the ranks that hold the same shard or copy in the other replicas. This rank is member ``member`` of replica
    ``rank``. The constructor communicates nothing; process groups that are missing are made at their first use.

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
        group = check_replicas("replicas", group)
        active = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if active else 1
        # On ranks outside of the group new_group() returns this, which is an int too.
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
        """The type of what was passed. It must be equal on all ranks: it decides which process groups they use."""
        self.members_are_copies = isinstance(group, int)
        """Whether the members of a replica hold copies of all tensors that are not sharded."""
        self.doing = "a call before the first step()"
        """The call in which this rank communicates, in the words of a message to the others."""
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._world = dist.group.WORLD if active else None
        self._known_notes: Notes | None = None
        if not active:
            self.ranks: tuple[int, ...] = (0,)
            """Every rank of the ensemble, replica by replica."""
            self.size, self.rank, self.members, self.member, self._is_active = 1, 0, 1, 0, False
            return
        table = _rank_table(group, world)
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
        else:  # collectives over all ranks return in the order of the ranks
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
        """The ranks that hold the same part of each replica as this one, itself included, by replica."""
        return self.ranks[self.member :: self.members]

    def name_of(self, index: int) -> str:
        """The name of rank number ``index`` of :attr:`ranks` in an error message."""
        return f"replica {index}" if self.members == 1 else f"rank {self.ranks[index]}"

    def by_replica(self, of_ranks: Sequence[T]) -> list[Sequence[T]]:
        """What :meth:`all_gather` returned, as a list of the members' rows for each replica."""
        return [of_ranks[i : i + self.members] for i in range(0, len(of_ranks), self.members)]

    def device_for(self, tensor: Tensor) -> torch.device:
        """The device on which ``tensor``'s bucket must be to be sent: its own if the backend supports it, else one that
        the backend supports."""
        if not self._is_active or tensor.device.type in self._device_types:
            return tensor.device
        return self._device()

    def check_world(self) -> None:
        """Check that the processes are those of the time when this was built. Not collective.

        Raises:
            HdetError: on every rank, if the process group was initialised, or destroyed, since.
        """
        active = dist.is_available() and dist.is_initialized()
        if (dist.group.WORLD if active else None) is self._world:
            return
        if self._world is None:
            size = dist.get_world_size()
            if size > 1:
                raise HdetError(
                    "The scheduler was built before torch.distributed.init_process_group(): it knows of 1 replica, and "
                    f"there are {size} ranks, which would never be averaged. Build it after init_process_group()."
                )
            return
        raise HdetError(
            "The process group in which the scheduler was built has been destroyed"
            + (" and another initialised" if active else "")
            + ". Build the scheduler anew, after init_process_group()."
        )

    def meet(self) -> None:
        """Before a call that not every rank may make: wait until all are here, for some seconds at most. Collective.

        Raises:
            ReplicaMismatchError: if another rank waits in another call, or has ended.
        """
        if self._is_active:
            name = self._all_ranks_group().group_name
            _meetings[name] = _meetings.get(name, 0) + 1
            if obstacles := self._notes.meet(f"{name}/{_meetings[name]}", self.doing):
                self._fail(obstacles)

    def tell_end(self, text: str) -> None:
        """Tell the ranks that may wait for this one that it has ended. Not collective."""
        if self._is_active and dist.is_initialized() and dist.group.WORLD is self._world:
            self._notes.leave("ended", text)

    def wait(self, work: dist.Work | None) -> None:
        """Wait for the end of a collective that the other ranks may not have begun.

        Raises:
            ReplicaMismatchError: if another rank waits in another call, or has ended.
            HdetError: if it failed.
        """
        if work is not None:
            self._complete(lambda: work)

    def all_gather(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """Every rank's ``values``, replica by replica. All must pass the same number of them. Collective."""
        if not self._is_active:
            return [list(values)]
        rows = self._gather(values, dtype, len(self.ranks), self._all_ranks_group())
        return rows if self.members == 1 else [rows[i] for i in self._order]

    def all_gather_peers(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """The same among the peers, by replica."""
        return self._gather(values, dtype, self.size, self._peers_group()) if self.size > 1 else [list(values)]

    def all_gather_members(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[list[Any]]:
        """The same among the members of this replica, in the order of their ranks."""
        return self._gather(values, dtype, self.members, self.members_group()) if self.members > 1 else [list(values)]

    def all_gather_object(self, value: object) -> list[Any]:
        """Every rank's picklable ``value``, replica by replica. Slow: for error messages and rare cases. Collective."""
        if not self._is_active:
            return [value]
        values: list[Any] = [None] * len(self.ranks)
        self._complete(lambda: dist.all_gather_object(values, value, group=self._all_ranks_group()))
        return [values[i] for i in self._order]

    def all_reduce(self, buffer: Tensor, op: dist.ReduceOp.RedOpType, *, all_ranks: bool = False) -> dist.Work | None:
        """Start reducing ``buffer`` in place among the peers, or among ``all_ranks`` of the ensemble. Collective; wait
        on the result, if there is one, before reading the buffer."""
        if not self._is_active:
            return None
        group = self._all_ranks_group() if all_ranks else self._peers_group()
        return dist.all_reduce(buffer, op=op, group=group, async_op=True)

    def members_group(self) -> dist.ProcessGroup:
        """The process group of this replica's members. Collective among them the first time."""
        return _group_of(self.own_ranks)

    def _gather(
        self, values: Sequence[float], dtype: torch.dtype, size: int, group: dist.ProcessGroup
    ) -> list[list[Any]]:
        mine = torch.tensor(values, dtype=dtype, device=self._device())
        theirs = [torch.empty_like(mine) for _ in range(size)]
        self._complete(lambda: dist.all_gather(theirs, mine, group=group, async_op=True))
        return torch.stack(theirs).tolist()

    def broadcast(self, buffer: Tensor) -> None:
        """Write replica 0's ``buffer`` into that of its peers. Collective among the peers."""
        if self.size > 1:
            dist.broadcast(buffer, src=self.peers[0], group=self._peers_group())

    def _complete(self, begin: Callable[[], dist.Work | None]) -> None:
        """Begin a collective and wait for its end. After some seconds look where the others are."""
        try:
            work = begin()
            if work is None:
                return
            backend = str(dist.get_backend_config(self._all_ranks_group()))
            if "gloo" in backend or "nccl" in backend:
                self._watch(work, "gloo" in backend)
            work.wait()
        except HdetError:
            raise
        except RuntimeError as error:
            self._notes.leave("failed", self.doing)
            self._fail(self._notes.ask(self.doing), error)

    def _watch(self, work: dist.Work, can_time_out: bool) -> None:
        waited, before, has_warned = PATIENCE, "", False
        if _ends_within(work, PATIENCE, can_time_out):
            return
        self._notes.leave("waits", self.doing)
        every = self._notes.every
        while not _ends_within(work, every, can_time_out):
            waited += every
            if (obstacles := self._notes.obstacles(self.doing)) and obstacles == before:
                self._fail(obstacles)
            before = obstacles
            if waited >= WARNS_AFTER and not has_warned:
                has_warned = True
                logger.warning(
                    f"{self._own_name()} has waited {waited:.0f} s in {self.doing} for the others. If one of them does "
                    "not make this call, all wait until the process group's timeout."
                )
        self._notes.clear()

    def _fail(self, obstacles: str, error: Exception | None = None) -> None:
        self._notes.leave("failed", self.doing)
        where = f"{self._own_name()} is in {self.doing}"
        if obstacles:
            raise ReplicaMismatchError(
                f"The replicas do not make the same calls: {where}; {obstacles}. Every rank must build its schedulers "
                "at the same steps, call step() equally often, and call converge() at the same steps."
            ) from error
        raise HdetError(
            f"{where}, and the message of another rank did not come: it has ended, or is in another collective, such "
            f"as a backward pass under DistributedDataParallel. Look at the other ranks' output. ({error})"
        ) from error

    @property
    def _notes(self) -> Notes:
        if self._known_notes is None:
            me = dist.get_rank()
            self._known_notes = Notes(_store(), self.ranks, me, lambda rank: self.name_of(self.ranks.index(rank)))
        return self._known_notes

    def _own_name(self) -> str:
        return self.name_of(self.rank * self.members + self.member)

    def _all_ranks_group(self) -> dist.ProcessGroup:
        if self.members == 1:
            assert self._group is not None
            return self._group
        return _group_of(self.ranks)

    def _peers_group(self) -> dist.ProcessGroup:
        if self._group is None:
            self._group = _group_of(self.peers)
        return self._group

    @cached_property
    def _device_types(self) -> list[str]:
        # e.g. {"cpu": "gloo", "cuda": "nccl"}; "cpu:gloo,cuda:nccl" configures both.
        config = str(dist.get_backend_config(self._all_ranks_group()))
        return [part.split(":")[0] for part in config.split(",")]

    def _device(self) -> torch.device:
        """The device of small messages: the CPU if the backend supports it, which saves a device synchronisation."""
        types = self._device_types
        if "cpu" in types:
            return torch.device("cpu")
        return torch.device(types[0], torch.accelerator.current_device_index())


def forget_groups() -> None:
    """Drop the process groups made here, before they are destroyed: a group that is still referred to is freed at the
    interpreter's end."""
    _groups.clear()
    _groups_world[0] = None


def check_replicas(name: str, value: Any) -> ReplicasLike:
    """``value``, if its type is one that :class:`Replicas` takes."""
    if isinstance(value, bool) or not isinstance(value, (dist.ProcessGroup, DeviceMesh, numbers.Integral, type(None))):
        raise TypeError(
            f"Invalid {name}={shown(value)}. {name}= takes a number of replicas, a torch.distributed ProcessGroup, a "
            f"1-D DeviceMesh or None, got {type(value).__name__}."
        )
    return int(value) if isinstance(value, numbers.Integral) else value


class GradientScope:
    """State of the hook :func:`average_gradients`: over which ranks it averages.

    Args:
        group: of the DDP module.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.replicas: Replicas | None = None
        """If set, gradients are averaged over the members of this replica, not over ``group``."""


def average_gradients(scope: GradientScope, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of ``DistributedDataParallel``."""
    group = scope.group if scope.replicas is None else scope.replicas.members_group()
    buffer = bucket.buffer().div_(group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# DDP compares the annotations with the classes themselves, not with their names.
average_gradients.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The ranks in a process group."""
    return tuple(dist.get_process_group_ranks(group))


def _ends_within(work: dist.Work, seconds: float, can_time_out: bool) -> bool:
    """Whether a collective ends in that time.

    Raises:
        RuntimeError: if it fails.
    """
    if can_time_out:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if work.is_completed():
                raise
            return False
        return True
    started = time.monotonic()
    while not work.is_completed():
        waited = time.monotonic() - started
        if waited > seconds:
            return False
        time.sleep(min(0.01, waited / 10))
    return True


def _store() -> Any:
    """The process group's store; ``None`` where it keeps nothing."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set("hdet/store", "1")
        return store if store.check(["hdet/store"]) and store.get("hdet/store") == b"1" else None
    except (AttributeError, RuntimeError, ValueError):
        return None


def _not_a_member() -> str:
    return (
        f"Rank {dist.get_rank()} is not a member of the group passed as replicas=. Every rank must pass the group that "
        "it belongs to."
    )


def _rank_table(group: ReplicasLike, world: int) -> Tensor:
    """The ranks, [replica, member]."""
    if group is None:
        return torch.arange(world).view(world, 1)
    if isinstance(group, int):
        return torch.arange(world).view(group, -1)
    if isinstance(group, dist.ProcessGroup):
        # A rank can look up the ranks of a group only if it is a member.
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
    """The process group of these ranks, made once. Collective among them alone, the first time."""
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    if _groups_world[0] is not world:
        _groups.clear()
        _groups_world[0] = world
    key = tuple(sorted(ranks))
    if key not in _groups:
        _groups[key] = dist.new_group(list(key), use_local_synchronization=True)
    return _groups[key]
