"""Centres: what each factor's controller remembers, and how a round moves its centre. Pure functions of plain floats.

A factor is the learning rate (one for all parameter groups, or one for each) or another hyperparameter. In every round
each has a level on every replica (:mod:`hdet.explore.design`); the losses of all are explained together, so that the
effect of one is not taken for that of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hdet.explore.design import Design, Effect, effects, levels, multipliers_of
from hdet.observe.slopes import ProbeLosses, Slopes, level_of, slopes_of
from hdet.steer.controllers import Controller
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import CentreState, OneSlope


class RoundObservation(NamedTuple):
    """Everything that is known of a round when it ends, but for the levels."""

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
    """As in :class:`hdet.steer.controller.Observation`."""
    probe: ProbeLosses | None
    """What the paired probe measured, if there was one."""


class RoundSignal(NamedTuple):
    """What a round said."""

    hypergradient: tuple[float, ...]
    """[learning rate] NaN where nothing was said."""
    effects: tuple[Effect, ...]
    """[other hyperparameter]"""
    slopes: Slopes | None
    """What the probe said of all learning rates together; ``None`` without one, or where it was not finite."""


class Centres:
    """The centres of all factors.

    Args:
        controller: of the learning rates.
        one_slope: of the other hyperparameters.
        auto_lr: whether learning rates move.
        rates: number of learning rates explored: 0 without a spread, else 1 or one for each group.
        names: of the other hyperparameters.
        replicas: number of replicas.
        spread: ``alpha`` of the learning rates.
        design, seed: of :func:`hdet.explore.design.levels`.
    """

    def __init__(
        self,
        controller: Controller,
        one_slope: OneSlope,
        *,
        auto_lr: bool,
        rates: int,
        names: Sequence[str],
        replicas: int,
        spread: float,
        design: Design,
        seed: int,
    ) -> None:
        self._controller, self._one_slope, self._auto_lr = controller, one_slope, auto_lr
        self._names = tuple(names)
        self._replicas, self._spread, self._seed = replicas, spread, seed
        # A learning rate alone spreads evenly, as in the paper: there is nothing to be orthogonal to.
        self._design: Design = design if names or rates > 1 else "independent"
        self._factors = [f"lr/{i}" for i in range(rates if spread else 0)] + [f"hyperparameter/{n}" for n in names]
        self._drawn: tuple[int, tuple[tuple[float, ...], ...]] | None = None  # a round and its levels
        self.learning_rates = [ControllerState()] * rates
        """[learning rate] gain and memory."""
        self.hyperparameters = [CentreState()] * len(self._names)
        """[other hyperparameter] position and memory."""

    def levels(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[factor][replica]; learning rates first, if they are spread."""
        if self._drawn is None or self._drawn[0] != round:
            drawn = levels(self._replicas, self._factors, design=self._design, seed=self._seed, round=round)
            self._drawn = round, drawn
        return self._drawn[1]

    def multipliers(self, rate: int, round: int) -> tuple[float, ...]:
        """[replica] ``rho`` of one learning rate."""
        if not self._spread:
            return (1.0,) * self._replicas
        return multipliers_of(self.levels(round)[rate], self._spread)

    def held(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[other hyperparameter][replica] levels."""
        return self.levels(round)[len(self._factors) - len(self._names) :]

    def directions(self, round: int) -> tuple[tuple[float, ...], ...]:
        """[learning rate][replica] by how much the probe takes a replica along the slow average's progress in the
        parameters of each. With one learning rate, all the way. With several, some forward and some back: then the
        progress of each can be told from that of the others, with not one forward pass more."""
        count = len(self.learning_rates)
        if count == 1:
            return ((1.0,) * self._replicas,)
        names = [f"slow/{i}" for i in range(count)]
        return levels(self._replicas, names, design=self._design, seed=self._seed, round=round)

    def observe(self, round: int, seen: RoundObservation, spreads: Sequence[tuple[float, bool]] = ()) -> RoundSignal:
        """Move every centre by what a round said.

        Args:
            round: its index.
            seen: what was measured.
            spreads: [other hyperparameter] its spread in force, and whether it may move.
        """
        drawn = self.levels(round)
        spread_rates = len(drawn) - len(self._names)
        found = [Effect(math.nan, math.nan)] * len(drawn)
        if seen.probe is not None:
            odd = [(above - below) / 2 for above, below in zip(seen.probe.above, seen.probe.below, strict=True)]
            found = effects(drawn, odd)
        probes = [_without_others(seen.probe, drawn, found, i) for i in range(len(self.learning_rates))]
        together = None
        if seen.probe is not None:
            together = slopes_of(seen.probe, self.multipliers(0, round), seen.lag)
        if together is not None and len(self.learning_rates) > 1:
            together = self._divide(round, seen, probes, together)
        slopes = []
        for i, state in enumerate(self.learning_rates):
            observation = Observation(
                losses=seen.losses,
                multipliers=self.multipliers(i, round),
                schedule=seen.schedule[i],
                progress=seen.progress,
                share=seen.share,
                height=seen.height,
                until=seen.until,
                final=seen.final,
                probe=probes[i],
                lag=seen.lag,
            )
            moved, slope = self._controller.update(state, observation)
            slopes.append(math.nan if slope is None else slope)
            if self._auto_lr:
                self.learning_rates[i] = moved
        for i, (effect, (spread, moves)) in enumerate(zip(found[spread_rates:], spreads, strict=True)):
            if moves:
                self.hyperparameters[i] = self._one_slope.update(
                    self.hyperparameters[i], effect.value, spread=spread, height=seen.height, share=seen.share
                )
        return RoundSignal(tuple(slopes), tuple(found[spread_rates:]), together)

    def _divide(
        self, round: int, seen: RoundObservation, probes: list[ProbeLosses | None], first: Slopes
    ) -> Slopes | None:
        """With several learning rates: put into ``probes`` each one's own share of the lasting progress, by
        :meth:`directions`, and an equal share of the noise, which nothing divides; the far point, where all have gone
        forward, is compared with all of one step forward. Returns the sums."""
        probe, lag, count = seen.probe, seen.lag, len(self.learning_rates)
        assert probe is not None
        odd = [(above - below) / 2 for above, below in zip(probe.slow_above, probe.slow_below, strict=True)]
        progress = [-effect.value / lag for effect in effects(self.directions(round), odd)]
        known = [a for a in progress if math.isfinite(a)]
        debiased = math.fsum(known) * count / max(1, len(known))
        further = first.further
        if math.isfinite(further):
            further = math.fsum(probe.far) / len(odd) - (level_of(probe) - first.noise - lag * debiased)
        raws = []
        for i, own in enumerate(probes):
            if own is None or not math.isfinite(progress[i]):
                probes[i] = None  # this round does not say
                continue
            # The mean of m and its mirror image, less an equal share of what lies between that and the slow average.
            there = level_of(own) - first.noise / count
            above, below = there - lag * progress[i], there + lag * progress[i]
            probes[i] = own._replace(
                slow_above=(above,) * len(odd), slow_below=(below,) * len(odd), far=(above + further,) * len(odd)
            )
            slopes = slopes_of(probes[i], self.multipliers(i, round), lag)  # type: ignore[arg-type]
            raws.append(math.nan if slopes is None else slopes.raw)
        if not known:
            return None
        return Slopes(math.fsum(raws) if raws else math.nan, debiased, first.noise, further)

    def cut(self, factor: float) -> None:
        """Divide all gains, and forget what was seen: the run has been taken back."""
        self.learning_rates = [ControllerState(gain=state.gain / factor) for state in self.learning_rates]
        self.hyperparameters = [CentreState(place.position) for place in self.hyperparameters]

    def state(self) -> dict[str, Any]:
        """What must be saved, as plain values."""
        return {
            "controller": [list(state) for state in self.learning_rates],
            "hyperparameters": {
                name: list(place) for name, place in zip(self._names, self.hyperparameters, strict=True)
            },
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if :meth:`load` cannot."""
        if len(state["controller"]) != len(self.learning_rates):
            raise ValueError(
                f"The saved state has {len(state['controller'])} gains, this run {len(self.learning_rates)}: another "
                "number of parameter groups, or another per_group=."
            )
        if sorted(state["hyperparameters"]) != sorted(self._names):
            raise ValueError(
                f"The saved state has the hyperparameters {sorted(state['hyperparameters'])}, this run "
                f"{sorted(self._names)}. Resume with the same hyperparameters=."
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self.learning_rates = [ControllerState(*values) for values in state["controller"]]
        self.hyperparameters = [CentreState(*state["hyperparameters"][name]) for name in self._names]


def _without_others(
    probe: ProbeLosses | None, drawn: Sequence[Sequence[float]], found: Sequence[Effect], own: int
) -> ProbeLosses | None:
    """The probe's losses as they would be if only one factor had differed between the replicas."""
    if probe is None or len(drawn) == 1:
        return probe
    others = [
        math.fsum(drawn[h][r] * found[h].value for h in range(len(drawn)) if h != own and math.isfinite(found[h].value))
        for r in range(len(probe.above))
    ]
    return probe._replace(
        above=tuple(loss - other for loss, other in zip(probe.above, others, strict=True)),
        below=tuple(loss + other for loss, other in zip(probe.below, others, strict=True)),
    )
