"""hdet's own contenders, with N replicas simulated in one process.

With shared gradients and an optimizer without weight decay the replicas lie on one line through the round's start: with
``m`` the run at the base learning rate, ``theta_r = start + rho_r (m - start)``. So one model is trained, at the base
learning rate, and the replicas' points are computed where they are needed: for the probe, and with ``exact=True`` for
every gradient, which is then the mean of N gradients at N points on N parts of the batch, as with real processes. By
default the gradient is taken at ``m``, which differs in the second order of the spread and saves most of the time.
With AdamW's weight decay the line is bent by ``(spread * lr * weight_decay)**2`` per step.

The controllers, the spread and the slow average are the library's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hdet.bench.regret import peers
from hdet.bench.regret.data import Batch
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.workloads import Workload
from hdet.converge.buckets import fill_buckets
from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.errors import DivergedError, HdetError
from hdet.explore.spread import assignment
from hdet.model.weights import Weights
from hdet.observe.movement import Matrices, movement
from hdet.observe.probe import evaluate, losses_by_point
from hdet.observe.slopes import Slopes, slopes_of
from hdet.schedules.course import Course
from hdet.schedules.forecast import Forecast, forecast
from hdet.schedules.found import Recorder
from hdet.steer.controllers import Controller
from hdet.steer.lr_finder import find_lr, head_start
from hdet.steer.observation import Observation
from hdet.steer.phase import is_probed
from hdet.steer.posterior import Posterior
from hdet.steer.published import Published
from hdet.steer.recovery import GAIN_DIVISOR, Recovery


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How hdet is set up."""

    controller: Controller = field(default_factory=Posterior)
    replicas: int = 4
    spread: float = 0.11
    rounds: int = 100
    """Per run: the round's length is ``steps // rounds``, at least 1."""
    power: float = 0.25
    """Of the probe's slow average."""
    auto: bool = False
    """Whether ``hdet.find_lr`` chooses max_lr first, at the cost of as many steps as its samples would have made."""
    find_steps: int = 40
    """Steps per candidate, then; at most a seventh of the run."""
    exact: bool = False
    rollback: bool = True
    """Whether a round that blew up is undone."""
    probe: bool = True
    """Whether there is one."""
    probe_share: int = 1
    """A probe takes one batch divided by this."""
    flat: bool = False
    """Whether the controller is given a height of 1 throughout."""
    keep_slopes: bool = False
    """Whether ``details`` holds the probes' slopes."""


def simulate(
    workload: Workload, max_lr: float, seed: int, setting: Setting, recorder: Recorder | None = None
) -> Outcome:
    """One run of hdet; ``details`` holds the gain after every round. ``recorder`` records the schedule it finds."""
    began = time.perf_counter()
    model = peers.build(workload, seed)
    optimizer = peers.optimizer_of(workload, model, max_lr)
    generator = peers.batches(seed)
    steps = workload.steps
    details: dict[str, Any] = {}
    if setting.auto:
        try:
            max_lr, spent = _found(workload, model, optimizer, max_lr, setting, generator)
        except HdetError as failure:  # a user would have no run at all
            return Outcome(math.nan, time.perf_counter() - began, 1.0, {"error": str(failure)})
        if spent >= steps:  # in a run that is too short for a search
            error = f"The search took {spent} of the run's {steps} steps."
            return Outcome(math.nan, time.perf_counter() - began, 1.0, {"error": error})
        steps -= spent
        details = {"found": max_lr, "spent": spent}
    schedule = peers.schedule_of(workload, optimizer, max_lr, steps)
    ahead = forecast(schedule, optimizer, steps)
    replicas = _Replicas(workload, model, optimizer, seed, steps, setting, ahead)
    for step in range(steps):
        batch = workload.draw(workload.batch_size, generator)
        gain = replicas.gain
        optimizer.param_groups[0]["lr"] = base = float(schedule.get_last_lr()[0]) * gain
        if recorder and step % replicas.round_length == 0:
            recorder.add(step, [base])
        loss = replicas.backward(batch)
        if not setting.rollback and not math.isfinite(loss):
            return Outcome(math.nan, time.perf_counter() - began, gain, details)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = base / gain
        try:
            replicas.end_step(step + 1, batch, float(schedule.get_last_lr()[0]))
        except DivergedError:
            return Outcome(math.nan, time.perf_counter() - began, gain, details)
        if step + 1 < steps:
            schedule.step()
    if recorder:
        recorder.add(steps - 1, [base])
    if replicas.rollbacks:
        details["rollbacks"] = replicas.rollbacks
    loss = peers.evaluate(workload, model, workload.validation())
    if setting.keep_slopes:
        details["slopes"] = replicas.slopes
    details["gains"] = [round(gain, 4) for gain in replicas.gains]
    return Outcome(loss, time.perf_counter() - began, replicas.gain, details)


class _Replicas:
    """The points of N replicas around one model that trains at the base learning rate."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        seed: int,
        steps: int,
        setting: Setting,
        ahead: Forecast,
    ) -> None:
        self._workload, self._model, self._setting = workload, model, setting
        self._steps, self.round_length = steps, max(1, steps // setting.rounds)
        self._recovery = Recovery((model,), optimizer, None) if setting.rollback else None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        (self._bucket,) = fill_buckets(self._parameters, 2**40, lambda t: t.device)
        self._slow = SlowAverage(setting.power)
        controller = setting.controller
        self._state: Any = controller.begin(1.0)
        self._course = Course(self.round_length, steps)
        self._course.forecast = ahead
        self._until = controller.rests_after(self._course)
        self._matrices = Matrices(self._parameters)
        self._start = self._bucket.pack()
        self._losses = [0.0] * setting.replicas
        self._probe_generator = torch.Generator().manual_seed(seed + 300)
        self.gains: list[float] = []
        self.slopes: list[tuple[float, Slopes]] = []
        """(progress, slopes), probe by probe."""

    @property
    def gain(self) -> float:
        return self._state.gain

    @property
    def rollbacks(self) -> int:
        return self._recovery.count if self._recovery else 0

    def multipliers(self, round: int) -> tuple[float, ...]:
        setting = self._setting
        return assignment(setting.replicas, setting.spread, seed=0, round=round, hyperparameter="lr/0")

    def backward(self, batch: Batch) -> float:
        """The replicas' mean gradient into ``p.grad``, clipped; returns the mean loss."""
        if not self._setting.exact:
            loss = peers.backward(self._workload, self._model, batch)
            self._losses = [total + loss for total in self._losses]
            return loss
        mean, losses = self._bucket.pack(), []
        gradients = [torch.zeros_like(p) for p in self._parameters]
        rhos = self.multipliers(len(self.gains))
        for r, (rho, part) in enumerate(zip(rhos, self._parts(batch), strict=True)):
            self._bucket.write(torch.lerp(self._start, mean, rho))
            here = self._workload.loss(self._model(part.inputs), part.targets)
            for total, gradient in zip(gradients, torch.autograd.grad(here, self._parameters), strict=True):
                total.add_(gradient, alpha=1 / len(rhos))
            losses.append(here.item())
            self._losses[r] += losses[-1]
        self._bucket.write(mean)
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.grad = gradient
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        return math.fsum(losses) / len(losses)

    def end_step(self, step: int, batch: Batch, lr: float) -> None:
        """What the ensemble does in ``step()``; raises ``DivergedError`` after too many rollbacks."""
        if step % self.round_length:
            return
        height = self._course.height(lr)
        controller, progress = self._setting.controller, step / self._steps
        mean = self._bucket.pack()
        losses = tuple(total / self.round_length for total in self._losses)
        if self._recovery:
            finite = bool(mean.isfinite().all())
            may_move = not progress > self._until
            if self._recovery.can_restore and self._recovery.is_needed([finite], losses, watches_losses=may_move):
                self._roll_back()
                return
            self._recovery.observe(losses)
            self._recovery.keep()
        rhos = self.multipliers(len(self.gains))
        known = 1.0 if self._setting.flat else height
        probe = None
        if self._setting.probe and not isinstance(controller, Published):
            self._slow.unpack(0, self._bucket, mean, 1)
            if controller.wants_probe(progress, self._until) and is_probed(controller, self._course, step):
                batch = self._workload.draw(
                    self._workload.batch_size // self._setting.probe_share, self._probe_generator
                )
                parts = self._parts(batch)
                probe = losses_by_point([self._probe(mean, rho, part) for rho, part in zip(rhos, parts, strict=True)])
        if isinstance(controller, Published) and not self._setting.exact:
            losses = self._losses_at_points(batch, mean, rhos)
        observation = Observation(
            losses=losses,
            multipliers=rhos,
            schedule=height,
            progress=progress,
            share=self._course.share,
            height=known,
            until=self._until,
            final=self._course.final,
            probe=probe,
            movement=self._movement(mean),
            area=self._course.area,
            lag=self._slow.lag,
            steps=self._course.converge_every,
            given=not self._setting.auto,
        )
        if probe is not None and (slopes := slopes_of(probe, rhos, observation.lag)) is not None:
            self.slopes.append((progress, slopes))
        self._state, _ = controller.update(self._state, observation)
        self._losses = [0.0] * self._setting.replicas
        self.gains.append(self.gain)
        self._start = mean

    def _movement(self, mean: Tensor) -> float:
        """Of the round that ends at ``mean``."""
        sizes = [p.numel() for p in self._bucket.pieces]
        ends, starts = mean.split(sizes), self._start.split(sizes)
        return movement(self._matrices.squares(ends, starts), self._matrices.own)

    def _roll_back(self) -> None:
        assert self._recovery
        self._recovery.restore()
        self._start = self._bucket.pack()
        self._state = self._setting.controller.cut(self._state, GAIN_DIVISOR)
        self._slow.restart()
        self._losses = [0.0] * self._setting.replicas
        self.gains.append(self.gain)

    def _probe(self, mean: Tensor, rho: float, part: Batch) -> tuple[float, ...]:
        points = [Point(self._bucket, mean, (mean - self._start).mul_(rho - 1))]
        return evaluate(
            (self._model,),
            lambda model, x: self._workload.loss(model(x.inputs), x.targets),
            part,
            points,
            self._slow,
            Weights((self._model,)),
        )

    def _losses_at_points(self, batch: Batch, mean: Tensor, rhos: Sequence[float]) -> tuple[float, ...]:
        """[replica] loss of the last batch at its point: the least noise that the published signal could have."""
        losses = []
        for rho, part in zip(rhos, self._parts(batch), strict=True):
            self._bucket.write(torch.lerp(self._start, mean, rho))
            losses.append(peers.evaluate(self._workload, self._model, part))
        self._bucket.write(mean)
        return tuple(losses)

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch as the replicas share it."""
        n = self._setting.replicas
        return [Batch(*part) for part in zip(batch.inputs.chunk(n), batch.targets.chunk(n), strict=True)]


def _found(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: float,
    setting: Setting,
    generator: torch.Generator,
) -> tuple[float, int]:
    """What ``find_lr`` suggests on batches of one replica's size, and the steps' worth of samples that it took."""
    drawn = 0

    def batches() -> Iterator[Batch]:
        nonlocal drawn
        while True:
            drawn += 1
            yield workload.draw(workload.batch_size // setting.replicas, generator)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return workload.loss(model(batch.inputs), batch.targets)

    goes_on = not isinstance(setting.controller, Published)
    found = find_lr(
        model,
        optimizer,
        loss_fn,
        batches(),
        low=start / 100,
        high=start * 100,
        steps=max(4, min(setting.find_steps, workload.steps // 7)),
        max_grad_norm=1.0,
        auto_lr=goes_on,
    )
    # In one process the search suggests the candidate itself, without the head start of several replicas.
    times = head_start(setting.replicas, conclusive=found.conclusive) if goes_on else 1
    return found.max_lr * times, -(-drawn // setting.replicas)
