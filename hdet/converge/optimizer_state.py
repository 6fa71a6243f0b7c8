r"""What a converge does with the optimizer's state: Adam's moments, momentum, step counts.

By policy::

    verify    it must agree between replicas, and a fingerprint checks it: at the first converges, then rarely
    average   v <- (1/N) sum_r v_r in fp32; counters become their maximum
    keep      each replica keeps its own
    reset     dropped at a round's end, and made anew by the optimizer's next step

Under every policy weights that an optimizer keeps in its state (Schedule-Free's ``z``) are averaged, and a replica that
was not finite gets the state of the others. Numbers that an optimizer keeps in its parameter groups (Prodigy's ``d``)
are state like any other, but that ``reset`` averages them. ``average`` reads all of the state at every converge; so
does every policy where rounds are undone. Else ``verify`` and ``keep`` read that of a sixteenth of the parameters at
each, in turn: what is not finite is found after 16 converges at the latest. :mod:`hdet.converge.optimizer_policy` says
which policy ``auto`` selects.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hdet.converge.finiteness import StateDesign
from hdet.converge.state_entries import Value, fingerprint_of, raw_values_of
from hdet.converge.state_sync import StateSync
from hdet.errors import ReplicaMismatchError
from hdet.replicas.agreement import digest
from hdet.replicas.topology import Replicas

logger = logging.getLogger("hdet")

ALWAYS_CHECKED = 3
"""The first converges, at each of which ``verify`` reads all of the state."""
CHECKED_EVERY = 32
"""After them ``verify`` reads it at every converge whose number is a multiple of this."""
PARTS = 16
"""At other converges ``verify`` and ``keep`` look for what is not finite in one of so many parts of the parameters."""


class StateInspection(NamedTuple):
    """A replica's optimizer state in four numbers, which replicas exchange; each below ``2**53``."""

    layout: int
    """Hash of which parameter has which values; -1 where it was not read."""
    finite: bool
    """Whether all floats that were read are finite, but for what is infinite by design."""
    bits: int
    """Hash of all bits; -1 where they were not read."""
    has_weights: bool
    """Whether it holds weights."""


NOT_INSPECTED = StateInspection(-1, True, -1, False)


class OptimizerState:
    """The state of one optimizer, and the policy by which it converges.

    Args:
        optimizer: whose state.
        policy: ``verify``, ``average``, ``keep`` or ``reset``.
        replicas: the group.
        bucket_bytes: size of one bucket.
        all_ranks: whether all members of a replica hold copies, which are averaged together.
        automatic: whether a ``verify`` that fails turns into ``average`` instead of an error.
        overlapped: whether rounds' averages are applied late. Moments cannot be corrected late (a second moment might
            become negative), so that they are averaged only where training waits: in a ``converge()`` between rounds.
        explored: keys of the parameter groups in which replicas are to differ.
        watches: whether all of the state is read at every converge, that of a single replica too.
        own: ids of parameters that are each rank's own, whose state is neither averaged nor compared.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: str,
        replicas: Replicas,
        bucket_bytes: int,
        *,
        all_ranks: bool = False,
        automatic: bool = False,
        overlapped: bool = False,
        explored: Collection[str] = (),
        watches: bool = False,
        own: frozenset[int] = frozenset(),
    ) -> None:
        self._optimizer, self.policy, self._replicas = optimizer, policy, replicas
        self._automatic, self._overlapped = automatic, overlapped
        self._sync = StateSync(optimizer, replicas, bucket_bytes, all_ranks=all_ranks, explored=explored, own=own)
        self._is_idle = replicas.size == 1
        self._watches = watches
        self._design = StateDesign(is_torch=type(optimizer).__module__.startswith("torch.optim"))
        self._may_reset = policy == "reset" and not (automatic and self._is_idle)
        self._inspections = self._part = 0
        # What inspect() has listed, for the converge() that follows and no later one: no step lies between the two.
        self._values: list[Value] | None = None
        self._has_weights = False
        self._has_warned = False

    @torch.no_grad()
    def inspect(self) -> StateInspection:
        """What this rank tells the others before a converge. Not collective. Reads all of the state under ``average``;
        under ``verify`` at the converges that :data:`ALWAYS_CHECKED` and :data:`CHECKED_EVERY` name."""
        if self._is_idle:
            return NOT_INSPECTED._replace(finite=self._is_finite())
        self._values = None
        is_checked = self._inspections < ALWAYS_CHECKED or self._inspections % CHECKED_EVERY == 0
        self._inspections += 1
        averages, verifies = self.policy == "average", self.policy == "verify" and is_checked
        if not (averages or is_checked or self._has_weights):
            return NOT_INSPECTED._replace(finite=self._is_finite())
        values = self._values = list(self._sync.values())
        self._warn_of_quantised()
        layout = digest([value.entry for value in values])
        reads_all, bits = averages or verifies or self._watches, -1
        finite = self._design.allows([(v.entry.path, v.current) for v in values]) if reads_all else self._is_finite()
        finite = finite and all(math.isfinite(float(value.current)) for value in self._sync.group_values())
        if verifies:
            bits = digest([layout, *(fingerprint_of(value.current) for value in values)])
        return StateInspection(layout, finite, bits, any(value.entry.is_weight for value in values))

    def _is_finite(self) -> bool:
        """Whether the state is finite: all of it where it is watched, else that of one of :data:`PARTS` parts of the
        parameters, another one each time."""
        if self._is_idle and not self._watches:
            return True
        if self._watches:
            return self._design.allows(self._sync.leaves())
        self._part = (self._part + 1) % PARTS
        return self._design.allows(self._sync.leaves(self._part, PARTS))

    @torch.no_grad()
    def converge(
        self, inspections: Sequence[StateInspection], excluded: Sequence[int], *, complete: bool
    ) -> tuple[tuple[int, ...], int]:
        """Do what the policy says. Collective: every replica must call it.

        Args:
            inspections: every replica's :meth:`inspect`, by replica.
            excluded: replicas whose parameters were not finite.
            complete: whether the converge ends a round.

        Returns:
            The replicas that were not finite, in parameters or state, and the bytes this rank sent.

        Raises:
            ReplicaMismatchError: on every rank: the state differs under ``verify``, or cannot be averaged because
                replicas have state of different shapes.
        """
        if self._is_idle:
            if complete and self._may_reset:
                self._reset()
            return tuple(excluded), 0
        values, self._values = self._values, None
        self._has_weights = self._has_weights or any(one.has_weights for one in inspections)
        everyone = range(self._replicas.size)
        sources = [r for r in everyone if r not in excluded and inspections[r].finite]
        if not sources:  # a replica whose buffers are not finite may have state that is
            sources = [r for r in everyone if inspections[r].finite]
        if not sources:  # it is lost on all: finite parameters must do
            sources = [r for r in everyone if r not in excluded]
        nonfinite = tuple(r for r in everyone if r in excluded or r not in sources)
        if len({inspections[r].bits for r in sources}) > 1:
            self._handle_mismatch()
        is_late = complete and self._overlapped
        layouts = [one.layout for one in inspections]
        sent = 0
        if self.policy == "average" and not is_late:
            sent += self._sync.run(layouts, sources, lambda entry: entry.kind != "quantised", values, copy=False)
            self._warn_of_quantised()
        elif self._has_weights or (self._may_reset and any(True for _ in self._sync.group_values())):
            in_groups = len(self._sync.parameters()) if self._may_reset else math.inf
            sent += self._sync.run(
                layouts, sources, lambda entry: entry.is_weight or entry.parameter >= in_groups, values, copy=False
            )
        if complete and self._may_reset:
            self._reset()
        elif nonfinite and not is_late:
            sent += self.heal([r for r in everyone if r not in sources])
        return nonfinite, sent

    @torch.no_grad()
    def heal(self, nonfinite: Sequence[int]) -> int:
        """Copy the state of the first finite replica into those that were not finite. Under ``average`` these have the
        mean already, and get only what is not averaged. Collective; returns the bytes this rank sent."""
        sources = [r for r in range(self._replicas.size) if r not in nonfinite]
        if self._is_idle or not nonfinite or not sources:
            return 0
        is_averaged = self.policy == "average" and not self._overlapped
        return self._sync.run(None, sources, lambda entry: not is_averaged or entry.kind == "quantised", copy=True)

    def copy_from_first(self) -> None:
        """Write replica 0's state into that of the others. Collective."""
        if not self._is_idle:
            self._sync.run(None, [0], lambda entry: True, copy=True)

    def _warn_of_quantised(self) -> None:
        if self._sync.has_quantised and self.policy == "average" and not self._has_warned:
            self._has_warned = True
            if self._replicas.writer:
                logger.warning("Quantised optimizer state cannot be averaged: each replica keeps its own.")

    def _handle_mismatch(self) -> None:
        """Under ``verify`` the states differ: average them from now on, or raise on every rank. Collective."""
        if self._automatic:
            self.policy = "average"
            if self._replicas.writer:
                logger.warning(
                    "The replicas' optimizer states differ, though their gradients should be shared and the state made "
                    'of them alone. From now on it is averaged. Pass optimizer_state="average" if that is right.'
                )
            return
        raise ReplicaMismatchError(
            f'The replicas\' optimizer states differ ({self._first_difference()}), and optimizer_state="verify" says '
            "they agree. They do if gradients are shared, and neither weight decay that is added to the gradient nor "
            'explored momentum or betas enter the state. Else pass optimizer_state="average", or "keep" or "reset".'
        )

    def _first_difference(self) -> str:
        hashes = [
            (value.entry.parameter, str(value.entry.path[-1]), fingerprint_of(value.current))
            for value in self._sync.values()
        ]
        rows = self._replicas.all_gather_object(hashes)
        members = self._replicas.members
        for i in range(len(rows)):
            pairs = zip(rows[i], rows[i % members], strict=False)
            differing = [own for own, first in pairs if own != first]
            if differing:
                index, key, _ = differing[0]
                ranks = f"{self._replicas.name_of(i)} against {self._replicas.name_of(0)}"
                count = len(self._sync.parameters())
                owner = f"parameter {index}" if index < count else f"parameter group {index - count}"
                return f"{key!r} of {owner}, {ranks}"
        return "its layout"

    def _reset(self) -> None:
        """Drop everything but weights."""
        state = self._optimizer.state
        if type(self._optimizer).__name__ == "Adagrad":  # makes its state in the constructor only
            for group in self._optimizer.param_groups:
                for p in group["params"]:
                    state[p]["sum"].fill_(group["initial_accumulator_value"])
                    state[p]["step"].zero_()
            return
        with_weights = {value.entry.parameter for value in self._sync.values() if value.entry.is_weight}
        for index, p in enumerate(self._sync.parameters()):
            if index not in with_weights:
                state.pop(p, None)
                continue
            for value in raw_values_of(index, p, state[p]):
                current = value.current
                if not value.entry.is_weight and isinstance(current, Tensor):
                    current.zero_()
