"""Converge, the second phase of a round: weights, optimizer state, slow averages and outer momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hdet.converge.averager import Averager, Inspection
from hdet.converge.optimizer_state import NOT_INSPECTED, OptimizerState, StateInspection
from hdet.converge.outer import OuterMomentum
from hdet.converge.pending import Averaged, Pending
from hdet.converge.slow_average import SlowAverage
from hdet.model.weights import Weights
from hdet.replicas.agreement import Term, same
from hdet.replicas.topology import Replicas


class Findings(NamedTuple):
    """What a replica has told of its model and its optimizer's state."""

    weights: Inspection
    optimizer: StateInspection


class ConvergePhase:
    """Makes the replicas one model, in place.

    Args:
        averager: of the weights.
        optimizer_state: of the optimizer.
        weights: the averager's.
        replicas: who takes part.
        slow: follows the mean where it is told to; ``None`` for no probe.
        outer: takes the mean further; ``None`` for the plain average.
    """

    def __init__(
        self,
        averager: Averager,
        optimizer_state: OptimizerState,
        weights: Weights,
        replicas: Replicas,
        slow: SlowAverage | None,
        outer: OuterMomentum | None,
    ) -> None:
        self._averager, self._optimizer_state = averager, optimizer_state
        self.weights, self._replicas, self.slow, self._outer = weights, replicas, slow, outer
        self.layout = 0
        """Hash of the model as :meth:`terms` found it."""
        self._version = averager.version()

    @property
    def policy(self) -> str:
        """What is done with the optimizer's state."""
        return self._optimizer_state.policy

    @property
    def lag(self) -> float:
        """Rounds of progress between the slow average and its trail."""
        return self.slow.lag if self.slow else 1.0

    def terms(self, *, converges: bool) -> dict[str, Term]:
        """What this rank tells the others of its model; not collective. ``converges``: whether they may average."""
        self.layout, finite, constants = self._averager.inspect()
        state = self._optimizer_state.inspect() if converges else NOT_INSPECTED
        return {
            "written": Term(float(self._averager.version() != self._version), max),
            "finite": Term(float(finite), min),
            "constants": Term(float(constants), same),
            "state layout": Term(float(state.layout), same),
            "state finite": Term(float(state.finite), min),
            "state bits": Term(float(state.bits), same),
            "state has weights": Term(float(state.has_weights), max),
        }

    def findings(self, told: Sequence[Mapping[str, float]]) -> list[Findings]:
        """What the replicas' terms say, by replica."""
        return [
            Findings(
                Inspection(self.layout, bool(one["finite"]), int(one["constants"])),
                StateInspection(
                    int(one["state layout"]),
                    bool(one["state finite"]),
                    int(one["state bits"]),
                    bool(one["state has weights"]),
                ),
            )
            for one in told
        ]

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers; the first bucket may travel with them. Collective."""
        return self._averager.gather(numbers)

    def average(
        self, found: Sequence[Findings], *, complete: bool, move_slow: bool = False, return_points: bool = False
    ) -> Averaged:
        """Average now. Collective.

        Args:
            found: by replica.
            complete: whether this ends a round.
            move_slow: whether the slow average follows.
            return_points: whether to return where this replica stood.

        Raises:
            DivergedError: on every replica, with nothing changed, if none of them is finite.
        """
        slow = self.slow if move_slow else None
        averaged = self._averager.average([one.weights for one in found], slow, return_points=return_points)
        states = [one.optimizer for one in found]
        excluded, sent = self._optimizer_state.converge(states, averaged.excluded, complete=complete)
        return averaged._replace(excluded=excluded, bytes=averaged.bytes + sent)

    def start(self, found: Sequence[Findings]) -> Pending:
        """Send what is to be averaged and return at once; :meth:`land` applies the mean. Collective."""
        pending = self._averager.start([one.weights for one in found])
        self._optimizer_state.converge([one.optimizer for one in found], (), complete=True)
        return pending

    def land(self, pending: Pending) -> Averaged:
        """Apply the average that has been under way."""
        averaged = pending.finish()
        self._optimizer_state.heal(averaged.excluded)
        return averaged

    def step_outer(self) -> None:
        """Take the mean, at which all replicas are, as far as the outer optimizer says."""
        if self._outer is not None:
            self._outer.step(self._averager.buckets())
            self.weights.written()
            self._averager.set_reference()

    def settle(self) -> None:
        """What is written from here on was written since the replicas converged."""
        self._version = self._averager.version()

    def restart(self) -> None:
        """The model may be another from here on, on every replica."""
        self._averager.restart()
        self.settle()

    def roll_back(self) -> None:
        """The model has been put back: begin all averages again."""
        self._averager.restart()
        if self.slow is not None:
            self.slow.restart()
        if self._outer is not None:
            self._outer.restart()

    @property
    def shard(self) -> tuple[int, int]:
        """Which shard of the model this rank holds, of how many."""
        return (0, 1) if self.weights.whole else (self._replicas.member, self._replicas.members)

    def state(self) -> dict[str, Any]:
        """What must be saved: of a sharded model this rank's part."""
        return {
            "slow_average": [list(part) for part in self.slow.state()] if self.slow else [],
            "slow_rounds": self.slow.rounds if self.slow else 0,
            "outer": [list(part) for part in self._outer.state()] if self._outer else [],
            "shard": list(self.shard),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if :meth:`load` cannot."""
        shard = tuple(state.get("shard", (0, 1)))
        if (state["slow_average"] or state.get("outer")) and shard != self.shard:
            raise ValueError(
                f"The saved state is of shard {shard[0]} of {shard[1]}, and this rank holds shard {self.shard[0]} of "
                f"{self.shard[1]}. The averages of the probe and of the outer momentum are sharded like the "
                "parameters: save the state of every shard, load each where it was."
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        if self.slow is not None:
            self.slow.load(state["slow_average"], state["slow_rounds"])
        if self._outer is not None:
            self._outer.load(state.get("outer", ()))
