"""``train.strategy=fsdp``: replicas that are sharded with FSDP2, on a (replicate x shard) mesh of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from hdet.replicas.topology import Replicas, ReplicasLike
from hdet.train.config import ConfigError
from hdet.train.ddp_strategy import DDPStrategy


class FSDPStrategy(DDPStrategy):
    """``fully_shard`` over the processes of a replica, block by block; gradients shared over the replicas (HSDP) unless
    hdet keeps them inside. With ``train.dtype=bfloat16`` parameters are gathered and multiplied in bfloat16; the shards
    and the gradients' sums stay float32."""

    def _replicas_argument(self) -> ReplicasLike:
        count, world = self._config.train.replicas, self._process.world_size
        if world == 1 or count is None:
            raise ConfigError(
                "train.strategy=fsdp cuts each replica into shards: start several processes with torchrun, and pass "
                f"--train.replicas N, a divisor of their number (now {world})."
            )
        if self._config.train.compile:
            raise ConfigError("train.compile=true does not go with train.strategy=fsdp.")
        shape = (count, world // count)
        self._mesh = init_device_mesh(self._process.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return self._mesh["replicate"]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard the model, in place."""
        options: dict[str, Any] = {"mesh": self._mesh}
        if self._config.train.dtype == "bfloat16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in getattr(model, "blocks", ()):
            fully_shard(block, **options)
        fully_shard(model, **options)
        return model

    @contextlib.contextmanager
    def synchronised(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are reduced in the last micro-batch's backward pass, not in those before it."""
        assert isinstance(wrapped, FSDPModule)
        wrapped.set_requires_gradient_sync(last)
        yield

    def state(self, model: nn.Module, optimizer: Optimizer, scheduler: dict[str, Any]) -> dict[str, Any]:
        """The whole state on the writer: another number of shards may load model and optimizer. Collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        # hdet's averages are sharded like the parameters: one state for each member of a replica.
        schedulers = Replicas(self.replicas_argument).all_gather_object(scheduler)
        return {**whole, "scheduler": self.replicas.by_replica(schedulers)[0]} if self._process.writer else {}

    def check(self, path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Raise :class:`ConfigError` if a checkpoint holds another number of shards, or another model."""
        shards = state["scheduler"]
        if not isinstance(shards, list) or len(shards) != self.replicas.members:
            raise ConfigError(f"{path} is not of a run with {self.replicas.members} processes to a replica.")
        ours, theirs = model.state_dict(), state["model"]
        for name in (*ours, *theirs):
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                raise ConfigError(f"{path}: the model's {name!r} is not that of this run.")

    def load(self, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore :meth:`state` but for the scheduler's, which is returned. Collective."""
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
        return state["scheduler"][self.replicas.member]
