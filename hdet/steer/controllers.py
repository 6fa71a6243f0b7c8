"""The controllers of all factors: their states, and how a round changes them. No torch here.

A factor is the learning rate (one for all parameter groups, or one for each) or another hyperparameter. In every round
each has a level on every replica (:mod:`hdet.explore.design`). One least-squares fit explains the losses by the levels
of all factors, so that the effect of one is not taken for that of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from hdet.errors import check_gain, check_item, check_list, check_mapping, check_text
from hdet.explore.design import Design, Effect, levels, multipliers_of
from hdet.observe.slopes import UNKNOWN_SLOPES, ProbeLosses, Slopes
from hdet.steer.attribution import attribute
from hdet.steer.observation import Observation
from hdet.steer.one_slope import CentreState, OneSlope, saved_centre
from hdet.steer.posterior import Posterior
from hdet.steer.published import Published
from hdet.steer.report import UNKNOWN_JUDGEMENT, ControllerReport, HyperparameterReport, Judgement

Controller = Posterior | Published
"""A controller of learning rates."""


class Explored(Protocol):
    """What is needed of a :class:`hdet.Hyperparameter`. Positions and spreads are in its space, from its start."""

    name: str
    move: bool
    """Whether its centre moves."""

    def value(self, position: float, level: float = 0.0) -> float:
        """Its value on a replica at ``level``, with the centre at ``position``."""

    def spread_at(self, position: float) -> float:
        """The spread in force with the centre at ``position``."""

    def clamped(self, position: float) -> float:
        """The nearest position whose replicas lie inside the bounds."""


class RoundObservation(NamedTuple):
    """What was measured in a round, and when in the run it ended."""

    losses: tuple[float, ...]
    """[replica] mean training loss."""
    schedule: tuple[float, ...]
    """[group] the schedule's learning rate."""
    progress: float
    share: float
    height: float
    until: float
    final: float
    lag: float
    """As in :class:`hdet.steer.observation.Observation`."""
    probe: ProbeLosses | None
    """What the paired probe measured, if there was one."""
    movement: tuple[float, ...] = ()
    """[learning rate] how far the round took the weights; NaN, or empty, where it is not known."""
    area: float = 1.0
    """Mean height of the schedule over the run."""
    steps: float = math.inf
    given: bool = True
    """As in :class:`hdet.steer.observation.Observation`."""


class RoundSignal(NamedTuple):
    """What the losses of a round tell about the factors."""

    hypergradient: tuple[float, ...]
    """[learning rate] NaN where the losses do not tell."""
    effects: tuple[Effect, ...]
    """[other hyperparameter]"""
    slopes: Slopes | None
    """The probe's, of all learning rates together; ``None`` without a probe, or where its losses were not finite."""
    judgements: tuple[Judgement, ...] = (UNKNOWN_JUDGEMENT,)
    """[learning rate] What the controller makes of the round."""


class Controllers:
    """The states of all factors' controllers.

    Args:
        controller: of the learning rates.
        hyperparameter_controller: of the other hyperparameters.
        auto_lr: whether learning rates move.
        rates: number of learning rates: one for all parameter groups, or one for each.
        names: of the other hyperparameters.
        replicas: number of replicas.
        spread: ``alpha`` of the learning rates.
        design, seed: of :func:`hdet.explore.design.levels`.
    """

    def __init__(
        self,
        controller: Controller,
        hyperparameter_controller: OneSlope,
        *,
        auto_lr: bool,
        rates: int,
        names: Sequence[str],
        replicas: int,
        spread: float,
        design: Design,
        seed: int,
    ) -> None:
        self._controller, self._hyperparameter_controller = controller, hyperparameter_controller
        self._auto_lr = auto_lr
        self._names = tuple(names)
        self._replicas, self._spread, self._seed = replicas, spread, seed
        # A learning rate alone spreads evenly, as in the paper: there is nothing to be orthogonal to.
        self._design: Design = design if names or rates > 1 else "independent"
        self._factors = [f"lr/{i}" for i in range(rates if spread else 0)] + [f"hyperparameter/{n}" for n in names]
        self._latest: tuple[int, tuple[tuple[float, ...], ...]] | None = None  # a round and its levels
        self.lr_states: list[Any] = [controller.begin(1.0)] * rates
        """[learning rate]"""
        self.centre_states = [CentreState()] * len(self._names)
        """[other hyperparameter]"""

    def levels(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[factor][replica]; learning rates first, if they are spread."""
        if self._latest is None or self._latest[0] != round:
            of_round = levels(self._replicas, self._factors, design=self._design, seed=self._seed, round=round)
            self._latest = round, of_round
        return self._latest[1]

    def multipliers(self, rate: int, round: int) -> tuple[float, ...]:
        """[replica] ``rho`` of one learning rate."""
        if not self._spread:
            return (1.0,) * self._replicas
        return multipliers_of(self.levels(round)[rate], self._spread)

    def hyperparameter_levels(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[other hyperparameter][replica]"""
        return self.levels(round)[len(self._factors) - len(self._names) :]

    def probe_directions(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[learning rate][replica] how far, in [-1, 1], the probe moves a replica along the slow average's progress in
        the parameters of each learning rate. With one, 1 everywhere. With several, levels of the same design, by which
        the progress of each is separated from that of the others without more forward passes."""
        count = len(self.lr_states)
        if count == 1:
            return ((1.0,) * self._replicas,)
        names = [f"slow/{i}" for i in range(count)]
        return levels(self._replicas, names, design=self._design, seed=self._seed, round=round)

    @property
    def gains(self) -> tuple[float, ...]:
        """[learning rate]"""
        return tuple(state.gain for state in self.lr_states)

    def move(
        self, round: int, observation: RoundObservation, hyperparameters: Sequence[Explored] = ()
    ) -> ControllerReport:
        """End a round: update all states by what was observed in it.

        Args:
            round: its index.
            observation: what was measured.
            hyperparameters: the other hyperparameters, in the order of their names.
        """
        before = self.gains, self.centre_states
        spreads = [(h.spread_at(c.position), h.move) for h, c in zip(hyperparameters, self.centre_states, strict=True)]
        signal = self.update(round, observation, spreads)
        self.centre_states = [
            c._replace(position=h.clamped(c.position)) for h, c in zip(hyperparameters, self.centre_states, strict=True)
        ]
        report = self._report(round, hyperparameters, *before, signal)
        return report._replace(movement=observation.movement or report.movement)

    def rest(self, round: int, hyperparameters: Sequence[Explored] = ()) -> ControllerReport:
        """The report of a converge inside a round, which changes no state."""
        unknown = RoundSignal(
            (math.nan,) * len(self.lr_states), (Effect(math.nan, math.nan),) * len(self.centre_states), None
        )
        return self._report(round, hyperparameters, self.gains, self.centre_states, unknown)

    def roll_back(self, round: int, hyperparameters: Sequence[Explored] = (), *, divisor: float) -> ControllerReport:
        """The report of a round that is undone: its states are not updated, and all gains are divided."""
        report = self.rest(round, hyperparameters)
        self.divide_gains(divisor)
        return report._replace(next_gain=self.gains)

    def _report(
        self,
        round: int,
        hyperparameters: Sequence[Explored],
        gains: tuple[float, ...],
        centres: Sequence[CentreState],
        signal: RoundSignal,
    ) -> ControllerReport:
        return ControllerReport(
            multipliers=tuple(self.multipliers(i, round) for i in range(len(gains))),
            gain=gains,
            next_gain=self.gains,
            velocity=tuple(getattr(state, "velocity", math.nan) for state in self.lr_states),
            hypergradient=signal.hypergradient,
            slopes=UNKNOWN_SLOPES if signal.slopes is None else signal.slopes,
            movement=(math.nan,) * len(gains),
            judgements=signal.judgements,
            hyperparameters=tuple(
                HyperparameterReport(
                    name=h.name,
                    centre=h.value(before.position),
                    values=tuple(h.value(before.position, level) for level in of_replicas),
                    effect=effect.value,
                    error=effect.error,
                    next_centre=h.value(after.position),
                )
                for h, before, after, of_replicas, effect in zip(
                    hyperparameters,
                    centres,
                    self.centre_states,
                    self.hyperparameter_levels(round),
                    signal.effects,
                    strict=True,
                )
            ),
        )

    def update(
        self, round: int, observation: RoundObservation, spreads: Sequence[tuple[float, bool]] = ()
    ) -> RoundSignal:
        """Update every controller's state by one round.

        Args:
            round: its index.
            observation: what was measured.
            spreads: [other hyperparameter] its spread in force, and whether it may move.
        """
        of_round = self.levels(round)
        multipliers = [self.multipliers(i, round) for i in range(len(self.lr_states))]
        directions = self.probe_directions(round)
        found = attribute(observation.probe, of_round, multipliers, directions, observation.lag)
        rates = len(self.lr_states)
        movement = observation.movement or (math.nan,) * rates
        seen = [
            Observation(
                losses=observation.losses,
                multipliers=rhos,
                schedule=schedule,
                progress=observation.progress,
                share=observation.share,
                height=observation.height,
                until=observation.until,
                final=observation.final,
                probe=probe,
                movement=moved,
                area=observation.area,
                lag=observation.lag,
                steps=observation.steps,
                given=observation.given,
            )
            for rhos, schedule, probe, moved in zip(
                multipliers, observation.schedule[:rates], found.probes, movement, strict=True
            )
        ]
        updated = [self._controller.update(state, of) for state, of in zip(self.lr_states, seen, strict=True)]
        judgements: tuple[Judgement, ...] = (UNKNOWN_JUDGEMENT,) * rates
        if self._auto_lr and isinstance(posterior := self._controller, Posterior):
            states: list[Any] = [state for state, _ in updated]
            judgements = tuple(posterior.judge(state, of) for state, of in zip(states, seen, strict=True))
        if self._auto_lr:
            self.lr_states = [state for state, _ in updated]
        effects = tuple(found.effects[len(of_round) - len(self._names) :])
        self.centre_states = [
            self._hyperparameter_controller.update(
                state, effect.value, spread=spread, height=observation.height, share=observation.share
            )
            if moves
            else state
            for state, effect, (spread, moves) in zip(self.centre_states, effects, spreads, strict=True)
        ]
        slopes = tuple(math.nan if slope is None else slope for _, slope in updated)
        return RoundSignal(slopes, effects, found.slopes, judgements)

    def begin_at(self, gains: Sequence[float], positions: Sequence[float]) -> None:
        """Start from what another run has found.

        Args:
            gains: [learning rate]
            positions: [other hyperparameter] of its centre, in its space.
        """
        self.lr_states = [self._controller.begin(gain) for _, gain in zip(self.lr_states, gains, strict=False)]
        self.centre_states = [
            state._replace(position=position) for state, position in zip(self.centre_states, positions, strict=True)
        ]

    def divide_gains(self, divisor: float) -> None:
        """Divide all gains, and clear everything else but the centres: the rounds since are undone."""
        self.lr_states = [self._controller.cut(state, divisor) for state in self.lr_states]
        self.centre_states = [CentreState(state.position) for state in self.centre_states]

    def state(self) -> dict[str, Any]:
        """What must be saved, as plain values."""
        return {
            "controller": [list(state) for state in self.lr_states],
            "controller_kind": type(self._controller).__name__,
            "hyperparameters": {name: list(state) for name, state in zip(self._names, self.centre_states, strict=True)},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``TypeError`` or ``ValueError`` if :meth:`load` cannot."""
        gains = check_list("controller", check_item("The saved state", state, "controller"), "a list of controllers")
        if len(gains) != len(self.lr_states):
            raise ValueError(
                f"The saved state has {len(gains)} gains, this run {len(self.lr_states)}: another "
                "number of parameter groups, or another per_group=."
            )
        same = _kind_of(state) == type(self._controller).__name__
        for values in gains:
            if same:
                self._controller.restored(values)
            else:
                _gain_of(self._controller)(values)
        centres = check_item("The saved state", state, "hyperparameters")
        check_mapping("hyperparameters", centres, "a mapping of names to centres")
        if set(centres) != set(self._names):
            raise ValueError(
                f"The saved state has the hyperparameters {sorted(map(str, centres))}, this run "
                f"{sorted(self._names)}. Resume with the same hyperparameters=."
            )
        for name, values in centres.items():
            saved_centre(f"centre of {name}", values)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`. Of a state of another controller the gains are taken."""
        same = _kind_of(state) == type(self._controller).__name__
        restored = self._controller.restored if same else _gain_of(self._controller)
        self.lr_states = [restored(values) for values in state["controller"]]
        centres = state["hyperparameters"]
        self.centre_states = [saved_centre(f"centre of {name}", centres[name]) for name in self._names]


def _kind_of(state: Mapping[str, Any]) -> str:
    """Whose states a saved one holds. Where it does not say so, they are those of :class:`Published` if they have none
    of the running averages of a controller that went by slopes alone."""
    if "controller_kind" in state:
        kind = state["controller_kind"]
        return check_text("controller_kind", kind)
    has_averages = any(list(values)[3:4] not in ([[]], [()], []) for values in state["controller"])
    return "" if has_averages else Published.__name__


def _gain_of(controller: Controller) -> Callable[[Sequence[Any]], Any]:
    """From the values of another controller's state, whose first is the gain, the state to begin with."""

    def begin(values: Sequence[Any]) -> Any:
        first, *_ = check_list("controller", values, "a list that begins with the gain") or [None]
        return controller.begin(check_gain("controller.gain", first))

    return begin
