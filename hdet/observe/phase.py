"""Observe, the third phase of a round: the replicas' losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hdet.converge.pending import Point
from hdet.observe.movement import MovementMeter
from hdet.observe.paired_probe import PairedProbe
from hdet.observe.round_losses import RoundLosses
from hdet.observe.slopes import ProbeLosses
from hdet.replicas.agreement import Term


class ObservePhase:
    """The training losses of a round, and the probe at its end.

    Args:
        losses: of all replicas.
        probe: ``None`` for none.
        meter: of the weights' movement; ``None`` where nothing asks for it.
    """

    def __init__(self, losses: RoundLosses, probe: PairedProbe | None, meter: MovementMeter | None) -> None:
        self._losses, self._probe, self._meter = losses, probe, meter
        # Bound once: they are called in every step.
        self.check = losses.check
        """What :attr:`add` takes, or the error that says what is wrong with a loss; changes nothing."""
        self.add = losses.add
        """Add a step's losses."""

    def terms(self) -> dict[str, Term]:
        """What this process tells the others. Waits for the device."""
        can_probe = self._probe is not None and self._probe.batches.ready
        return {**self._losses.terms(), "can probe": Term(float(can_probe), min)}

    def collect(self, told: Sequence[Mapping[str, float]]) -> None:
        """Take in what every replica has told."""
        self._losses.collect(told)

    @property
    def means(self) -> tuple[float, ...]:
        """[replica] mean training loss of the round so far; NaN for a replica that reported none."""
        return self._losses.means

    @property
    def knows_losses(self) -> bool:
        """Whether any replica has reported a loss in this round."""
        return not self._losses.is_empty

    def probe(
        self,
        points: Sequence[Point],
        directions: Sequence[Sequence[float]],
        settings: Iterable[AbstractContextManager[None]],
    ) -> ProbeLosses:
        """Every replica's losses at the points; see :meth:`PairedProbe.evaluate`. Collective."""
        assert self._probe is not None
        return self._probe.evaluate(points, directions, settings)

    def keep(self, batch: Any) -> None:
        """Let a probe without batches of its own keep the batch of a step."""
        if self._probe is not None:
            self._probe.batches.keep(batch)

    def movement(self) -> tuple[float, ...]:
        """How far the round took the weights; see :meth:`MovementMeter.measure`. Collective."""
        return () if self._meter is None else self._meter.measure()

    def begin(self) -> None:
        """The run has begun, or goes on: its first step is over."""
        if self._meter is not None:
            self._meter.begin_late()

    def begin_round(self) -> None:
        """The round's losses have been used."""
        self._losses.begin_round()

    def begin_movement(self, *, is_kept: bool) -> None:
        """The weights are where the next round begins, and a rollback keeps them or not."""
        if self._meter is not None:
            self._meter.begin(is_kept=is_kept)

    def begin_movement_inside(self, part: float) -> None:
        """The weights have converged inside a round, of which this part is still to come."""
        if self._meter is not None:
            self._meter.begin_inside(part)

    def close(self) -> None:
        """Keep nothing any more."""
        if self._meter is not None:
            self._meter.close()

    def restart(self, part: float) -> None:
        """Forget all losses, batches and where the round began, of which a part is still to come."""
        self._losses.restart()
        if self._meter is not None:
            self._meter.restart(part)
        if self._probe is not None:
            self._probe.batches.clear()

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        return self._losses.state()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot."""
        self._losses.check_state(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self._losses.load(state)
