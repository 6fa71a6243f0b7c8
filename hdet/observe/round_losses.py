"""The training losses of a round: this process's own, and what all replicas have told."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hdet.errors import check_item, check_list, check_number, check_whole
from hdet.observe.training_loss import TrainingLoss, check_loss
from hdet.replicas.agreement import Term

logger = logging.getLogger("hdet")

Loss = float | Tensor | Sequence[float | Tensor] | None
"""What ``scheduler.step()`` takes: one loss, with virtual replicas a list of theirs, or nothing."""

_ONE = frozenset((float, Tensor))


class RoundLosses:
    """Every replica's training losses since its round began.

    Args:
        own: replicas of this process.
        replicas: replicas in all.
        needs_each: whether the controller needs the loss of each of the process's replicas.
        warns: whether to warn, once, of a step without a loss.
    """

    def __init__(self, own: int, replicas: int, *, needs_each: bool = False, warns: bool = False) -> None:
        self._count, self._replicas, self._needs_each, self._warns = own, replicas, needs_each and own > 1, warns
        self._own = [TrainingLoss() for _ in range(own)]
        self._totals = [(0.0, 0)] * replicas

    def check(self, loss: Loss) -> float | Tensor | list[float | Tensor] | None:
        """What :meth:`add` takes; changes nothing.

        Raises:
            TypeError, ValueError: for what is no loss, or not as many as there are replicas in this process.
        """
        if self._count == 1 and type(loss) in _ONE:  # between converges this is all that most steps cost
            return check_loss(loss)
        if loss is None:
            return None
        count = self._count
        if isinstance(loss, (list, tuple)):
            if len(loss) != count and count == 1:
                raise TypeError(f"scheduler.step() got {type(loss).__name__} of {len(loss)} losses; pass one.")
            if len(loss) != count:
                raise ValueError(f"scheduler.step() got {len(loss)} losses for virtual_replicas={count}.")
            return [check_loss(one) for one in loss]
        if self._needs_each:
            raise TypeError(
                f"Without a probe the controller needs the loss of each of virtual_replicas={count}: pass "
                "scheduler.step([loss_0, loss_1, ...])."
            )
        one = check_loss(loss)
        return one if count == 1 else [one] * count

    def add(self, checked: float | Tensor | list[float | Tensor] | None) -> None:
        """Add a step's losses, as :meth:`check` returned them."""
        if checked is None:
            if self._warns:
                self._warns = False
                logger.warning(
                    "scheduler.step() was called without a loss: a rollback does not see one that rises, and the "
                    "published controller does not move. Pass it: scheduler.step(loss)."
                )
        elif isinstance(checked, list):
            for own, loss in zip(self._own, checked, strict=True):
                own.add(loss)
        else:
            self._own[0].add(checked)

    def terms(self) -> dict[str, Term]:
        """What this process tells the others: sum and number of its losses since it last did, by replica of its own.
        A replica's members add theirs up. Waits for the device."""
        totals = [own.total() for own in self._own]
        return {
            f"loss {what} {k}": Term(float(total[part]), sum)
            for k, total in enumerate(totals)
            for part, what in enumerate(("sum", "count"))
        }

    def collect(self, told: Sequence[Mapping[str, float]]) -> None:
        """Take in what every replica has told, by rank of replica; the next message begins from 0."""
        for own in self._own:
            own.reset()
        since = [(one[f"loss sum {k}"], int(one[f"loss count {k}"])) for one in told for k in range(self._count)]
        self._totals = [
            (total + more, count + number) for (total, count), (more, number) in zip(self._totals, since, strict=True)
        ]

    @property
    def means(self) -> tuple[float, ...]:
        """[replica] mean loss of the round so far; NaN for a replica that reported none."""
        return tuple(total / count if count else math.nan for total, count in self._totals)

    @property
    def is_empty(self) -> bool:
        """Whether no replica has reported any."""
        return not any(count for _, count in self._totals)

    def begin_round(self) -> None:
        """Forget what has been collected."""
        self._totals = [(0.0, 0)] * self._replicas

    def restart(self) -> None:
        """Forget everything."""
        for own in self._own:
            own.reset()
        self.begin_round()

    def state(self) -> dict[str, Any]:
        """What must be saved, once it has been collected."""
        return {"replicas": self._replicas, "round_losses": [list(total) for total in self._totals]}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if :meth:`load` cannot. A sum may not be finite: of losses that were not."""
        what = "The saved state"
        replicas = check_whole("replicas", check_item(what, state, "replicas"), ">= 1", lambda n: n >= 1)
        rule = f"[sum, number] of the losses of each of {replicas} replicas"
        for total in check_list("round_losses", check_item(what, state, "round_losses"), rule, length=replicas):
            summed, number = check_list("round_losses", total, rule, length=2)
            check_number("round_losses sum", summed, rule, finite=False)
            check_whole("round_losses number", number, ">= 0", lambda n: n >= 0)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue the saved round, if it was one of as many replicas."""
        if state["replicas"] == self._replicas:
            self._totals = [(float(total), int(count)) for total, count in state["round_losses"]]
