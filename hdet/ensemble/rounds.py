"""A run as rounds. Each is told in order: explore, converge, observe, steer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

from hdet.converge import Averaged, Findings, Pending
from hdet.ensemble import checkpoint
from hdet.ensemble.build import Phases
from hdet.errors import ReplicaMismatchError
from hdet.model import RivalWatch, check_caller, outside_inference
from hdet.monitor import Moment, Report, assemble
from hdet.observe import Loss, ProbeLosses, finite_mean
from hdet.replicas import Call, gather_agreed
from hdet.replicas.notes import at_exit, last_error
from hdet.settings import Resolved
from hdet.steer import ControllerReport

logger = logging.getLogger("hdet")

_COMPARISONS = 16
"""Most first steps at which replicas are compared, where their optimizers take none."""


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
        self._publisher, self._gradients, self._begun = phases.publisher, phases.gradients, phases.start
        self._schedule, self._course, self._join = phases.schedule, phases.course, phases.join
        self.steps = 0
        """Calls of :meth:`end_step` so far."""
        self.converged_at = 0
        """Steps at which the replicas were last equal."""
        self.last_report: Report | None = None
        """Of the latest converge."""
        self._begins_round = self._is_new = True
        self._must_compare = True  # names and settings, before anything is averaged
        self._must_compare_start = True  # bits, too, at the first step
        self._comparisons = 0
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
        if self._must_compare_start:
            self._start()
        self._observe.add(checked)
        steps = self.steps = self.steps + 1
        if self._in_flight and steps == self._in_flight.report.step + self._settings.given["averaging"].overlap_steps:
            self._land()
        if steps % self._course.converge_every == 0:
            self._end_round(batch)

    def fan_out(self, rates: Sequence[float] | None = None) -> None:
        """Read the schedule's learning rates and write this replica's.

        Args:
            rates: [parameter group] the schedule's, of which those that are tensors have not been written.
        """
        self._explore.fan_out(rates)
        if self._begins_round:
            self._begins_round = False
            if self.steps % self._course.converge_every == 0:
                self._record(self.steps)

    @outside_inference
    def converge(self) -> Report | None:
        """Average now, inside a round; ``None`` if the replicas have converged already. Collective."""
        self._explore.check()
        if self._must_compare:
            self._compare(Call.FIRST_CONVERGE)
        told = self._agree(Call.CONVERGE)
        if self.converged_at == self.steps and not any(one["written"] for one in told):
            return None
        self._land()
        return self._converge(told, complete=False)

    # -------------------------------------------------------------------------------------------------- a round's end

    @outside_inference
    def _end_round(self, batch: Any) -> None:
        """Agree, converge, observe, steer; then draw what the next round is trained under."""
        told = self._agree(Call.ROUND)
        self._record(self.steps - 1)
        self._converge(told, complete=True)
        if self._listens():
            self._observe.keep(batch)
        self.draw()

    def _agree(self, call: Call) -> list[dict[str, float]]:
        """Make sure that all replicas are at the same point, and gather what each has to tell."""
        self._join.check()
        terms = {
            **self._observe.terms(),
            **self._publisher.terms(),
            **self._gradients.terms(),
            **self._converge_phase.terms(),
            **self._steer.terms(),
        }
        phase, describe = self._converge_phase, self._begun.describe
        told = gather_agreed(
            self._replicas, call, self.steps, phase.layout, self._facts(), terms, phase.gather, describe
        )
        if self._explore.by_hand:
            self._explore.agree(self._replicas.all_gather(self._explore.readings()), self._group_names)
        if any(one["written"] > 1 for one in told):
            phase.forget()
        self._gradients.compare(told, is_last=True)
        return told

    def _facts(self) -> dict[str, Any]:
        """What must be the same on every rank at all times."""
        facts = {**self._plain_settings(), **self._steer.facts(), "replicas=": self._replicas.kind}
        by_hand = [self._group_names[i] for i in self._explore.by_hand_together]
        if by_hand:  # these may differ, until they are compared
            facts = {key: value for key, value in facts.items() if key not in {f"schedule_lr.{g}" for g in by_hand}}
            facts["learning rates written by hand"] = ", ".join(by_hand)
        return facts

    def _converge(self, told: list[dict[str, float]], complete: bool) -> Report:
        """Average, or send what is to be averaged; probe; and, if the round is complete, steer."""
        started = time.perf_counter()
        self._observe.collect(told)
        watched, found = self._publisher.is_watched(told), self._converge_phase.findings(told)
        if complete:
            self._rival.look()
        with torch.profiler.record_function("hdet::converge"):
            if all(one["can restore"] for one in told) and self._has_blown_up(found, complete):
                return self._roll_back(watched, started, complete)
            if complete and self._settings.given["averaging"].overlap_steps:
                pending = self._converge_phase.start(found)
                self.last_report = report = self._move()
                self._in_flight = _InFlight(pending, report, watched, time.perf_counter() - started)
                return report
            listens = complete and self._listens()
            probes = listens and self._steer.is_probed(self.steps) and all(one["can probe"] for one in told)
            averaged = self._converge_phase.average(found, complete=complete, move_slow=listens, return_points=probes)
        self.converged_at = self.steps
        if not complete:
            self._explore.gather_in()
            self._observe.begin_movement_inside(self._to_come(self.steps))
            return self._publish(self._report(self._steer.rest(self.steps)), averaged, watched, started)
        probed = self._probe(averaged) if averaged.points else None
        moved = self._observe.movement()
        self._converge_phase.step_outer()
        report = self._move(probed, moved)
        good = any(one.finite for one in found) and self._converge_phase.is_finite()
        self._observe.begin_movement(is_kept=self._steer.keep(good=good))
        return self._publish(report, averaged, watched, started)

    def _probe(self, averaged: Averaged) -> ProbeLosses:
        """The probe's losses where the replicas stood. Collective."""
        directions = self._steer.directions(self._course.ended_round(self.steps))
        neutral = self._explore.neutral(self._steer.positions)
        return self._observe.probe(averaged.points or [], directions, neutral)

    def _move(self, probed: ProbeLosses | None = None, moved: tuple[float, ...] = ()) -> Report:
        """Let gains and centres move by what the round has shown; the report of that."""
        lrs, losses, lag = self._explore.plain_base_lr, self._observe.means, self._converge_phase.lag
        report = self._report(self._steer.move(self.steps, lrs, losses, probed, lag, moved), complete=True)
        if self._replicas.writer:
            self._steer.warn_of_gain()
        self._observe.begin_round()
        return report

    def _has_blown_up(self, found: Sequence[Findings], complete: bool) -> bool:
        """Whether the round so far is to be undone. Of an incomplete one the losses do not tell."""

        def agree(own: float) -> float:
            return finite_mean([rank for (rank,) in self._replicas.all_gather([own])])

        losses = self._observe.means if complete and self._observe.knows_losses else ()
        finite = [one.finite for one in found]
        return self._steer.has_blown_up(self.steps, finite, losses, agree=agree)

    def _roll_back(self, watched: bool, started: float, complete: bool) -> Report:
        """Undo the round: the model and the optimizer as they last converged well, under a smaller gain."""
        undone = self._steer.roll_back(self.steps)
        self._converge_phase.roll_back()
        self.converged_at = self.steps
        report = self._report(undone, rolled_back=True)
        self._observe.begin_round()
        self._observe.begin_movement(is_kept=True)
        if self._replicas.writer:
            self._steer.warn_of_rollback(self.steps)
        if not complete:  # the rest of the round is trained under the smaller gain too
            self.draw()
            self._explore.undo()
            self.fan_out()
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

    def _to_come(self, steps: int) -> float:
        """Share of its round that is still to come after ``steps``."""
        every = self._course.converge_every
        return 1 - steps % every / every

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

    @outside_inference
    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor], state: Mapping[str, Any] | None = None) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``, and with the rest of
        a saved ``state``."""
        self._in_flight = None
        self._observe.restart(self._to_come(steps))
        if state is not None:
            checkpoint.load(self.parts, state)
        self._begun.arm()
        self._steer.restart()
        self._must_compare = self._must_compare_start = True
        self._comparisons = 0
        self.steps = self.converged_at = steps
        self._converge_phase.restart()
        self.draw()
        self._explore.undo(base_lr)
        self.fan_out()

    @property
    def is_over(self) -> bool:
        """Whether all steps of the run, if their number is known, have been taken."""
        total = self._course.total_steps
        return total is not None and self.steps >= total

    @property
    def has_begun(self) -> bool:
        """Whether a step has been taken, or a state loaded."""
        return self.steps > 0 or not self._is_new

    def close(self) -> None:
        """Leave model and optimizer to others. Not collective: an average under way is not waited for."""
        self._in_flight = None
        self._explore.close()
        self._observe.close()
        self._steer.close()
        self._converge_phase.close()

    # --------------------------------------------------------------------------------------------------- inner parts

    @outside_inference
    def _start(self) -> None:
        """Before the first step counts, and the first after a load: all that replicas must have in common. Again before
        the next ones, as long as an optimizer has taken no step, for example since AMP has skipped it."""
        if self._is_new:
            check_caller()
        self._compare(Call.FIRST_STEP)
        if self._is_new:
            self._is_new = False
            self._steer.begin()
            self._observe.begin()
            self._publisher.start({**self._plain_settings(), "peak_lr": self._course.peak}, self.steps)
            self._warn_of_one_replica()
            if self._replicas.size > 1:
                tell = WeakMethod(self._tell_end)
                at_exit(lambda: None if (method := tell()) is None else method())

    def _compare(self, call: Call) -> None:
        """Compare names, settings and, at a first step, bits and gradients. Collective."""
        replicas, begun = self._replicas, self._begun
        self._join.check()
        replicas.check_world()
        replicas.doing = call.at(self.steps)
        facts: dict[str, Any] = {}
        layout = 0
        if self._must_compare:
            facts, layout = {**self._facts(), **begun.facts()}, begun.layout()
            replicas.meet()
        terms = {**begun.terms(), **self._gradients.terms()}
        told = gather_agreed(replicas, call, self.steps, layout, facts, terms, describe=begun.describe)
        self._must_compare = False
        if call is not Call.FIRST_STEP:
            return
        self._comparisons += 1
        is_known, broadcasts = begun.is_known(told), self._settings.given["broadcast"]
        self._must_compare_start = not (is_known or broadcasts) and self._comparisons < _COMPARISONS
        if not self._must_compare_start:
            begun.end()
        if broadcasts:
            self._converge_phase.broadcast()
            self._explore.gather_in()
            self._observe.begin_movement(is_kept=self._steer.keep(good=True))
        elif is_known and (found := begun.compare(told)):
            raise ReplicaMismatchError(
                f"The replicas start from different weights: {found}. Load the same checkpoint on every rank, or build "
                "the model under the same seed; pass broadcast=True to start from replica 0's, or exclude= for what "
                "is each rank's own."
            )
        self._gradients.compare(told)

    def _warn_of_one_replica(self) -> None:
        moves = self._settings.given["auto_lr"]
        follows_movement = moves and self._settings.controller.needs_movement
        if self._settings.size > 1 or (not moves and self._settings.probe is None):
            return
        asked = "probe=" if self._settings.probe is not None else "auto_lr=True"
        then = "the learning rate goes by how far the weights move alone" if follows_movement else "nothing is learned"
        if asked == "probe=" or not follows_movement:
            logger.warning(
                f"{asked} learns from the differences between replicas, and there is 1 replica: {then}. Start several "
                "processes with torchrun, or pass virtual_replicas=K with gradient accumulation."
            )

    def _tell_end(self) -> None:
        if self.steps != self.converged_at:
            self._replicas.tell_end(f"after step {self.steps}, before the end of its round{last_error()}")

    def _plain_settings(self) -> dict[str, Any]:
        """The run's settings as plain values, for error messages and for TensorBoard's hparams."""
        own = {
            "averaging.optimizer_state": self._converge_phase.policy,
            "replicas": self._settings.size,
            "members": self._replicas.members,
            "schedule": self._schedule_name,
        }
        pairs = zip(self._group_names, self._explore.plain_base_lr, strict=True)
        return {**self._settings.plain, **own, **{f"schedule_lr.{name}": lr for name, lr in pairs}}

    @property
    def _schedule_name(self) -> str:
        scheduler = self._schedule.scheduler
        return type(scheduler).__name__ if scheduler is not None else self._explore.overwritten_by or "constant"

    def _record(self, step: int) -> None:
        self._schedule.record(step, self._explore.plain_base_lr, self.gains)

    @property
    def _can_probe(self) -> bool:
        return self._settings.probe is not None and self._settings.size > 1

    def _listens(self) -> bool:
        return self._can_probe and self._steer.listens(self.steps)
