"""Going on from a checkpoint: found by all processes, and put into the run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hdet.replicas.topology import Replicas
from hdet.train import checkpoint
from hdet.train.config import Config, ConfigError
from hdet.train.ddp_strategy import DDPStrategy
from hdet.train.optimization import Schedule


def read(config: Config, path: Path, settings: dict[str, Any], processes: Replicas) -> dict[str, Any] | None:
    """The checkpoint to go on from. Collective: all processes must have found the same one, or none.

    Raises:
        ConfigError: if they have not, or if it does not fit ``settings``.
    """
    saved = None
    needed: tuple[str, ...] = ("step", "config", "max_lr")
    if config.train.strategy != "deepspeed":
        needed += ("model", "optimizer", "scheduler")
    if config.train.resume and os.path.lexists(path):
        saved = checkpoint.load(path, settings, needed)
    found = processes.all_gather([float(saved["step"]) if saved else -1.0])
    steps = [int(row[0]) for row in found]
    if len(set(steps)) > 1:
        told = ", ".join(f"rank {r}: {'none' if s < 0 else f'step {s}'}" for r, s in enumerate(steps[:8]))
        raise ConfigError(
            f"The processes do not find the same checkpoint under {path} ({told}). train.log_dir must "
            "be on a file system that all of them share."
        )
    return saved


def load(
    path: Path,
    saved: dict[str, Any],
    strategy: DDPStrategy,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
) -> None:
    """Put a checkpoint into model, optimizer and schedule. Collective.

    Raises:
        ConfigError: naming the file, if it does not fit.
    """
    strategy.check(path, saved, model, optimizer)
    try:
        schedule.load_state_dict(strategy.load(saved, model, optimizer))
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(f"The files beside {path} hold more than values: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not fit this run: {type(error).__name__}: {error}") from error
