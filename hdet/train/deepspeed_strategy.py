"""``train.strategy=deepspeed``: the model under a DeepSpeed engine, replicas as groups of processes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet import files
from hdet.files import plain
from hdet.replicas.topology import ReplicasLike
from hdet.train import checkpoint
from hdet.train.config import Config, ConfigError
from hdet.train.ddp_strategy import DDPStrategy
from hdet.train.log import writing
from hdet.train.processes import Process

_SECTIONS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "dump_state",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""Of DeepSpeed's settings, what a run may set beside its own."""


class DeepSpeedStrategy(DDPStrategy):
    """Makes the engine, steps it, and saves it.

    Precision, accumulation, clipping and batch size come from the run's configuration; the JSON has the rest.

    Args:
        config: the run.
        process: this process of it; the process group is there already.

    Raises:
        ConfigError: on every rank, if DeepSpeed is missing or the configurations do not fit together.
    """

    def __init__(self, config: Config, process: Process) -> None:
        try:
            import deepspeed

            from hdet.integrations import deepspeed as integration
        except ModuleNotFoundError as error:
            raise ConfigError(f"train.strategy=deepspeed: {error}") from error
        if process.device.type == "cpu":
            # Shared memory would speed up CPU collectives a little, for a C++ build of a minute at the first start.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._deepspeed, self._integration = deepspeed, integration
        self._settings = _read(config)
        self._groups: Any = None
        super().__init__(config, process)
        self._directory = Path(config.train.log_dir) / "deepspeed"

    def _replicas_argument(self) -> ReplicasLike:
        stage = self._settings.get("zero_optimization", {}).get("stage", 0)
        count, world = self._config.train.replicas, self._process.world_size
        if self._config.hdet.is_baseline:
            return None  # the baseline: all processes share their gradients
        if count is None and stage and world > 1:
            raise ConfigError(
                f"ZeRO stage {stage} cuts each replica's model into shards, and with one replica per process there is "
                f"nothing to cut: pass --train.replicas N, a divisor of the {world} processes."
            )
        if count is None:
            return None
        self._groups = self._integration.ReplicaGroups(count)
        return self._groups.mesh["replicate"]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself: :meth:`start` needs the optimizer too."""
        return model

    def start(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Put model and optimizer under an engine; returns what to call instead of the model. Collective."""
        self._deepspeed.utils.groups.mpu = None  # DeepSpeed would go on with that of an engine before
        self.engine, *_ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._settings, mpu=self._groups
        )
        return self.engine

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose learning rates count."""
        return self.engine.basic_optimizer

    @property
    def build_scheduler(self) -> Callable[..., Any]:
        """``build_scheduler(class, *args, **settings)``: on the engine."""
        return partial(self._integration.attach, self.engine)

    def train_step(self, losses: Sequence[Callable[[], Tensor]], hears_losses: bool) -> Tensor:
        """One optimizer step, with the scheduler's after it.

        Args:
            losses: of the micro-batches; each does a forward pass.
            hears_losses: whether the scheduler's ``step`` takes a loss.

        Returns:
            This rank's mean loss.
        """
        total = torch.zeros((), device=self.engine.device)
        for loss_of in losses:
            loss = loss_of()
            self.engine.backward(loss)
            total += loss.detach() / len(losses)
            self.engine.step(lr_kwargs={"loss": total.clone()} if hears_losses else None)
        return total

    def state(self, model: nn.Module, optimizer: Optimizer, scheduler: dict[str, Any]) -> dict[str, Any]:
        """Nothing: it is too large, and too much of it depends on the rank; DeepSpeed writes it beside. Collective.

        Raises:
            ConfigError: if it cannot be written, or through a link only.
        """
        with writing(self._directory):
            files.check_tree(self._directory)
            self._integration.save_checkpoint(self.engine, self._directory, f"step{self.engine.global_steps}")
        return {}

    def forget(self, step: int) -> None:
        """Remove the checkpoints that are not ``step``'s, once ``checkpoint.pt`` names that one."""
        if self._process.writer:
            for path in self._directory.glob("replica*/step*"):
                if path.name != f"step{step}":
                    shutil.rmtree(path)

    def check(self, path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Nothing: DeepSpeed's own files are checked when they are loaded."""

    def load(self, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore what :meth:`state` wrote; returns the scheduler's state. Collective.

        Its files are verified, and read as plain values.
        """
        for path in sorted(self._directory.glob(f"replica*/step{state['step']}/*")):
            checkpoint.verify(path)
        self._integration.load_checkpoint(self.engine, self._directory, f"step{state['step']}")
        return self.engine.lr_scheduler.state_dict()


def _read(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings, with those of the run in them."""
    path = config.train.deepspeed_config
    if path is None:
        raise ConfigError(
            "train.strategy=deepspeed needs train.deepspeed_config, such as configs/deepspeed_zero1.json."
        )
    try:
        settings = files.read_json(path)
        plain.check_plain_keys(settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Invalid train.deepspeed_config={path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"Invalid train.deepspeed_config={path}. Must hold a JSON object.")
    if config.train.compile:
        raise ConfigError("train.compile=true does not go with train.strategy=deepspeed.")
    ours = {
        "train_micro_batch_size_per_gpu": (config.train.batch_size, "train.batch_size"),
        "gradient_accumulation_steps": (config.train.accumulate, "train.accumulate"),
        "gradient_clipping": (config.optimizer.grad_clip, "optimizer.grad_clip"),
        "bf16": ({"enabled": config.train.dtype == "bfloat16"}, "train.dtype"),
    }
    for key, (value, name) in ours.items():
        if settings.get(key, value) != value:
            raise ConfigError(f"{path} has {key}={settings[key]}, and the run {value}: leave it to {name}.")
        settings[key] = value
    for key, name in {"optimizer": "the section optimizer", "scheduler": "the sections schedule and hdet"}.items():
        if key in settings:
            raise ConfigError(f"{path} has {key!r}: leave it to {name} of the run.")
    for key in settings:
        if key not in _SECTIONS and key not in ours and key not in ("optimizer", "scheduler", "fp16"):
            raise ConfigError(
                f"{path} has {key!r}. Must be among {', '.join(_SECTIONS)}: what else DeepSpeed knows imports modules "
                "by name, writes files elsewhere, or does not go with hdet."
            )
    if "fp16" in settings:
        raise ConfigError(f'{path} has "fp16": the run knows train.dtype=float32 and bfloat16.')
    return settings
