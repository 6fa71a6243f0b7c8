"""DeepSpeed: replicas as groups of data-parallel ranks, averaged where the engine keeps its weights.

::

    groups = ReplicaGroups(2)                                       # 2 replicas; the ranks of one share a learning rate
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=groups)
    scheduler = attach(engine, hdet.OneCycleLR, max_lr=9e-4, total_steps=S, spread=1 / 9)
    engine.backward(loss); engine.step(lr_kwargs={"loss": loss})    # the engine steps the scheduler

Within a replica everything is DeepSpeed's own: gradients, shards, precision. Between replicas nothing is shared until
they converge (Local SGD), when their fp32 masters are averaged, each rank with its counterparts in the other replicas.
``docs/guides/deepspeed.md`` has the whole of it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

try:
    import deepspeed
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "hdet.integrations.deepspeed needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    ) from error
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hdet
from hdet import files
from hdet.converge.buckets import fill_buckets
from hdet.integrations.deepspeed_weights import weights_of
from hdet.model.weights import register_weights
from hdet.replicas.topology import Replicas

Scheduler = TypeVar("Scheduler")

_EQUALISE_BYTES = 32 * 2**20


class ReplicaGroups:
    """Which ranks make up which replica; pass it to ``deepspeed.initialize`` as ``mpu=``.

    Ranks that follow one another form a replica: with ``replicas=2`` on 4 ranks, 0 and 1 are replica 0, 2 and 3 are
    replica 1. To DeepSpeed a replica is the whole data-parallel world: it reduces gradients, cuts ZeRO's shards and
    counts ``train_batch_size`` inside it. Collective.

    Args:
        replicas: number of replicas, a divisor of the number of ranks.

    Attributes:
        mesh: the 2-D ``DeviceMesh`` with the dimensions ``"replicate"`` and ``"shard"``.

    Raises:
        ValueError: if the ranks cannot be shared out evenly.
    """

    def __init__(self, replicas: int) -> None:
        deepspeed.init_distributed(verbose=False)
        ranks = dist.get_world_size()
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1 or ranks % replicas:
            raise ValueError(
                f"Invalid replicas={replicas!r}. Must be a divisor of the number of ranks, {ranks}: every replica has "
                "as many as every other."
            )
        device = get_accelerator().device_name()
        self.mesh = init_device_mesh(device, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
        # DeepSpeed reduces overflow flags and norms over the model-parallel group, which here is each rank alone.
        self._alone = init_device_mesh(device, (ranks, 1), mesh_dim_names=("rank", "model"))["model"].get_group()

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.mesh["replicate"].get_local_rank()

    @property
    def member(self) -> int:
        """This rank's position in its replica."""
        return self.mesh["shard"].get_local_rank()

    # What DeepSpeed asks of an ``mpu``.

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of this replica."""
        return self.mesh["shard"].get_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return self.mesh.mesh[self.replica].tolist()

    def get_data_parallel_world_size(self) -> int:
        """Ranks per replica."""
        return self.mesh.size(1)

    def get_data_parallel_rank(self) -> int:
        """:attr:`member`."""
        return self.member

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone: there is no model parallelism."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0


def attach(engine: Any, scheduler: Callable[..., Scheduler], *args: Any, **settings: Any) -> Scheduler:
    """Build an hdet scheduler on a DeepSpeed engine, and make it the engine's: ``engine.step()`` steps it. Collective.

    Replica 0's weights become everybody's: DeepSpeed makes only the ranks of one replica equal.

    Args:
        engine: from ``deepspeed.initialize``: with ``mpu=ReplicaGroups(...)``, or without ``mpu`` at ZeRO stage 0,
            where every rank is a replica and gradients are shared by all.
        scheduler: :class:`hdet.OneCycleLR` or :class:`hdet.Ensemble`; as a baseline, torch's own.
        args, settings: its arguments after the optimizer, but for ``model`` and ``replicas``, which are the engine's.

    Returns:
        The scheduler. Pass it the loss by ``engine.step(lr_kwargs={"loss": loss})``.

    Raises:
        ValueError: for ZeRO shards over all ranks whose settings are to differ, an ``mpu`` other than
            :class:`ReplicaGroups`, a second scheduler, ``max_lr="auto"``, or a feature of DeepSpeed whose weights hdet
            cannot average.
    """
    _check(engine, args, settings)
    groups = engine.mpu
    if _has_replicas(settings):
        if groups is not None:
            settings["replicas"] = groups.mesh["replicate"]
        settings |= {"model": engine.module, "gradients": "shared" if groups is None else "local"}
        averaging = settings.get("averaging", hdet.Averaging())
        if groups is not None and averaging.optimizer_state == "auto":
            settings["averaging"] = replace(averaging, optimizer_state="keep")
        weights = weights_of(engine)
        register_weights(engine.module, weights)
        if groups is not None:  # DeepSpeed makes parameters equal inside a replica, and not buffers
            _equalise(engine.module.buffers(), Replicas(groups.get_data_parallel_group()))
        _equalise((tensor for tensor, _ in weights.tensors()), Replicas(settings.get("replicas")))
        weights.written()
    built = scheduler(engine.basic_optimizer, *args, **settings)
    engine.lr_scheduler = built
    _count_skipped_steps(engine, built)
    return built


def _has_replicas(settings: dict[str, Any]) -> bool:
    """Whether they ask for replicas that part and are averaged, and not for a schedule alone."""
    differs = settings.get("spread", 0) > 0 or bool(settings.get("hyperparameters"))
    return differs or not settings.get("outer", hdet.Outer()).is_plain or settings.get("gradients") == "local"


def _check(engine: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
    if not isinstance(engine, deepspeed.DeepSpeedEngine) or isinstance(engine, deepspeed.PipelineEngine):
        raise ValueError(f"attach() takes the engine that deepspeed.initialize returned, got {type(engine).__name__}.")
    for name in ("model", "replicas"):
        if name in settings:
            raise ValueError(f"Do not pass {name}=: attach() takes it from the engine.")
    if "auto" in (settings.get("max_lr"), *args[:1]):
        raise ValueError(
            'max_lr="auto" steps the optimizer itself, which with DeepSpeed only the engine may. Run hdet.find_lr on '
            "the bare model before deepspeed.initialize, and pass what it finds."
        )
    has = "local" if engine.mpu is not None else "shared"
    if settings.get("gradients", has) != has:
        raise ValueError(
            f"Invalid gradients={settings['gradients']!r}. Under DeepSpeed they are {has!r} here: with ReplicaGroups "
            "they are averaged inside a replica only, and without, at ZeRO stage 0, over all ranks."
        )
    optimizer_state = settings.get("averaging", hdet.Averaging()).optimizer_state
    if engine.mpu is not None and optimizer_state not in ("auto", "keep"):
        raise ValueError(
            f"Invalid {optimizer_state=}. With ReplicaGroups each replica keeps its own "
            "('auto' is 'keep'): ZeRO's last shard ends in memory that nobody has written, and must not be averaged."
        )
    if settings.get("virtual_replicas", 1) != 1:
        raise ValueError("virtual_replicas= is not supported under DeepSpeed: it steps the optimizer itself.")
    if engine.lr_scheduler is not None:
        raise ValueError(
            f"The engine has a scheduler already, {type(engine.lr_scheduler).__name__}. Leave out lr_scheduler= and "
            '"scheduler" in the config.'
        )
    if engine.mpu is not None and not isinstance(engine.mpu, ReplicaGroups):
        raise ValueError(
            f"The engine's mpu is a {type(engine.mpu).__name__}: model parallelism under DeepSpeed is not supported. "
            "Pass mpu=ReplicaGroups(replicas) to deepspeed.initialize."
        )
    if engine.mpu is None and engine.dp_world_size != dist.get_world_size():
        raise ValueError(
            f"The engine was made without mpu=, and has {engine.dp_world_size} of {dist.get_world_size()} ranks: "
            "DeepSpeed goes on with the groups of an engine before. Set deepspeed.utils.groups.mpu = None between them."
        )
    stage = engine.zero_optimization_stage()
    if stage == 3 and settings.get("per_group") and settings.get("probe") is not None:
        raise ValueError(
            "per_group=True with a probe is not supported at ZeRO stage 3, whose parameter groups are empty "
            "between steps: the probe could not tell them apart. Use per_group=False, or ZeRO stage 1 or 2."
        )
    if engine.mpu is None and stage > 0 and _has_replicas(settings):
        raise ValueError(
            f"ZeRO stage {stage} cuts one model into shards over all {dist.get_world_size()} ranks, so that a learning "
            "rate (or any other setting) per rank would be one per slice of the model, not one per replica. Make "
            "replicas of several ranks: deepspeed.initialize(..., mpu=ReplicaGroups(replicas))."
        )


def _count_skipped_steps(engine: Any, scheduler: Any) -> None:
    """Step the scheduler also when the engine skips an update, because its gradients were not finite. The engine itself
    would not, on the ranks of that replica only: the replicas would never again be at the same step."""
    step = engine.step

    def counted(lr_kwargs: dict[str, Any] | None = None) -> Any:
        boundary = engine.is_gradient_accumulation_boundary()
        result = step(lr_kwargs)
        if boundary and not engine.was_step_applied():
            scheduler.step(**(lr_kwargs or {}))
        return result

    engine.step = counted


@torch.no_grad()
def _equalise(tensors: Iterable[Tensor], replicas: Replicas) -> None:
    """Make the tensors what they are on the group's first rank. Collective."""
    for bucket in fill_buckets(tensors, _EQUALISE_BYTES, replicas.device_for) if replicas.size > 1 else ():
        wire = bucket.pack()
        if replicas.rank:
            wire.zero_()
        work = replicas.all_reduce(wire, dist.ReduceOp.SUM)
        if work is not None:
            work.wait()
        bucket.write(wire)


def save_checkpoint(
    engine: Any, directory: str | os.PathLike[str], tag: str | None = None, client_state: dict[str, Any] | None = None
) -> None:
    """Converge, then ``engine.save_checkpoint`` for every replica in a directory of its own. Collective.

    DeepSpeed names files by the rank within a replica, so that all replicas would write the same ones. Their weights
    are equal, their optimizer states are not: each is kept, in ``directory/replica0`` and so on. ``directory/latest``
    names the newest checkpoint, and is replaced at once when that is complete.

    Args:
        engine: with a scheduler from :func:`attach`.
        directory: on a file system that all ranks share.
        tag: default ``global_step`` and the number of steps.
        client_state: more to be saved, as in DeepSpeed.
    """
    scheduler = engine.lr_scheduler
    if isinstance(scheduler, (hdet.OneCycleLR, hdet.Ensemble)):
        scheduler.converge()
    tag = tag or f"global_step{engine.global_steps}"
    own = _own_directory(engine, Path(directory))
    own.mkdir(parents=True, exist_ok=True)
    folder = own / tag
    folder.mkdir(exist_ok=True)
    # DeepSpeed would save the scheduler of one rank; a probe's slow averages are sharded like the weights.
    torch.save(scheduler.state_dict(), folder / _scheduler_file(engine))
    engine.save_checkpoint(str(own), tag, client_state=client_state or {}, save_latest=False)  # ends with a barrier
    if dist.get_rank() == 0:
        files.write_at_once(Path(directory) / "latest", lambda file: file.write(tag.encode()))
    deepspeed.comm.barrier()  # else another rank might look for it too early


def load_checkpoint(
    engine: Any, directory: str | os.PathLike[str], tag: str | None = None, *, weights_only: bool = True, **options: Any
) -> dict[str, Any] | None:
    """Read :func:`save_checkpoint`'s files into a new engine with its scheduler. Collective.

    DeepSpeed reads its files with pickle. Here they are read as plain values, tensors and four classes of DeepSpeed's
    that are no more than values: nothing else is imported or called.

    With more replicas than were saved, the others begin with the optimizer state of the first ones; the number of ranks
    per replica must be the same from ZeRO 1 on.

    Args:
        engine: just made, with a scheduler from :func:`attach`.
        directory, tag: as saved; default the newest.
        weights_only: ``False`` for a ``client_state`` of other objects, in files whose every writer is trusted: to load
            them may run any code.
        options: passed to ``engine.load_checkpoint``.

    Returns:
        The ``client_state``; ``None``, with nothing changed, if there is no checkpoint yet.

    Raises:
        ValueError: if a file holds something else than plain values, or ``latest`` no tag.
        FileNotFoundError: if there is no checkpoint ``tag``.
    """
    if tag is None:
        latest = Path(directory) / "latest"
        if not latest.exists():
            return None
        tag = files.read_text(latest).strip()
        if tag in ("", ".", "..") or Path(tag).name != tag:
            raise ValueError(f"{latest} holds {tag[:100]!r}, which is no tag. Pass tag=, the name of a saved folder.")
    own = _own_directory(engine, Path(directory), tag)
    ours = options.pop("load_lr_scheduler_states", True) and not options.get("load_module_only", False)
    # DeepSpeed would load one rank's scheduler on all.
    try:
        with _plain_values() if weights_only else contextlib.nullcontext():
            _, client_state = engine.load_checkpoint(str(own), tag, load_lr_scheduler_states=False, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{own / tag} holds something else than plain values, whose loading may run any code. Pass "
            f"weights_only=False if you trust whoever wrote it. ({str(error)[:300]})"
        ) from error
    client_state.pop("lr_scheduler", None)
    if ours:
        state = torch.load(own / tag / _scheduler_file(engine), map_location="cpu", weights_only=True)
        engine.lr_scheduler.load_state_dict(state)
    return client_state


@contextlib.contextmanager
def _plain_values() -> Iterator[None]:
    """``torch.load`` reads with ``weights_only=True``, whatever its caller passes, what DeepSpeed has in its files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = (collections.OrderedDict, collections.defaultdict, dict, set)
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, *plain]
        with torch.serialization.safe_globals(known):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _own_directory(engine: Any, directory: Path, tag: str | None = None) -> Path:
    # Without groups gradients are shared, and so is the optimizer's state: one copy is enough.
    replica = 0 if engine.mpu is None else engine.mpu.replica
    if tag is not None and not (directory / f"replica{replica}" / tag).is_dir():
        saved = sum((path / tag).is_dir() for path in directory.glob("replica*"))
        if not saved:
            raise FileNotFoundError(f"{directory} has no checkpoint {tag!r} saved by save_checkpoint().")
        replica %= saved
    return directory / f"replica{replica}"


def _scheduler_file(engine: Any) -> str:
    return f"hdet_{dist.get_rank(engine.seq_data_parallel_group):05d}.pt"
