"""Converge, the second phase of a round: weights, optimizer state, slow averages and outer momentum."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdet.converge.averager import Averager, Inspection
from hdet.converge.optimizer_state import OptimizerState, StateInspection
from hdet.converge.outer import OuterMomentum
from hdet.converge.pending import Averaged, Pending
from hdet.converge.slow_average import SlowAverage
from hdet.errors import check_instance, check_item, check_list, check_whole, shown
from hdet.model.load_watch import LoadWatch
from hdet.model.weights import Weights
from hdet.replicas.agreement import Term, same
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")


class Findings(NamedTuple):
    """What a replica has told of its model and its optimizer's state."""

    weights: Inspection
    optimizer: StateInspection

    @property
    def finite(self) -> bool:
        """Whether parameters, buffers and optimizer state are."""
        return self.weights.finite > 0 and self.weights.untrained_finite and self.optimizer.finite


def check_parts(name: str, parts: Sequence[Any], sizes: Sequence[int] | None) -> None:
    """Raise TypeError or ValueError unless these are pairs of flat tensors, one pair for each bucket.

    Args:
        name: of what was saved.
        parts: it.
        sizes: elements of each bucket; ``None`` where they are not known, or nothing will be done with it.
    """
    rule = "a pair of flat tensors, finite, for each bucket of the trainable parameters"
    found = []
    for part in parts:
        tensors = check_list(name, part, rule, length=2)
        for tensor in tensors:
            check_instance(name, tensor, Tensor, rule)
            if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise TypeError(f"Invalid {name} of dtype {tensor.dtype}. Must be {rule}.")
            if tensor.dim() != 1 or tensor.is_meta or tensor.layout != torch.strided:
                raise ValueError(f"Invalid {name} of shape {tuple(tensor.shape)}. Must be {rule}.")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"Invalid {name}: it is not finite. Must be {rule}. Load an earlier checkpoint.")
        if tensors[0].shape != tensors[1].shape:
            raise ValueError(f"Invalid {name}: a pair of {[t.numel() for t in tensors]} elements. Must be {rule}.")
        found.append(tensors[0].numel())
    if found and sizes is not None and found != list(sizes):
        raise ValueError(
            f"The saved {name} has buckets of {shown(found)} elements, and the trainable parameters of this run lie in "
            f"buckets of {shown(list(sizes))}: other parameters are frozen, or another bucket_mib. Freeze or release "
            "the same layers before loading, and resume with the same averaging=."
        )


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
        self._watch: LoadWatch | None = None

    @property
    def follows_loads(self) -> bool:
        """Whether it keeps copies of the weights from one round to the next, which others make void."""
        return self.slow is not None or self._outer is not None or self._averager.sends_differences

    def watch(self, watch: LoadWatch) -> None:
        """Let ``watch`` say whether the model was given other weights."""
        self._watch = watch

    def forget(self) -> None:
        """The model was given other weights, on some replica: begin anew what is kept of the old ones."""
        self._averager.forget()
        for part in (self.slow, self._outer):
            if part is not None:
                part.restart()
        if self._watch is not None:
            self._watch.forget()

    def trained(self) -> list[Tensor]:
        """The tensors that are trained now."""
        return self._averager.trained()

    def close(self) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.close()
        self._lost: tuple[str, ...] = ()  # of the average under way

    @property
    def policy(self) -> str:
        """What is done with the optimizer's state."""
        return self._optimizer_state.policy

    @property
    def lag(self) -> float:
        """Rounds of progress between the slow average and its trail."""
        return self.slow.lag if self.slow else 1.0

    def terms(self) -> dict[str, Term]:
        """What this rank tells the others of its model before they may average. Not collective."""
        self.layout, finite, constants, untrained_finite = self._averager.inspect()
        state = self._optimizer_state.inspect()
        return {
            "written": Term(2.0 if self._has_loaded else float(self._averager.version() != self._version), max),
            "finite": Term(float(finite), min),
            "untrained finite": Term(float(untrained_finite), min),
            "constants": Term(float(constants), same),
            "state layout": Term(float(state.layout), same),
            "state finite": Term(float(state.finite), min),
            "state bits": Term(float(state.bits), same),
            "state has weights": Term(float(state.has_weights), max),
        }

    @property
    def _has_loaded(self) -> bool:
        return self._watch is not None and self._watch.has_loaded

    @property
    def was_written(self) -> bool:
        """Whether a trained parameter was written here since the replicas converged. Not collective."""
        return self._averager.version() != self._version

    def findings(self, told: Sequence[Mapping[str, float]]) -> list[Findings]:
        """What the replicas' terms say, by replica."""
        return [
            Findings(
                Inspection(self.layout, one["finite"], int(one["constants"]), bool(one["untrained finite"])),
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
        if slow is not None and slow.follow(self.layout):
            self._say("the probe's slow average")
        averaged = self._averager.average([one.weights for one in found], slow, return_points=return_points)
        states = [one.optimizer for one in found]
        excluded, sent = self._optimizer_state.converge(states, averaged.excluded, complete=complete)
        return averaged._replace(excluded=excluded, bytes=averaged.bytes + sent, nonfinite=_lost(found))

    def start(self, found: Sequence[Findings]) -> Pending:
        """Send what is to be averaged and return at once; :meth:`land` applies the mean. Collective."""
        weights = [one.weights for one in found]
        if any(one.finite for one in found):  # by when the mean is applied, state that is not finite will have spread
            weights = [one.weights._replace(finite=one.weights.finite * one.optimizer.finite) for one in found]
        pending = self._averager.start(weights)
        self._optimizer_state.converge([one.optimizer for one in found], (), complete=True)
        self._lost = _lost(found)
        return pending

    def land(self, pending: Pending) -> Averaged:
        """Apply the average that has been under way."""
        averaged = pending.finish()
        self._optimizer_state.heal(averaged.excluded)
        return averaged._replace(nonfinite=self._lost)

    def step_outer(self) -> None:
        """Take the mean, at which all replicas are, as far as the outer optimizer says."""
        if self._outer is not None:
            if self._outer.follow(self.layout):
                self._say("the outer momentum")
            self._outer.step(self._averager.buckets())
            self.weights.written()
            self._averager.set_reference()

    def _say(self, what: str) -> None:
        if self._replicas.writer:
            logger.info(f"Other parameters are trained than in the last round: {what} begins again.")

    def is_finite(self) -> bool:
        """Whether the outer optimizer has left the parameters finite; without one they are, after an average."""
        return self._outer is None or all(bucket.is_finite() for bucket in self._averager.buckets())

    def broadcast(self) -> None:
        """Make all replicas what replica 0 is: weights and optimizer state. Collective."""
        self._averager.broadcast()
        self._optimizer_state.copy_from_first()
        self.restart()

    def settle(self) -> None:
        """What is written from here on was written since the replicas converged."""
        self._version = self._averager.version()
        if self._watch is not None:
            self._watch.settle()

    def restart(self) -> None:
        """The model may be another from here on, on every replica."""
        self._averager.restart()
        self._version = self._averager.version()
        if self._watch is not None:
            self._watch.restart()

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
        """Raise TypeError or ValueError if :meth:`load` cannot."""
        rule = "a pair of whole numbers"
        shard = tuple(
            check_whole("shard", n, rule) for n in check_list("shard", state.get("shard", (0, 1)), rule, length=2)
        )
        what, pairs = "The saved state", "a pair of flat tensors for each bucket"
        slow = check_list("slow_average", check_item(what, state, "slow_average"), pairs)
        rounds = check_whole("slow_rounds", check_item(what, state, "slow_rounds"), ">= 0", lambda n: n >= 0)
        outer = check_list("outer", state.get("outer", ()), pairs)
        if bool(slow) != bool(rounds):
            raise ValueError(
                f"The saved state has slow_rounds={rounds} and {len(slow)} buckets of slow averages: it was cut."
            )
        if (slow or outer) and shard != self.shard:
            raise ValueError(
                f"The saved state is of shard {shard[0]} of {shard[1]}, and this rank holds shard {self.shard[0]} of "
                f"{self.shard[1]}. The averages of the probe and of the outer momentum are sharded like the "
                "parameters: save the state of every shard, load each where it was."
            )
        sizes = self._averager.sizes()
        check_parts("slow_average", slow, None if self.slow is None else sizes)
        check_parts("outer", outer, None if self._outer is None else sizes)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        if self.slow is not None:
            self.slow.load(state["slow_average"], state["slow_rounds"])
        if self._outer is not None:
            self._outer.load(state.get("outer", ()))


def _lost(found: Sequence[Findings]) -> tuple[str, ...]:
    """What is finite on no replica, beside parameters: without these there is no average."""
    kinds = {
        "buffers": [one.weights.untrained_finite for one in found],
        "optimizer state": [one.optimizer.finite for one in found],
    }
    return tuple(kind for kind, finite in kinds.items() if not any(finite))
