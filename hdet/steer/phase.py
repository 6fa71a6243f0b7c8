"""Steer, the last phase of a round: gains and centres move by what was observed, or the round is undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hdet.explore.hyperparameters import Hyperparameter
from hdet.observe.slopes import ProbeLosses
from hdet.replicas.agreement import Term
from hdet.schedules.course import Course
from hdet.steer.controllers import Controller, Controllers, RoundObservation
from hdet.steer.recovery import GAIN_DIVISOR, Recovery, check_recovery
from hdet.steer.report import ControllerReport

logger = logging.getLogger("hdet")

_FAR_ABOVE = 10.0


def is_probed(controller: Controller, course: Course, steps: int) -> bool:
    """Whether the round that ends after ``steps`` steps is one of those that a controller of one learning rate has
    probed, if nothing else is."""
    return not course.progress(steps) < controller.probe_from and course.passes(controller.probe_every, steps)


class SteerPhase:
    """Controllers and recovery over a run.

    Args:
        controllers: of all factors.
        controller: of the learning rates among them.
        course: of the run.
        hyperparameters: explored beside the learning rates.
        auto_lr: whether learning rates move.
        recovery: ``None`` where rounds are not undone.
    """

    def __init__(
        self,
        controllers: Controllers,
        controller: Controller,
        course: Course,
        hyperparameters: Sequence[Hyperparameter],
        *,
        auto_lr: bool,
        recovery: Recovery | None,
    ) -> None:
        self._controllers, self._controller, self._course = controllers, controller, course
        self._hyperparameters, self._auto_lr, self._recovery = tuple(hyperparameters), auto_lr, recovery
        self.has_given_rate = True
        """Whether the user chose the learning rate; else it was found, or left out."""
        self._has_warned = False

    @property
    def gains(self) -> tuple[float, ...]:
        """[learning rate] one for all parameter groups, or one for each."""
        return self._controllers.gains

    @property
    def positions(self) -> tuple[float, ...]:
        """[hyperparameter] of its centre, in its space."""
        return tuple(state.position for state in self._controllers.centre_states)

    def multipliers(self, rate: int, round: int) -> tuple[float, ...]:
        """[replica] ``rho`` of one learning rate."""
        return self._controllers.multipliers(rate, round)

    def levels(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[hyperparameter][replica]"""
        return self._controllers.hyperparameter_levels(round)

    def begin_at(self, gains: Sequence[float], positions: Sequence[float]) -> None:
        """Start from what another run has found: [learning rate] gains, [hyperparameter] positions."""
        self._controllers.begin_at(gains, positions)

    def listens(self, steps: int) -> bool:
        """Whether a probe after ``steps`` steps may move anything."""
        controller, course = self._controller, self._course
        moves = self._auto_lr and controller.wants_probe(course.progress(steps), controller.rests_after(course))
        return moves or any(h.move for h in self._hyperparameters)

    def is_probed(self, steps: int) -> bool:
        """Whether the round that ends after ``steps`` steps is to end with a probe, as long as :meth:`listens`."""
        # Where several factors share a probe, it takes all rounds to tell them apart.
        is_alone = len(self._controllers.gains) == 1 and not any(h.move for h in self._hyperparameters)
        return not is_alone or is_probed(self._controller, self._course, steps)

    def directions(self, round: int) -> tuple[tuple[float, ...], ...]:
        """How far the probe takes each replica; see :meth:`Controllers.probe_directions`."""
        return self._controllers.probe_directions(round)

    def begin(self) -> None:
        """The run begins."""
        if self._recovery is not None:
            self._recovery.begin()

    def move(
        self,
        steps: int,
        schedule: tuple[float, ...],
        losses: tuple[float, ...],
        probe: ProbeLosses | None,
        lag: float,
        movement: tuple[float, ...],
    ) -> ControllerReport:
        """End a round.

        Args:
            steps: taken so far.
            schedule: [parameter group] the base schedule's learning rate.
            losses: [replica] mean training loss of the round.
            probe: what the probe measured.
            lag: rounds of progress between the slow average and its trail.
            movement: [learning rate] how far the round took the weights; empty where it was not measured.
        """
        course = self._course
        seen = RoundObservation(
            losses=losses,
            schedule=schedule,
            progress=course.progress(steps),
            share=course.share,
            height=course.height(schedule[0]),
            until=self._controller.rests_after(course),
            lag=lag,
            probe=probe,
            movement=movement or (math.nan,) * len(self._controllers.gains),
            final=course.final,
            area=course.area,
            steps=course.converge_every,
            given=self.has_given_rate,
        )
        report = self._controllers.move(course.ended_round(steps), seen, self._hyperparameters)
        if self._recovery is not None:
            self._recovery.observe(losses)
        return report._replace(peak_lr=course.peak)

    def rest(self, steps: int) -> ControllerReport:
        """The report of a converge at which nothing moves."""
        report = self._controllers.rest(self._course.ended_round(steps), self._hyperparameters)
        return report._replace(peak_lr=self._course.peak)

    def terms(self) -> dict[str, Term]:
        """Whether this rank has a state to go back to."""
        return {"can restore": Term(float(self._recovery is not None and self._recovery.can_restore), min)}

    def keep(self, *, good: bool) -> bool:
        """Keep the state that the round has led to, for a later rollback, if it is ``good``: finite. Whether it was
        kept."""
        return self._recovery is not None and good and self._recovery.keep()

    def has_blown_up(
        self,
        steps: int,
        finite: Sequence[bool],
        losses: tuple[float, ...],
        *,
        agree: Callable[[float], float],
    ) -> bool:
        """Whether the round so far is to be undone. To be asked only if every rank can.

        Args:
            steps: taken so far.
            finite: [replica] whether its parameters, buffers and optimizer state are.
            losses: [replica] mean loss of the round; empty if none was reported, or the round is not over.
            agree: what all ranks make of a number of this rank; collective.

        Raises:
            DivergedError: if it is, after too many rollbacks.
        """
        if self._recovery is None:
            return False
        # While the controller may still move the gain, it can also take it back.
        may_move = not self._course.progress(steps) > self._controller.rests_after(self._course)
        return self._recovery.is_needed(finite, losses, watches_losses=may_move, agree=agree)

    def roll_back(self, steps: int) -> ControllerReport:
        """Put model and optimizer back to the last good state, and divide the gains."""
        assert self._recovery is not None
        self._recovery.restore()
        round = self._course.ended_round(steps)
        report = self._controllers.roll_back(round, self._hyperparameters, divisor=GAIN_DIVISOR)
        return report._replace(peak_lr=self._course.peak, cause=self._recovery.cause)

    def warn_of_gain(self) -> None:
        """Log once that the learning rate is far above the user's. Data learned by heart take it there, too."""
        gain = max(self.gains)
        if self._has_warned or not (self._auto_lr and self.has_given_rate and gain > _FAR_ABOVE):
            return
        self._has_warned = True
        logger.warning(
            f"auto_lr=True has raised the learning rate to {gain:.0f} times the given one. Where few training examples "
            "are seen many times that is wrong: watch the validation loss, and hold the rate near the given one with "
            "controller=hdet.controller.Posterior(bounds=(0.5, 2.0))."
        )

    def warn_of_rollback(self, steps: int) -> None:
        """Log it."""
        assert self._recovery is not None
        self._recovery.warn(steps)

    def restart(self) -> None:
        """The run goes on from a state that is being loaded."""
        if self._recovery is not None:
            self._recovery.copy_before_next_step()

    def close(self) -> None:
        """Keep no state for a rollback any more."""
        if self._recovery is not None:
            self._recovery.close()

    def facts(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "controller state": [
                tuple(state) for state in (*self._controllers.lr_states, *self._controllers.centre_states)
            ],
            "max_lr was given": self.has_given_rate,
            "hyperparameters at the start": [tuple(h.starts) for h in self._hyperparameters],
        }

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        state = self._controllers.state()
        return state if self._recovery is None else state | self._recovery.state()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot."""
        self._controllers.check_state(state)
        check_recovery(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self._controllers.load(state)
        if self._recovery is not None:
            self._recovery.load(state)
