"""The loop: draw, forward and backward, step, converge; validate, save and stop where asked."""

from __future__ import annotations

import contextlib
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
from hdet.replicas.topology import Replicas
from hdet.train import checkpoint, data, models, report, resume
from hdet.train.batches import Batches
from hdet.train.config import Config
from hdet.train.ddp_strategy import DDPStrategy
from hdet.train.deepspeed_strategy import DeepSpeedStrategy
from hdet.train.fsdp_strategy import FSDPStrategy
from hdet.train.log import RunLog, check_directory
from hdet.train.optimization import Schedule, build_optimizer, find_max_lr
from hdet.train.processes import Process
from hdet.train.report import Finding
from hdet.train.stop import StopRequest, round_end
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
        saved = resume.read(config, self._checkpoint, self._settings, self._processes)
        self.step: int = saved["step"] if saved else 0
        """Optimizer steps taken."""
        if process.writer:
            check_directory(directory)
        holds_out = config.hdet.probe == "held_out" and not config.hdet.is_baseline
        self.data = data.load(config.task, config.model.block_size, held_out=holds_out)
        models.check_size(config.model, config.task.name, self.data.classes, config.train.batch_size)
        torch.manual_seed(config.train.seed)
        self.model = models.build(config.model, config.task.name, self.data.classes).to(process.device)
        self._parameters = sum(p.numel() for p in self.model.parameters())
        self.batches = Batches(config, process, self.data, self.model)
        self._finding: Finding | None = None
        is_found = config.optimizer.max_lr == "auto"
        if is_found:
            if saved:
                max_lr = saved["max_lr"]
            else:
                self._finding = self._find_lr()
                max_lr = self._finding.found.max_lr
            self.config = config = replace(config, optimizer=replace(config.optimizer, max_lr=max_lr))
        self._ddp = self._strategy.wrap(self.model)
        self.optimizer = build_optimizer(config.optimizer, self.model, process.device)
        self._deepspeed = self._strategy if isinstance(self._strategy, DeepSpeedStrategy) else None
        build = None
        if self._deepspeed is not None:
            self._ddp = self._deepspeed.start(self.model, self.optimizer)
            self.optimizer, build = self._deepspeed.optimizer, self._deepspeed.build_scheduler
        self.log = RunLog(directory, _flat(asdict(config)), _flat(asdict(Config())), writer=process.writer)
        probe = None
        if config.hdet.probe:
            probe = hdet.Probe(loss_fn=self.batches.loss_of, batches=self._probe_batches(holds_out), held_out=holds_out)
        self.schedule = Schedule(
            config, self.optimizer, self._ddp, self.log.monitors, probe, self._strategy.replicas_argument, build
        )
        if is_found and self.schedule.ensemble is not None:
            self.schedule.ensemble.rate_was_found()
        if saved:
            resume.load(self._checkpoint, saved, self._strategy, self.model, self.optimizer, self.schedule)
            if saved["config"].get("train", {}).get("total_steps") != config.train.total_steps:
                self.schedule.continue_at(self.step)
        if config.train.compile:
            self.model.compile()
        self._validated: dict[str, float] = {}

    def run(self) -> int:
        """Train to the end, or until stopped.

        Returns:
            The signal that stopped the run, or 0.
        """
        try:
            return self._run()
        except BaseException:
            with contextlib.suppress(Exception):
                self.log.close()
            raise

    def _run(self) -> int:
        config, log = self.config.train, self.log
        log.open(step=self.step, total_steps=config.total_steps)
        report.introduce(self.config, self._parameters, self.replicas, self.process, self.schedule, log)
        if self._finding is not None:
            report.tell_finding(self._finding, log)
        if self.step:
            log.say(f"Resumed after step {self.step}.")
        if self.schedule.ensemble is None:  # an ensemble starts its monitors itself
            settings: dict[str, Any] = {"spread": 0.0, "auto_lr": False, "probe": False, "replicas": self.replicas.size}
            settings |= {"peak_lr": self.config.optimizer.known_max_lr, "schedule": self.config.schedule.name}
            for monitor in log.monitors:
                monitor.start(settings, step=self.step, writer=self.process.writer)
        last = config.total_steps if config.stop_at is None else self._round_end(max(config.stop_at, self.step))
        stopped_by, started, first = 0, time.monotonic(), self.step
        losses = torch.zeros((), device=self.process.device)
        lr, since, validated_at = self.schedule.base_lr, self.step, -1
        self._warm_up()
        with StopRequest(self._processes) as stop:
            while self.step < last:
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
                if not stopped_by and (stopped_by := stop.after_step()):
                    last = min(last, self._last_step((time.monotonic() - started) / (self.step - first)))
            stop.drain()
            if self.step == config.total_steps and validated_at != self.step:
                self._validate()
            self._save()
            self._mean(losses)  # when a process leaves, the checkpoint is there
        if self.step == config.total_steps:
            stopped_by = 0
            report.summarise(self.config, self._validated, lr, self._parameters, self.replicas, self.schedule, log)
        else:
            log.say(
                f"Stopped after step {self.step} of {config.total_steps}; the state is in {self._checkpoint}. "
                "Start again with the same arguments and --resume to go on."
            )
            if self._round_end(self.step) != self.step:
                log.say(
                    "The replicas were averaged inside a round: the resumed run will not be the uninterrupted one bit "
                    "for bit."
                )
        log.tell()
        log.close()
        return stopped_by

    def _round_end(self, step: int) -> int:
        return round_end(self.config, self.schedule.ensemble, step)

    def _last_step(self, seconds: float) -> int:
        """After a signal: where to stop. Collective; the same on every rank.

        Args:
            seconds: that a step takes here.
        """
        end = self._round_end(self.step)
        slowest = max(row[0] for row in self._processes.all_gather([seconds]))
        expected = (end - self.step) * slowest
        if expected > self.config.train.stop_within:
            return self.step
        if end > self.step:
            self.log.say(f"Going on to step {end}, the end of the round, for about {expected:.0f} s.")
        return end

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
        return self.batches.loss_of(self._ddp, batch, float(self.schedule.label_smoothing))

    def _probe_batches(self, held_out: bool) -> Iterator[data.Batch]:
        """One for each round, which depends on the round and not on how many were taken before: they may go on after a
        resume."""
        ensemble = self.schedule.ensemble
        assert ensemble is not None
        while True:
            yield self.batches.draw(ensemble.round, "probe", held_out=held_out)

    def _find_lr(self) -> Finding:
        """``max_lr=auto``. Collective."""
        started = time.monotonic()
        batches = (self.batches.draw(i, "find_lr") for i in itertools.count())
        ours = self.config.hdet
        found = find_max_lr(
            self.config.optimizer,
            self.model,
            self.batches.loss_of,
            batches,
            self.process.device,
            auto_lr=bool(ours.auto_lr and ours.controller == "posterior" and ours.spread),
        )
        return Finding(found, time.monotonic() - started)

    def _validate(self) -> None:
        self.schedule.converge()
        self._validated = validate(self.batches, self.model, self._ddp, self.replicas)
        self.log.validation(
            self.step, loss=self._validated["validation_loss"], accuracy=self._validated["validation_accuracy"]
        )

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


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``, values that are not plain as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
