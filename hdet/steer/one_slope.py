"""The controller of hyperparameters other than the learning rate. A pure function of plain floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hdet.errors import check_field, check_instance, check_list, check_number, check_whole
from hdet.observe.slopes import TOO_LARGE
from hdet.steer.observation import check_share
from hdet.steer.running_average import HUNDREDTH, Decay, mean_and_error, significance, t_statistic, update_average


class CentreState(NamedTuple):
    """The state of one hyperparameter's controller, from round to round; the same on every rank."""

    position: float = 0.0
    """Of the centre, in the hyperparameter's space, relative to where it started."""
    velocity: float = 0.0
    """Running average of ``-effect / c``, in units of the loss per hundredth of the run."""
    rounds: int = 0
    """Rounds observed so far."""
    variance: float = 0.0
    """Of ``-effect / c`` from round to round, around that average."""


def saved_centre(name: str, values: Any) -> CentreState:
    """A :class:`CentreState` from the values that were saved of one.

    Raises:
        TypeError, ValueError: if they are not such as a run can have.
    """
    position, velocity, rounds, variance = check_list(
        name, values, "[position, velocity, rounds, variance]", length=len(CentreState._fields)
    )
    return CentreState(
        check_number(f"{name}.position", position),
        check_number(f"{name}.velocity", velocity, "at most 1e150", lambda x: abs(x) <= 1e150),
        check_whole(f"{name}.rounds", rounds, ">= 0", lambda n: n >= 0),
        check_number(f"{name}.variance", variance, ">= 0", lambda x: x >= 0),
    )


@dataclass(frozen=True, kw_only=True)
class OneSlope:
    r"""Moves the centre of a hyperparameter other than the learning rate down the slope of the probe's loss.

    With ``effect`` the loss's rise from the centre to one spread above it, as fitted to a round's losses
    (:mod:`hdet.explore.design`), and ``c`` the round's length in hundredths of the run::

        t = mean(-effect / c) / standard error          over recent rounds, decay ``smoothing^c`` per round
        q = sign(t) clip((|t| - threshold) / slack, 0, 1)
        position += step * min(1, c) * spread * height * q

    An effect that shows only after the round is not seen.

    Raises:
        TypeError, ValueError: for a value outside the range its field names.
    """

    step: float = 0.25
    """> 0, in spreads: how far the centre moves at most, in a round and in a hundredth of the run."""
    smoothing: float = 0.8
    """In [0, 1): weight, in the running average, of what was measured a hundredth of the run ago."""
    threshold: float = 1.0
    """>= 0: ``|t|`` up to which nothing moves."""
    slack: float = 2.0
    """> 0: how far ``|t|`` must exceed ``threshold`` for a whole step."""

    def __post_init__(self) -> None:
        check_field(self, "step", check_number, "finite and > 0", lambda x: x > 0)
        check_field(self, "smoothing", check_number, "in [0, 1)", lambda x: 0 <= x < 1)
        check_field(self, "threshold", check_number, "finite and >= 0", lambda x: x >= 0)
        check_field(self, "slack", check_number, "finite and > 0", lambda x: x > 0)

    def update(
        self, state: CentreState, effect: float, *, spread: float, height: float = 1.0, share: float = 0.01
    ) -> CentreState:
        """One round: ``(state, effect) -> next state``. Where ``effect`` is not known (NaN), the state does not change.

        Args:
            effect: the loss's rise from the centre to one spread above it.
            spread: in the hyperparameter's space.
            height: the schedule's value as a share of its peak. The step goes with it, since a round at a small
                learning rate shows little of an effect.
            share: the round's length as a share of the run's, > 0.
        """
        check_instance("state", state, CentreState, "an hdet.controller.CentreState")
        saved_centre("state", state)
        check_number("effect", effect, "a difference of losses, or NaN", finite=False)
        check_number("spread", spread, ">= 0", lambda x: x >= 0)
        check_number("height", height)
        check_share("share", share)
        if not abs(effect) < TOO_LARGE:
            return state
        rounds = state.rounds + 1
        length = share / HUNDREDTH
        decay = Decay(self.smoothing, 0.9).over(length)
        velocity, variance = update_average((state.velocity, state.variance), -effect / length, rounds, decay)
        t = t_statistic(*mean_and_error((velocity, variance), rounds, decay))
        q = significance(t, rounds, self.threshold, self.slack)
        step = self.step * min(1.0, length)
        return CentreState(state.position + step * spread * height * q, velocity, rounds, variance)
