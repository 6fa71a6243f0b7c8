"""The configuration of a run: one frozen dataclass per section, read from YAML and the command line.

Unknown keys, wrong types and values out of range are errors that name the key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hdet.steer.posterior import Posterior
from hdet.steer.published import Published
from hdet.train.shared import SHARED as SHARED
from hdet.train.shared import Shared

EXPLORED = ("weight_decay", "momentum", "dropout", "label_smoothing")
"""What ``hdet.hyperparameters`` may name."""


class ConfigError(ValueError):
    """The run cannot start, or go on, as configured. The message is for the user: it names the setting or the file."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned, and from what."""

    name: Literal["char_lm", "digits", "tokens", "text"] = "char_lm"
    """``char_lm``: the next byte of the Python standard library's source; ``digits``: scikit-learn's 8x8 images of
    digits; ``tokens``: the next token of a file of uint16 tokens (nanoGPT's ``train.bin``); ``text``: the next byte of
    any file."""
    path: str | None = None
    """The training file of ``tokens`` and ``text``. Without it, ``tokens`` reads the standard library's source, byte by
    byte, as tokens: to try a config on any machine."""
    val_path: str | None = None
    """The validation file of ``tokens`` and ``text``. Without it, validation uses the end of ``path``."""
    val_fraction: float = 0.05
    """Share of the data that is held out where there is no ``val_path``, in (0, 1). ``digits`` always holds out 360 of
    1797 images."""
    probe_fraction: float = 0.05
    """Share of the training data, its end, that ``hdet.probe=held_out`` keeps for the probe, in (0, 1)."""
    vocab_size: int = 50257
    """Number of different tokens in ``tokens``, at most 65536; default: GPT-2's. ``char_lm`` and ``text`` have 256."""

    def __post_init__(self) -> None:
        _require("task.val_fraction", self.val_fraction, 0 < self.val_fraction < 1, "in (0, 1)")
        _require("task.probe_fraction", self.probe_fraction, 0 < self.probe_fraction < 1, "in (0, 1)")
        _require("task.vocab_size", self.vocab_size, 1 < self.vocab_size <= 65536, "in [2, 65536]: tokens are uint16")
        if self.name == "text" and not self.path:
            raise ConfigError("task.name=text needs a file: pass --task.path FILE.")
        if self.name in ("char_lm", "digits") and (self.path or self.val_path):
            raise ConfigError(
                f"Invalid task.path={self.path or self.val_path!r}: task.name={self.name} reads no file. "
                "Use task.name=text (bytes) or task.name=tokens (uint16)."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The GPT; or, for ``task.name=digits``, the convolutional net."""

    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; must divide ``n_embd``."""
    n_embd: int = 128
    """Width."""
    block_size: int = 128
    """Context length in tokens."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2."""
    tie_weights: bool = True
    """Whether the output layer is the token embedding, as in GPT-2."""
    channels: int = 32
    """Width of the first layer of the net for ``digits``; the GPT does not use it."""
    dropout: float = 0.0
    """Dropout probability, in [0, 1)."""

    def __post_init__(self) -> None:
        for name, most in (
            ("n_layer", 2**12),
            ("n_head", 2**16),
            ("n_embd", 2**16),
            ("block_size", 2**20),
            ("channels", 2**14),
        ):
            value = getattr(self, name)
            _require(f"model.{name}", value, 1 <= value <= most, f"in [1, {most}]")
        _require("model.n_head", self.n_head, self.n_embd % self.n_head == 0, f"a divisor of n_embd={self.n_embd}")
        _require("model.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move. Matrices get weight decay; biases, norms and other vectors do not."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer."""
    max_lr: float | Literal["auto"] = 1e-3
    """Peak of the schedule, > 0; with ``hdet.auto_lr`` the controller's starting point. ``auto``: what ``hdet.find_lr``
    suggests, which tries learning rates for a few dozen steps each before the run starts; up to twice the best
    of them where ``hdet.controller=posterior`` moves it on."""
    weight_decay: float = 0.1
    """Weight decay of the matrices, >= 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging constants, each in [0, 1)."""
    momentum: float = 0.9
    """SGD's momentum, in [0, 1)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of the training loss that asks for all answers alike, in [0, 1). Validation and probe have none of it."""

    def __post_init__(self) -> None:
        known = isinstance(self.max_lr, str) or 0 < self.max_lr < math.inf
        _require("optimizer.max_lr", self.max_lr, known, "finite and > 0, or auto")
        _require("optimizer.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "finite and >= 0")
        _require("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require("optimizer.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _require("optimizer.grad_clip", self.grad_clip, 0 <= self.grad_clip < math.inf, "finite and >= 0")
        _require("optimizer.label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")

    @property
    def known_max_lr(self) -> float:
        """``max_lr``, which must have been found by now."""
        assert not isinstance(self.max_lr, str)
        return self.max_lr


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The base schedule over ``train.total_steps``. The fields from ``pct_start`` on are torch's OneCycleLR's."""

    name: str = "one_cycle"
    """``one_cycle``, or a function of ``hdet.schedules``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function; ``total_steps`` is filled in."""
    pct_start: float = 0.3
    """Share of the run in which the learning rate rises."""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """Shape of rise and fall."""
    div_factor: float = 25.0
    """``max_lr`` over the first learning rate."""
    final_div_factor: float = 1e4
    """The first learning rate over the last."""
    three_phase: bool = False
    """Whether the fall is as long as the rise, with a third phase down to the last learning rate."""
    cycle_momentum: bool = False
    """Whether momentum (AdamW's first beta) falls while the learning rate rises. torch's default is true; here the
    optimizer's own values stay in force unless this is set."""
    base_momentum: float = 0.85
    """Lowest momentum of ``cycle_momentum``."""
    max_momentum: float = 0.95
    """Highest momentum of ``cycle_momentum``."""

    def __post_init__(self) -> None:
        _require("schedule.pct_start", self.pct_start, 0 <= self.pct_start <= 1, "in [0, 1]")
        for name in ("div_factor", "final_div_factor"):
            value = getattr(self, name)
            _require(f"schedule.{name}", value, 1e-9 <= value <= 1e18, "in [1e-9, 1e18]")
        for name in ("base_momentum", "max_momentum"):
            _require(f"schedule.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class HdetConfig(Shared):
    """The ensemble. ``hdet.Settings`` documents each setting."""

    spread: float = 1 / 9
    """Replicas train under ``[1 - spread, 1 + spread]`` times the base learning rate, in [0, 1). 0, without
    ``hyperparameters``, is the baseline: the plain schedule and DistributedDataParallel; nothing else in this section
    has an effect then."""
    auto_lr: bool = True
    """Whether a controller moves the learning rate."""
    probe: bool | Literal["held_out"] = False
    """Whether the paired probe gives the controller ``posterior`` evidence beside how far the weights move:
    about 12 times in a run every replica evaluates one more training batch, with five forward passes. ``held_out``:
    batches of ``task.probe_fraction``."""
    controller: Literal["posterior", "published"] = "posterior"
    """What moves the learning rate. ``posterior``: by how far the weights move, and with a probe by its losses too; not
    with ``averaging.overlap_steps``. ``published``: the paper's, which goes by the training losses and needs long
    rounds."""
    hyperparameters: dict[str, float] = field(default_factory=dict)
    """What else the replicas differ in, by name, with its spread, and what the probe moves: ``weight_decay`` and
    ``momentum`` (AdamW's first beta), whose spread is that of a logarithm (0.5 is a good start); ``dropout`` and
    ``label_smoothing`` (0.1), which need ``gradients=local`` or ``grouped``. All but ``momentum`` need
    ``probe=held_out``."""
    posterior: Posterior = field(default_factory=Posterior)
    """The settings of ``controller=posterior``."""
    published: Published = field(default_factory=Published)
    """The settings of ``controller=published``."""
    virtual_replicas: bool = False
    """Whether each of the ``train.accumulate`` micro-batches of a step is a replica of its own, so that one process
    makes as many replicas."""
    rollback: bool | Literal["cpu"] = True
    """With ``auto_lr``, whether a round that blew up is undone; ``cpu`` keeps the copy that this takes in the CPU's
    memory. Not with ``averaging.overlap_steps``."""

    def __post_init__(self) -> None:
        for name in self.hyperparameters:
            _require("hdet.hyperparameters", name, name in EXPLORED, f"among {', '.join(EXPLORED)}")
        if self.is_baseline:
            return
        if self.probe and not self.auto_lr and not self.hyperparameters:
            raise ConfigError("hdet.probe=true has no use with hdet.auto_lr=false. Leave one of them out.")
        if self.probe and (steps := self.averaging.overlap_steps):
            raise ConfigError(
                f"hdet.probe=true and hdet.averaging.overlap_steps={steps} exclude one another: the probe needs the "
                "mean at the round's end. Leave one of them out."
            )
        if self.rollback == "cpu" and (not self.auto_lr or self.averaging.overlap_steps):
            raise ConfigError("hdet.rollback=cpu needs hdet.auto_lr=true and hdet.averaging.overlap_steps=0.")
        if self.controller == "posterior" and self.published != Published():
            raise ConfigError("hdet.published has no effect without hdet.controller=published: set that, too.")
        if self.controller == "published" and self.posterior != Posterior():
            raise ConfigError("hdet.posterior has no effect with hdet.controller=published. Leave one of them out.")
        if self.controller == "published" and self.probe and not self.hyperparameters:
            raise ConfigError("hdet.probe=true has no use with hdet.controller=published. Leave one of them out.")
        if self.auto_lr and self.spread and self.controller == "posterior" and (steps := self.averaging.overlap_steps):
            raise ConfigError(
                f"hdet.controller=posterior and hdet.averaging.overlap_steps={steps} exclude one another: how far the "
                "weights move is measured at the mean at the round's end. Set hdet.controller=published, or "
                "hdet.auto_lr=false."
            )

    @property
    def is_baseline(self) -> bool:
        """Whether replicas differ in nothing."""
        return self.spread == 0 and not self.hyperparameters


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    total_steps: int = 1000
    """Optimizer steps of the whole run. A run may be resumed with another number, not below the steps it has taken: the
    schedule is then the one for the new length, from the same step on, and gains, velocities and optimizer state are
    kept. Without ``hdet.converge_every`` the rounds may get longer with it."""
    batch_size: int = 16
    """Sequences or images per replica and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: one GPU per local rank if there are GPUs, else the CPU."""
    strategy: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """How the processes of a run share the work: ``ddp``, each holds the whole model; ``fsdp``, FSDP2: the processes of
    a replica hold a shard of it each; ``deepspeed``, as ``deepspeed_config`` says."""
    replicas: int | None = None
    """Number of replicas, a divisor of the number of processes; default: one per process. A replica's processes have
    consecutive ranks and one learning rate."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file, for ``strategy=deepspeed``: ``configs/deepspeed_zero1.json`` and so on. It has what
    the run does not know; batch size, accumulation, clipping and precision are the run's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` runs forward and backward under autocast; parameters stay float32. With ``strategy=deepspeed``
    parameters are bfloat16, with float32 masters."""
    compile: bool = False
    """Whether to run the model through torch.compile."""
    seed: int = 0
    """Seeds initial parameters, batches and dropout."""
    eval_every: int = 100
    """Steps between validations; 0: only at the end."""
    eval_batches: int = 40
    """Batches of ``batch_size`` in a validation, shared out over the replicas."""
    log_every: int = 10
    """Steps between lines of ``metrics.jsonl``, in which replicas add up their training losses."""
    log_dir: str = "runs/default"
    """Directory of ``metrics.jsonl``, ``rounds.jsonl``, ``summary.json``, ``checkpoint.pt``, TensorBoard's files and,
    with ``max_lr=auto``, ``find_lr.png``."""
    save_every: int = 0
    """Steps between checkpoints, best a multiple of ``hdet.converge_every``; 0: only at the end and when stopped."""
    stop_at: int | None = None
    """Stop as if by a signal after this step, but with exit status 0: for jobs of limited time."""
    stop_within: float = 25.0
    """Seconds that a run goes on after a signal, to the end of the round, so that it can be resumed there bit for bit.
    If the round is expected to take longer, the replicas are averaged at once, inside the round, and the resumed run
    is not the uninterrupted one. torchrun kills its processes 30 s after it has told them to stop."""
    resume: bool = False
    """Continue from ``checkpoint.pt`` in ``log_dir``; without one there, start anew. ``--resume`` for short."""

    def __post_init__(self) -> None:
        most = {
            "total_steps": 10**12,
            "batch_size": 2**20,
            "accumulate": 2**20,
            "eval_batches": 2**30,
            "log_every": 10**12,
        }
        for name, limit in most.items():
            value = getattr(self, name)
            _require(f"train.{name}", value, 1 <= value <= limit, f"in [1, {limit}]")
        for name in ("eval_every", "save_every"):
            _require(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0 steps")
        if self.replicas is not None:
            _require("train.replicas", self.replicas, self.replicas >= 1, ">= 1")
        if self.deepspeed_config is not None:
            _require(
                "train.deepspeed_config",
                self.deepspeed_config,
                self.strategy == "deepspeed",
                "left out: it is for train.strategy=deepspeed",
            )
        if self.stop_at is not None:
            _require("train.stop_at", self.stop_at, self.stop_at >= 1, ">= 1")
        _require("train.stop_within", self.stop_within, 0 <= self.stop_within < math.inf, "finite and >= 0 seconds")
        _require("train.seed", self.seed, abs(self.seed) < 2**63, "below 2**63")
        for name in ("log_dir", "deepspeed_config"):
            value = getattr(self, name)
            _require(f"train.{name}", repr(value), value is None or (value and "\0" not in value), "a path")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    """The task"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The base schedule"""
    hdet: HdetConfig = field(default_factory=HdetConfig)
    """The ensemble"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop"""

    def __post_init__(self) -> None:
        if self.train.compile and "dropout" in self.hdet.hyperparameters:
            raise ConfigError(
                "hdet.hyperparameters.dropout and train.compile=true exclude one another: the model would be compiled "
                "anew in every round. Leave one of them out."
            )


def parse(argv: Sequence[str]) -> Config:
    """The configuration that the command line asks for: see :func:`hdet.train.command_line.parse`.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    from hdet.train import command_line

    return command_line.parse(argv)


def _require(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ConfigError(f"Invalid {name}={value}. Must be {rule}.")
