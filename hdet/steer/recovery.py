"""Rollback: finding that a round blew up, and restoring the last good converged state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hdet.errors import DivergedError, check_item, check_list, check_number, check_whole
from hdet.model.snapshot import Snapshot
from hdet.model.step_hook import BeforeStep
from hdet.model.weights import Weights, reshard, weights_of
from hdet.observe.training_loss import finite_mean
from hdet.steer.loss_level import LossLevel

logger = logging.getLogger("hdet")

GAIN_DIVISOR = 3.0
"""What a rollback divides the gain by."""
MAX_ROLLBACKS = 8
_JUMP = 3.0
"""A round blew up if its mean loss jumps by more than this, and"""
_EVIDENCE = (5.0, 10.0, 50.0)
"""the jump times how far the weights moved is more than this, after many rounds, few, or one."""
_FEW_ROUNDS = 5
"""With fewer rounds than that the loss's spread is not known well."""
_REPLICAS = 4
"""With one round it is known from the replicas alone, and with fewer than so many not well enough."""
_STUBBORN = 0.8
"""If after a rollback the loss jumps by more than this share of the jump before, both bounds are doubled: a loss that
stays high at a third of the learning rate has another cause, for example single examples on which an overfitted model
is wrong with certainty."""
_MOVED = 0.05
"""If no weight matrix moved by more than this share of its norm, it is not the parameters that raised the loss."""
_RISING = 0.5
"""A state is not kept if its round's mean loss jumped by more than this: it may have begun to blow up, and restored, it
would do so at a smaller learning rate too."""


def check_recovery(state: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if :meth:`Recovery.load` cannot go on from ``state``."""
    what = "The saved state"
    rule = "a finite loss, or NaN for none"
    check_number("first_loss", check_item(what, state, "first_loss"), rule, lambda x: not math.isinf(x), finite=False)
    rule = f"in [0, {MAX_ROLLBACKS}]"
    check_whole("rollbacks", check_item(what, state, "rollbacks"), rule, lambda n: 0 <= n <= MAX_ROLLBACKS)
    rule = "four finite numbers: rounds, lowest and highest mean loss, variance; or none"
    if level := check_list("loss_level", state.get("loss_level", ()), rule):
        rounds, lowest, highest, variance = check_list("loss_level", level, rule, length=4)
        check_whole("loss_level rounds", rounds, ">= 1", lambda n: n >= 1)
        check_number("loss_level highest", highest, rule)
        check_number("loss_level lowest", lowest, f"{rule}; lowest <= highest", lambda x: x <= highest)
        check_number("loss_level variance", variance, ">= 0", lambda x: x >= 0)
    rule = "two finite numbers > 0: the last jump that was undone, and a factor; or none"
    if undone := check_list("undone_jump", state.get("undone_jump", ()), rule):
        for x in check_list("undone_jump", undone, rule, length=2):
            check_number("undone_jump", x, rule, lambda x: x > 0)


class Recovery:
    """Keeps a copy of the last good converged state, and restores it after a round that blew up.

    A round blew up if parameters, buffers or optimizer state are finite on no replica; or if its mean loss jumped
    (:mod:`hdet.steer.loss_level`) while a weight matrix moved (:meth:`hdet.model.snapshot.Snapshot.moved`)::

        jump > 3,  moved > 0.05,  jump * moved > 5     10 after 2 to 4 rounds, and 50 after one of 4 replicas or more

    A state is good if all of it is finite, and its round's loss did not jump by more than 0.5.

    Args:
        models, optimizer, device: as for :class:`hdet.model.snapshot.Snapshot`.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: Optimizer, device: torch.device | None) -> None:
        self._snapshot = Snapshot(models, optimizer, device)
        self._models, self._optimizer = models, optimizer
        self._has_snapshot = False
        self._before_step = BeforeStep(optimizer, self.begin)
        self._before_forward: list[RemovableHandle] = []
        self.copy_before_next_step()
        self.level = LossLevel()
        """Of the rounds that were not undone."""
        self._is_rising = False
        self.cause = ""
        """Why the last round that blew up did so, in words."""
        self._jump, self._last_jump, self._times = math.nan, math.inf, 1.0
        self.count = 0
        """Rollbacks so far."""

    def copy_before_next_step(self) -> None:
        """At the start of a run, and after a resume: let the first forward pass copy the buffers, and the optimizer's
        next step everything else, before they change it.

        By then everything has been loaded, in whatever order. Where a framework keeps the weights and its step may be
        in several parts, the first copy is made at the first converge. In a forward pass that is compiled whole no
        buffers are copied: they go back to where that pass has taken them."""
        self._has_snapshot = False
        self._remove_forward_hooks()
        if type(weights_of(tuple(self._models))) is not Weights:
            return
        self._before_step.arm()
        before_forward = _BeforeForward(self)
        owners = [m for model in self._models for m in model.modules() if m._buffers]
        for module in {id(m): m for m in (*self._models, *owners)}.values() if owners else ():
            self._before_forward.append(module.register_forward_pre_hook(before_forward, prepend=True))

    def begin(self) -> None:
        """Make the first copy, unless it was made: before the optimizer's first step, or in place of one that AMP
        skipped. It is not kept if it is not finite."""
        if self._before_step.is_armed:
            self._before_step.disarm()
            self._remove_forward_hooks()
            reshard(self._models)
            self._snapshot.take()
            self._has_snapshot = self._snapshot.is_finite()

    def take_buffers(self) -> None:
        """Copy the buffers, before the first forward pass moves them."""
        self._remove_forward_hooks()
        reshard(self._models)
        self._snapshot.take_buffers()

    def _remove_forward_hooks(self) -> None:
        for hook in self._before_forward:
            hook.remove()
        self._before_forward = []

    @property
    def can_restore(self) -> bool:
        """Whether there is a copy. Ranks may differ in it after their first step, since each looks at its own."""
        return self._has_snapshot

    def renew(self) -> None:
        """The model was given other weights: go back to these, not to the old ones."""
        if self._has_snapshot:
            reshard(self._models)
            self.keep()

    def close(self) -> None:
        """Keep nothing any more."""
        self._before_step.remove()
        self._remove_forward_hooks()
        self._has_snapshot = False

    def observe(self, losses: Sequence[float]) -> None:
        """Take in the [replica] mean ``losses`` of a round that was not undone."""
        self._is_rising = self.level.jump(finite_mean(losses)) > _RISING
        self.level = self.level.with_round(losses)

    def keep(self) -> bool:
        """Copy the state as it is now, all of which must be finite, unless the round that led to it may have begun to
        blow up. Returns whether it was copied."""
        if self._is_rising:
            return False
        self._snapshot.take()
        self._has_snapshot = True
        return True

    def copies(self) -> dict[int, Tensor]:
        """The state that is kept, by the address of the original."""
        return self._snapshot.copies()

    def is_needed(
        self,
        finite: Sequence[bool],
        losses: Sequence[float],
        *,
        watches_losses: bool,
        agree: Callable[[float], float] = lambda own: own,
    ) -> bool:
        """Whether the round that just ended is to be undone; see :class:`Recovery`. To be asked only if there is a
        copy on every rank.

        Args:
            finite: [replica] whether parameters, buffers and optimizer state are.
            losses: [replica] mean loss of the round; empty if none was reported.
            watches_losses: whether the losses are considered at all.
            agree: what all ranks make of a number of this rank. Called if the losses jump; collective.

        Raises:
            DivergedError: if it is, and there have been :data:`MAX_ROLLBACKS` rollbacks.
        """
        if not self._has_blown_up(finite, losses, watches_losses, agree):
            return False
        if self.count >= MAX_ROLLBACKS:
            raise DivergedError(
                f"The run blew up again after {MAX_ROLLBACKS} rollbacks, each of which divided the learning rate by "
                f"{GAIN_DIVISOR:.3g}: the data or the model are bad, not the learning rate. The parameters are as they "
                "were in that round; look for what is not finite, or restore an earlier checkpoint."
            )
        return True

    def _has_blown_up(
        self,
        finite: Sequence[bool],
        losses: Sequence[float],
        watches_losses: bool,
        agree: Callable[[float], float],
    ) -> bool:
        self._jump = math.nan
        if not any(finite):
            self.cause = "parameters, buffers or optimizer state are not finite on any replica"
            return True
        if not watches_losses or not losses:
            return False
        mean = finite_mean(losses)
        if math.isnan(mean):
            self.cause = "the loss is not finite on any replica"
            return self.level.rounds > 0
        level, few = self.level, (self.level.rounds < _FEW_ROUNDS) + (self.level.rounds < 2)
        if few == 2 and (len(losses) < _REPLICAS or level.variance == 0):
            return False
        self._jump = jump = level.jump(mean)
        if not jump > _JUMP * self._times:  # or it is NaN
            return False
        moved = agree(self._snapshot.moved())
        self.cause = (
            f"the mean loss {mean:.4g} is above all earlier rounds' by {jump:.3g} times their spread, "
            f"{self.level.low:.4g} to {self.level.high:.4g}, and a weight matrix moved by {moved:.2g} of its norm"
        )
        return moved > _MOVED and jump * moved > _EVIDENCE[few] * self._times

    def restore(self) -> None:
        """Put the state back as it was last kept."""
        self._snapshot.restore()
        self.count += 1
        if self._jump > _STUBBORN * self._last_jump:
            self._times *= 2
        if math.isfinite(self._jump):
            self._last_jump = self._jump

    def state(self) -> dict[str, Any]:
        """What must be saved."""
        known = self.level.rounds > 0
        return {
            "first_loss": self.level.high if known else math.nan,
            "rollbacks": self.count,
            "loss_level": list(self.level) if known else [],
            "undone_jump": [self._last_jump, self._times] if self._last_jump < math.inf else [],
        }

    @staticmethod
    def check_state(state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot; see :func:`check_recovery`."""
        check_recovery(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`. One of an older version holds the first round's loss alone."""
        self.count = int(state["rollbacks"])
        first = float(state["first_loss"])
        old = [1, first, first, 0.0] if math.isfinite(first) else []
        self.level = LossLevel(*(state.get("loss_level") or old))
        self._last_jump, self._times = state.get("undone_jump") or (math.inf, 1.0)

    def warn(self, step: int) -> None:
        """Log the rollback, after a round that ended at ``step``."""
        logger.warning(
            f"Step {step}: the run blew up: {self.cause}. Back to the last good converged state, with learning rates "
            f"divided by {GAIN_DIVISOR:.3g} (rollback {self.count} of {MAX_ROLLBACKS}). If it did not blow up, pass "
            "rollback=False."
        )


class _BeforeForward:
    """A forward pre-hook, which a copied or pickled model does without."""

    def __init__(self, recovery: Recovery | None = None) -> None:
        self._recovery = None if recovery is None else ref(recovery)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self._recovery is None:
            return
        if (recovery := self._recovery()) is not None:
            recovery.take_buffers()

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return _BeforeForward, ()
