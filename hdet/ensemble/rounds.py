"""A run as rounds. Each is told in order: explore, converge, observe, steer."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdet.converge import Averaged, Findings, Pending
from hdet.ensemble import checkpoint
from hdet.ensemble.build import Phases
from hdet.model import RivalWatch, check_caller
from hdet.monitor import Moment, Report, assemble
from hdet.observe import Loss, ProbeLosses
from hdet.replicas import gather_agreed
from hdet.settings import Resolved
from hdet.steer import ControllerReport


class _InFlight(NamedTuple):
    """An average under way, and the report that waits for it."""

    pending: Pending
    report: Report
    watched: bool
    seconds: float


class Rounds:
    """The state machine of an ensemble.

    Args:
        settings: complete and valid.
        phases: what a round goes through.
        groups: names of the parameter groups.
        rival: notices another ensemble on the same model.
    """

    def __init__(self, settings: Resolved, phases: Phases, groups: Sequence[str], rival: RivalWatch) -> None:
        self._settings, self._group_names, self._rival = settings, tuple(groups), rival
        self._replicas = settings.replicas
        self._explore, self._converge_phase, self._observe, self._steer = phases[:4]
        self._publisher, self._gradients = phases.publisher, phases.gradients
        self._schedule, self._course = phases.schedule, phases.course
        self.steps = 0
        """Calls of :meth:`end_step` so far."""
        self.converged_at = 0
        """Steps at which the replicas were last equal."""
        self.last_report: Report | None = None
        """Of the latest converge."""
        self._begins_round = self._is_new = True
        self._in_flight: _InFlight | None = None
        self.draw()
        self.fan_out()

    @property
    def round(self) -> int:
        """Index of the round in progress."""
        return self._course.round(self.steps)

    @property
    def gains(self) -> tuple[float, ...]:
        """[parameter group]"""
        gains, groups = self._steer.gains, len(self._group_names)
        return gains if len(gains) == groups else gains * groups

    def multipliers(self, group: int) -> tuple[float, ...]:
        """[replica] ``rho`` of a parameter group in the round in progress."""
        return self._steer.multipliers(group if self._settings.given["per_group"] else 0, self.round)

    def end_step(self, loss: Loss, batch: Any = None) -> None:
        """Take a step's loss, and end the round if it is over."""
        checked = self._observe.check(loss)
        self._explore.check()
        if self._is_new:
            self._start()
        self._observe.add(checked)
        steps = self.steps = self.steps + 1
        if self._in_flight and steps == self._in_flight.report.step + self._settings.given["averaging"].overlap_steps:
            self._land()
        if steps % self._course.converge_every == 0:
            self._end_round(batch)

    def fan_out(self) -> None:
        """Read the schedule's learning rates and write this replica's."""
        self._explore.fan_out()
        if self._begins_round:
            self._begins_round = False
            if self.steps % self._course.converge_every == 0:
                self._record(self.steps)

    def converge(self) -> Report | None:
        """Average now, inside a round; ``None`` if the replicas have converged already. Collective."""
        told = self._agree()
        if self.converged_at == self.steps and not any(one["written"] for one in told):
            return None
        self._land()
        return self._converge(told, complete=False)

    # -------------------------------------------------------------------------------------------------- a round's end

    def _end_round(self, batch: Any) -> None:
        """Agree, converge, observe, steer; then draw what the next round is trained under."""
        self._record(self.steps - 1)
        self._converge(self._agree(), complete=True)
        if self._wants_probe():
            self._observe.keep(batch)
        self.draw()

    def _agree(self, *, converges: bool = True) -> list[dict[str, float]]:
        """Make sure that all replicas are at the same point, and gather what each has to tell."""
        terms = {
            **self._observe.terms(),
            **self._publisher.terms(),
            **self._gradients.terms(self.steps),
            **self._converge_phase.terms(converges=converges),
        }
        facts = {**self._plain_settings(), **self._steer.facts(), "replicas=": self._replicas.kind}
        phase = self._converge_phase
        told = gather_agreed(self._replicas, self.steps, phase.layout, facts, terms, phase.gather)
        self._gradients.compare(self.steps, told)
        return told

    def _converge(self, told: list[dict[str, float]], complete: bool) -> Report:
        """Average, or send what is to be averaged; probe; and, if the round is complete, steer."""
        started = time.perf_counter()
        self._observe.collect(told)
        watched, found = self._publisher.is_watched(told), self._converge_phase.findings(told)
        if complete:
            self._rival.look()
        with torch.profiler.record_function("hdet::converge"):
            if complete and self._has_blown_up(found):
                return self._roll_back(watched, started)
            if complete and self._settings.given["averaging"].overlap_steps:
                pending = self._converge_phase.start(found)
                self.last_report = report = self._move()
                self._in_flight = _InFlight(pending, report, watched, time.perf_counter() - started)
                return report
            probes = complete and self._wants_probe()
            can_probe = probes and all(one["can probe"] for one in told)
            averaged = self._converge_phase.average(found, complete=complete, move_slow=probes, return_points=can_probe)
        self.converged_at = self.steps
        if not complete:
            self._explore.gather_in()
            return self._publish(self._report(self._steer.rest(self.steps)), averaged, watched, started)
        probed = self._probe(averaged) if averaged.points else None
        moved = self._observe.movement(self._steer.rounds_since_kept)
        self._converge_phase.step_outer()
        report = self._move(probed, moved)
        self._steer.keep(report.mean_loss)
        return self._publish(report, averaged, watched, started)

    def _probe(self, averaged: Averaged) -> ProbeLosses:
        """The probe's losses where the replicas stood. Collective."""
        directions = self._steer.directions(self._course.ended_round(self.steps))
        reach, neutral = self._steer.reach(self._explore.plain_base_lr[0]), self._explore.neutral(self._steer.positions)
        return self._observe.probe(averaged.points or [], directions, reach, neutral)

    def _move(self, probed: ProbeLosses | None = None, moved: tuple[float, ...] = ()) -> Report:
        """Let gains and centres move by what the round has shown; the report of that."""
        lrs, losses, lag = self._explore.plain_base_lr, self._observe.means, self._converge_phase.lag
        report = self._report(self._steer.move(self.steps, lrs, losses, probed, lag, moved), complete=True)
        self._observe.begin_round()
        return report

    def _has_blown_up(self, found: Sequence[Findings]) -> bool:
        """Whether the round that just ended is to be undone."""
        losses = self._observe.means if self._observe.knows_losses else ()
        finite = [one.weights.finite for one in found]
        return self._steer.has_blown_up(self.steps, finite, losses, can_probe=self._can_probe)

    def _roll_back(self, watched: bool, started: float) -> Report:
        """Undo the round: the model and the optimizer as they last converged well, under a smaller gain."""
        undone = self._steer.roll_back(self.steps)
        self._converge_phase.roll_back()
        self.converged_at = self.steps
        report = self._report(undone, rolled_back=True)
        self._observe.begin_round()
        if self._replicas.writer:
            self._steer.warn_of_rollback(self.steps, report.mean_loss)
        return self._publish(report, Averaged(math.nan, (), 0), watched, started)

    def _land(self) -> None:
        """Apply the average that has been under way, if one is."""
        if self._in_flight:
            pending, report, watched, seconds = self._in_flight
            started = time.perf_counter() - seconds
            with torch.profiler.record_function("hdet::converge"):
                averaged = self._converge_phase.land(pending)
            self._publish(report, averaged, watched, started)
            self._in_flight = None

    def _report(self, controllers: ControllerReport, *, complete: bool = False, rolled_back: bool = False) -> Report:
        moment = Moment(
            self.steps,
            self._course.ended_round(self.steps),
            complete,
            self._group_names,
            self._explore.plain_base_lr,
            self._replicas.size,
            self._replicas.writer,
        )
        return assemble(moment, self._observe.means, controllers, rolled_back=rolled_back)

    def _publish(self, report: Report, averaged: Averaged, watched: bool, started: float) -> Report:
        self._converge_phase.settle()
        self.last_report = self._publisher.publish(
            report,
            averaged,
            watched=watched,
            shards=self._converge_phase.shard[1] > 1,
            seconds=time.perf_counter() - started,
        )
        return self.last_report

    def draw(self) -> None:
        """What this replica trains under, which changes once per round."""
        self._begins_round = True
        multipliers = [self.multipliers(g) for g in range(len(self._group_names))]
        self._explore.draw(self.gains, multipliers, self._steer.positions, self._steer.levels(self.round))

    # ---------------------------------------------------------------------------------------------------- the state

    @property
    def parts(self) -> tuple[checkpoint.Stateful, ...]:
        """What has something to save."""
        return self._observe, self._steer, self._explore, self._converge_phase, self._schedule

    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor], state: Mapping[str, Any] | None = None) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``, and with the rest of
        a saved ``state``."""
        self._in_flight = None
        self._observe.restart()
        if state is not None:
            checkpoint.load(self.parts, state)
        self._steer.restart()
        self.steps = self.converged_at = steps
        self._converge_phase.restart()
        self.draw()
        self._explore.undo(base_lr)
        self.fan_out()

    # --------------------------------------------------------------------------------------------------- inner parts

    def _start(self) -> None:
        check_caller()
        self._agree(converges=False)
        self._is_new = False
        self._steer.begin()
        self._observe.begin()
        self._publisher.start(self._plain_settings(), self.steps)

    def _plain_settings(self) -> dict[str, Any]:
        """The run's settings as plain values, for error messages and for TensorBoard's hparams."""
        own = {
            "averaging.optimizer_state": self._converge_phase.policy,
            "replicas": self._settings.size,
            "members": self._replicas.members,
            "schedule": type(self._schedule.scheduler).__name__,
        }
        pairs = zip(self._group_names, self._explore.plain_base_lr, strict=True)
        return {**self._settings.plain, **own, **{f"schedule_lr.{name}": lr for name, lr in pairs}}

    def _record(self, step: int) -> None:
        self._schedule.record(step, self._explore.plain_base_lr, self.gains)

    @property
    def _can_probe(self) -> bool:
        return self._settings.probe is not None and self._settings.size > 1

    def _wants_probe(self) -> bool:
        return self._can_probe and self._steer.wants_probe(self.steps)
