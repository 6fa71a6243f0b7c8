"""``train.strategy=ddp``: every process holds the whole model; and what the other strategies share with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hdet.replicas.topology import Replicas, ReplicasLike
from hdet.train import checkpoint
from hdet.train.config import Config, ConfigError
from hdet.train.processes import Process


class DDPStrategy:
    """``DistributedDataParallel``, where there is more than one process.

    Args:
        config: the run.
        process: this process of it; the process group is there already.

    Raises:
        ConfigError: on every rank, if the processes cannot be divided into ``train.replicas``.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self._config, self._process = config, process
        count = config.train.replicas
        if count is not None and process.world_size % count:
            raise ConfigError(
                f"Invalid train.replicas={count}. Must be a divisor of the number of processes, {process.world_size}."
            )
        self.replicas_argument: ReplicasLike = self._replicas_argument()
        """What hdet gets as ``replicas=``."""
        self.replicas = Replicas(self.replicas_argument)
        """The replicas as this rank sees them."""

    def _replicas_argument(self) -> ReplicasLike:
        return self._config.train.replicas

    def wrap(self, model: nn.Module) -> nn.Module:
        """What trains instead of the model."""
        if self._process.world_size == 1:
            return model
        devices = [self._process.device] if self._process.device.type == "cuda" else None
        # These models have no buffers. One with batch norm needs broadcast_buffers=False, or rank 0's statistics
        # would overwrite those of all others at each forward.
        return DistributedDataParallel(model, device_ids=devices)

    @contextlib.contextmanager
    def synchronised(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are averaged in the last micro-batch's backward pass, not in those before it."""
        if last or not isinstance(wrapped, DistributedDataParallel):
            yield
        else:
            with wrapped.no_sync():
                yield

    def state(self, model: nn.Module, optimizer: Optimizer, scheduler: dict[str, Any]) -> dict[str, Any]:
        """The whole state, where it will be written; elsewhere it may be less. Collective."""
        if not self._process.writer:
            return {}
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler}

    def check(self, path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Raise :class:`ConfigError` if the tensors of a checkpoint are not those of model and optimizer."""
        checkpoint.check_fits(path, state, model, optimizer)

    def load(self, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore :meth:`state` but for the scheduler's, which is returned. Collective."""
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["scheduler"]
