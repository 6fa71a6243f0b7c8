"""The loop: draw, forward and backward, step, converge; validate, save and stop where asked."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hdet
from hdet import ops
from hdet.replicas.topology import Replicas
from hdet.train import checkpoint, data, models
from hdet.train.batches import Batches
from hdet.train.config import Config
from hdet.train.ddp_strategy import DDPStrategy
from hdet.train.deepspeed_strategy import DeepSpeedStrategy
from hdet.train.fsdp_strategy import FSDPStrategy
from hdet.train.log import RunLog
from hdet.train.optimization import Schedule, build_optimizer, find_max_lr
from hdet.train.processes import Process, StopRequest
from hdet.train.validation import validate

_STRATEGIES: dict[str, type[DDPStrategy]] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "deepspeed": DeepSpeedStrategy,
}


class Trainer:
    """One run, from the configuration to the summary.

    Args:
        config: the run.
        process: this process of it; the process group is there already.

    Raises:
        ConfigError: on every rank, if data, schedule or checkpoint do not fit the configuration.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config, self.process, self._processes = config, process, Replicas()
        self._strategy = _STRATEGIES[config.train.strategy](config, process)
        self.replicas = self._strategy.replicas
        self._settings = asdict(config)
        directory = Path(config.train.log_dir)
        self._checkpoint = directory / "checkpoint.pt"
        saved = None
        if config.train.resume and self._checkpoint.exists():
            saved = checkpoint.load(self._checkpoint, self._settings)
        self.step: int = saved["step"] if saved else 0
        """Optimizer steps taken."""
        holds_out = config.hdet.probe == "held_out" and not config.hdet.is_baseline
        self.data = data.load(config.task, config.model.block_size, held_out=holds_out)
        torch.manual_seed(config.train.seed)
        self.model = models.build(config.model, config.task.name, self.data.classes).to(process.device)
        self._batches = Batches(config, process, self.data, self.model)
        self._parameters = sum(p.numel() for p in self.model.parameters())
        self._finding: hdet.LRFinding | None = None
        if config.optimizer.max_lr == "auto":
            max_lr = saved["max_lr"] if saved else self._find_lr()
            self.config = config = replace(config, optimizer=replace(config.optimizer, max_lr=max_lr))
        self._ddp = self._strategy.wrap(self.model)
        self.optimizer = build_optimizer(config.optimizer, self.model, process.device)
        self._deepspeed = self._strategy if isinstance(self._strategy, DeepSpeedStrategy) else None
        build = None
        if self._deepspeed is not None:
            self._ddp = self._deepspeed.start(self.model, self.optimizer)
            self.optimizer, build = self._deepspeed.optimizer, self._deepspeed.build_scheduler
        self.log = RunLog(directory, _flat(asdict(config)), writer=process.writer)
        probe = None
        if config.hdet.probe:
            probe = hdet.Probe(
                loss_fn=self._batches.loss_of, batches=self._probe_batches(holds_out), held_out=holds_out
            )
        self.schedule = Schedule(
            config, self.optimizer, self._ddp, self.log.monitors, probe, self._strategy.replicas_argument, build
        )
        if saved:
            self.schedule.load_state_dict(self._strategy.load(saved, self.model, self.optimizer))
            if saved["config"]["train"]["total_steps"] != config.train.total_steps:
                self.schedule.continue_at(self.step)
        if config.train.compile:
            self.model.compile()
        self._validated: dict[str, float] = {}

    def run(self) -> int:
        """Train to the end, or until stopped.

        Returns:
            The signal that stopped the run, or 0.
        """
        config, log = self.config.train, self.log
        log.open(step=self.step, total_steps=config.total_steps)
        self._introduce()
        if self.schedule.ensemble is None:  # an ensemble starts its monitors itself
            settings = {"spread": 0.0, "replicas": self.replicas.size}
            log.tensorboard.start(settings, step=self.step, writer=self.process.writer)
        last = min(config.total_steps, config.stop_at or config.total_steps)
        stopped_by = 0
        losses = torch.zeros((), device=self.process.device)
        lr, since, validated_at = self.schedule.base_lr, self.step, -1
        self._warm_up()
        with StopRequest(self._processes) as stop:
            while self.step < last and not stopped_by:
                lr, gain = self.schedule.base_lr, next(iter(self.schedule.gains.values()))
                losses += self._train_step()
                self.step += 1
                log.advance()
                if self.step % config.log_every == 0 or self.step == config.total_steps:
                    log.training(self.step, loss=self._mean(losses / (self.step - since)), lr=lr, gain=gain)
                    losses.zero_()
                    since = self.step
                if config.eval_every and self.step % config.eval_every == 0:
                    self._validate()
                    validated_at = self.step
                if config.save_every and self.step % config.save_every == 0:
                    self._save()
                stopped_by = stop.after_step()
            if self.step == config.total_steps and validated_at != self.step:
                self._validate()
            self._save()
        if self.step == config.total_steps:
            stopped_by = 0
            self._summarise(lr)
        else:
            log.say(
                f"Stopped after step {self.step} of {config.total_steps}; the state is in {self._checkpoint}. "
                "Start again with the same arguments and --resume to go on."
            )
        log.close()
        return stopped_by

    def _train_step(self) -> Tensor:
        """One optimizer step; returns this replica's loss, on its device."""
        config, process = self.config, self.process
        total = torch.zeros((), device=process.device)
        self._ddp.train()
        if self._deepspeed is not None:
            losses = [partial(self._loss_of_micro_batch, i) for i in range(config.train.accumulate)]
            return self._deepspeed.train_step(losses, hears_losses=self.schedule.ensemble is not None)
        each: list[Tensor] = []
        for micro_batch in self.schedule.each(range(config.train.accumulate)):
            with self._strategy.synchronised(self._ddp, micro_batch == config.train.accumulate - 1):
                loss = self._loss_of_micro_batch(micro_batch) / config.train.accumulate
                loss.backward()
            total += loss.detach()
            each.append(loss.detach() * config.train.accumulate)
        if config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step(each if config.hdet.virtual_replicas else total)
        return total

    def _loss_of_micro_batch(self, micro_batch: int) -> Tensor:
        config = self.config
        seed = data.step_seed(config.train.seed, self.process.rank, self.step, micro_batch)
        if config.model.dropout or "dropout" in config.hdet.hyperparameters:
            torch.manual_seed(seed)  # so that a resumed run drops the same units
        return self._loss(self.data.draw(config.train.batch_size, torch.Generator().manual_seed(seed)))

    def _warm_up(self) -> None:
        """One backward pass that changes nothing. After its first, DistributedDataParallel regroups the gradients which
        it sends together, and so the order in which those of the replicas are added: without this, the first step of a
        resumed run would round differently from the same step of an uninterrupted one."""
        if self._ddp is not self.model and self._deepspeed is None:
            self.model.train()
            self._loss(self.data.validation(0, self.config.train.batch_size, 1)).backward()
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: data.Batch) -> Tensor:
        return self._batches.loss_of(self._ddp, batch, float(self.schedule.label_smoothing))

    def _probe_batches(self, held_out: bool) -> Iterator[data.Batch]:
        """One for each round, which depends on the round and not on how many were taken before: they may go on after a
        resume."""
        ensemble = self.schedule.ensemble
        assert ensemble is not None
        while True:
            yield self._batches.draw(ensemble.round, "probe", held_out=held_out)

    def _find_lr(self) -> float:
        """``max_lr=auto``. Collective."""
        started = time.monotonic()
        batches = (self._batches.draw(i, "find_lr") for i in itertools.count())
        ours = self.config.hdet
        self._finding = find_max_lr(
            self.config.optimizer,
            self.model,
            self._batches.loss_of,
            batches,
            self.process.device,
            auto_lr=bool(ours.auto_lr and ours.probe and ours.spread),
        )
        self._find_seconds = time.monotonic() - started
        return self._finding.max_lr

    def _validate(self) -> None:
        self.schedule.converge()
        self._validated = validate(self._batches, self.model, self._ddp, self.replicas)
        loss, accuracy = self._validated["validation_loss"], self._validated["validation_accuracy"]
        self.log.validation(self.step, loss=loss, accuracy=accuracy)

    def _save(self) -> None:
        self.schedule.converge()
        whole = self._strategy.state(self.model, self.optimizer, self.schedule.state_dict())
        if self.process.writer:
            state = {
                **whole,
                "step": self.step,
                "config": self._settings,
                "max_lr": self.config.optimizer.max_lr,
            }
            checkpoint.save(self._checkpoint, state)
        if self._deepspeed is not None:
            self._deepspeed.forget(self.step)

    def _mean(self, value: Tensor) -> float:
        """Over the processes. Collective."""
        gathered = self._processes.all_gather([value.item()])
        return math.fsum(row[0] for row in gathered) / len(gathered)

    def _introduce(self) -> None:
        config, ensemble = self.config, self.schedule.ensemble
        count = self.replicas.size if ensemble is None else ensemble.size
        how = "spread 0: the plain schedule"
        if ensemble is not None:
            how = f"spread {config.hdet.spread:.3g}, converging every {ensemble.settings.converge_every} steps"
            how += ", learning rate by the paired probe" if config.hdet.probe and config.hdet.auto_lr else ""
            names = ", ".join(config.hdet.hyperparameters)
            how += f", exploring {names}" if names else ""
            how += f", {config.hdet.gradients} gradients" if config.hdet.gradients != "shared" else ""
        self.log.say(
            f"{config.task.name}: {self._parameters / 1e6:.2f}M parameters, {count} "
            f"replica{'s' * (count > 1)}{self._members()} on {self.process.device.type}, {how}"
        )
        self.log.say(str(ops.backend()))
        self.log.say(f"tensorboard --logdir {config.train.log_dir}")
        if ensemble is not None and ensemble.size == 1:
            self.log.say("One replica has nobody to differ from: this is the plain schedule. Start more with torchrun.")
        if self._finding is not None:
            self._tell_finding(self._finding)
        if self.step:
            self.log.say(f"Resumed after step {self.step}.")

    def _members(self) -> str:
        return f" of {self.replicas.members} processes each" if self.replicas.members > 1 else ""

    def _tell_finding(self, finding: hdet.LRFinding) -> None:
        picture = Path(self.config.train.log_dir) / "find_lr.png"
        if self.process.writer:
            finding.plot(picture)
        best, lr = min(zip(finding.losses, finding.lrs, strict=True))
        self.log.say(
            f"max_lr {finding.max_lr:.2e} found by trying {len(finding.lrs)} learning rates in "
            f"{self._find_seconds:.1f} s (loss {finding.start_loss:.3f}, after {finding.steps} steps at {lr:.2e} "
            f"{best:.3f}): {picture}"
        )

    def _summarise(self, lr: float) -> None:
        log, config, ensemble = self.log, self.config, self.schedule.ensemble
        overhead = log.converge_seconds / log.seconds
        gains = self.schedule.gains
        centres = "" if ensemble is None else "".join(f"{name} {c:.3g}, " for name, c in ensemble.centres.items())
        log.summary(
            {
                **self._validated,
                "max_lr": config.optimizer.max_lr,
                "final_lr": lr,
                "gain": gains,
                "hyperparameters": {} if ensemble is None else ensemble.centres,
                "converge_overhead": overhead,
                "converge_seconds": log.converge_seconds,
                "wall_seconds": log.seconds,
                "steps": self.step,
                "replicas": self.replicas.size if ensemble is None else ensemble.size,
                "spread": 0.0 if ensemble is None else config.hdet.spread,
                "converge_every": None if ensemble is None else ensemble.settings.converge_every,
                "parameters": self._parameters,
            }
        )
        log.say(
            f"Done in {log.seconds:.0f} s: validation loss {self._validated['validation_loss']:.4f}, "
            f"final LR {lr:.2e}, gain {', '.join(f'{name} {gain:.3f}' for name, gain in gains.items())}, {centres}"
            f"converge overhead {overhead:.2%}"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``, values that are not plain as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
