r"""Hyperparameters beside the learning rate: any scalar that leaves the architecture alone.

Replica ``r`` holds a value around the centre, at its level ``z_r`` in [-1, 1] (:mod:`hdet.explore.design`), which is
measured in the hyperparameter's own **space**::

    "log"           value = centre * exp(spread * z)                weight decay, eps, a loss weight
    "linear"        value = centre + spread * z                     dropout, label smoothing
    "complement"    1 - value = (1 - centre) * exp(-spread * z)     momentum, betas: what matters is how far from 1

What the losses say about it depends on how it acts:

- Through the **update** (weight decay, momentum, betas, eps): replicas differ under any gradients.
- Through the **gradient** (dropout, label smoothing, a loss weight): under shared gradients every replica applies the
  mean of all gradients, so that its parameters do not depend on its own value, while its training loss depends on
  nothing else: the losses are confounded. It takes ``gradients="local"`` or ``"grouped"``, and a probe.
- One that only **regularises** (weight decay, dropout, label smoothing) makes training data fit worse by design: it
  takes a probe on held-out data.

:func:`hdet.explore.identification.check_identified` refuses the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

from hdet.errors import (
    HdetError,
    check_choice,
    check_flag,
    check_instance,
    check_list,
    check_number,
    check_text,
)
from hdet.transaction import AllOrNothing

Space = Literal["log", "linear", "complement"]


class _Space(NamedTuple):
    """A coordinate ``x`` in which a hyperparameter's values are spread evenly."""

    to_x: Callable[[float], float]
    from_x: Callable[[float], float]
    low: float
    """Values lie above this."""
    high: float
    """Values lie below this."""


_SPACES = {
    "log": _Space(math.log, math.exp, 0.0, math.inf),
    "linear": _Space(float, float, -math.inf, math.inf),
    "complement": _Space(lambda value: -math.log1p(-value), lambda x: -math.expm1(-x), -math.inf, 1.0),
}
_FARTHEST = 1e100
"""Of a position from 0, whatever the space."""
_ROUNDING = 1e-6
"""Of a place that was computed, saved and loaded."""
_MARGIN = 0.1
"""Least distance of the centre from its bounds, in spreads, so that replicas always differ."""


def _from(space: _Space, x: float) -> float:
    try:
        return space.from_x(x)
    except OverflowError:
        return math.copysign(math.inf, x) if space.high == math.inf else -math.inf


class Hyperparameter:
    """One explored scalar. Made by :func:`hdet.param_group`, :func:`hdet.module_attribute` and :func:`hdet.scalar`.

    It may have several **targets** (parameter groups, modules), each with a value of its own. They move together: their
    distances in the hyperparameter's space stay as they are. The centre's **position** is how far it has moved from
    where it started, in the space; the same for all targets.

    Args:
        name: in reports and saved state.
        spread: largest distance from the centre, in the space; > 0.
        space: ``"log"``, ``"linear"`` or ``"complement"``.
        bounds: smallest and largest value; ``None`` for those of the space.
        acts_on: through what it changes the parameters.
        regularises: whether it can only be judged on held-out data.
        move: whether its centre moves by what the probe says.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        name: str,
        *,
        spread: float,
        space: Space,
        bounds: tuple[float, float] | None,
        acts_on: Literal["update", "gradient"],
        regularises: bool,
        move: bool,
    ) -> None:
        self.name = check_text("name", name)
        self.space = check_choice(f"{name}.space", space, list(_SPACES))
        rule = f"> 0, in the space {space!r}"
        self.spread = float(check_number(f"{name}.spread", spread, rule, lambda spread: spread > 0))
        widest = _SPACES[space]
        rule = f"a pair (low, high) with {widest.low} <= low < high <= {widest.high} in the space {space!r}"
        ends = (widest.low, widest.high) if bounds is None else check_list(f"{name}.bounds", bounds, rule, length=2)
        low, high = (check_number(f"{name}.bounds", end, rule, finite=False) for end in ends)
        if not widest.low <= low < high <= widest.high:
            raise ValueError(f"Invalid {name}.bounds={(low, high)}. Must be {rule}.")
        self.bounds = low, high
        self.acts_on = check_choice(f"{name}.acts_on", acts_on, ["update", "gradient"])
        self.regularises, self.move = check_flag(f"{name}.regularises", regularises), check_flag(f"{name}.move", move)
        self.starts: list[float] = []
        """By target: where the centre started, in the space."""

    def attach(self, optimizer: Optimizer) -> None:
        """Find the targets, and take their values as the centre.

        Raises:
            TypeError, ValueError: if there are none, or a value is not a number inside the bounds; nothing has changed
                then.
        """
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        with AllOrNothing(self):
            self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        values = self._find_targets(optimizer)
        space = _SPACES[self.space]
        low, high = self.bounds
        for value in values:
            if not low <= value <= high or value in (space.low, space.high):
                hint = ": 0 has no logarithm, pass space='linear'" if self.space == "log" and value == 0 else ""
                raise ValueError(f"{self.name} is {value}. Must be in its bounds {self.bounds}{hint}.")
        self.starts = [space.to_x(value) for value in values]

    def keep(self) -> Callable[[], None]:
        """What puts everything back as it is now: targets, starts and the values in force."""
        before = dict(vars(self))
        values = self._current_values() if self.starts else []

        def undo() -> None:
            vars(self).clear()
            vars(self).update(before)
            if values:
                self._write(values)

        return undo

    def check_place(self, starts: Any, position: float) -> list[float]:
        """``starts`` as they are to be loaded, with the centre at ``position``.

        Raises:
            TypeError, ValueError: unless there is one for every target, and all values lie inside the bounds.
        """
        position = check_number(f"position of {self.name}", position)
        space = _SPACES[self.space]
        low, high = self.bounds
        lowest = -math.inf if low == space.low else space.to_x(low)
        highest = math.inf if high == space.high else space.to_x(high)
        rule = f"where {self.name} started, in the space {self.space!r} and inside its bounds {self.bounds}"
        given = check_list(f"starts of {self.name}", starts, rule)
        if len(given) != len(self.starts):
            raise ValueError(
                f"Invalid starts: The saved state has {self.name} in {len(given)} places, this run in "
                f"{len(self.starts)}: other parameter groups or modules."
            )
        checked = [float(check_number(f"starts of {self.name}", start, rule)) for start in given]
        reached = [abs(position) <= _FARTHEST] + [
            lowest - _ROUNDING <= x <= highest + _ROUNDING for start in checked for x in (start, start + position)
        ]
        if not all(reached):
            raise ValueError(
                f"Invalid starts {checked} of {self.name} and position {position} of its centre. Must leave all values "
                f"inside the bounds {self.bounds}."
            )
        return checked

    def value(self, position: float, level: float = 0.0) -> float:
        """The first target's value on a replica at ``level``, with the centre at ``position``."""
        self._check_place(position, level)
        return self._values(position, level)[0]

    def position_of(self, value: float) -> float:
        """The position at which the first target's centre is ``value``, inside the bounds.

        Raises:
            TypeError, ValueError: for a value that has no place in the space.
        """
        self._check_place()
        space = _SPACES[self.space]
        rule = f"> {space.low} and < {space.high}, in the space {self.space!r}"
        value = check_number(f"value of {self.name}", value, rule, lambda value: space.low < value < space.high)
        return self.clamped(_SPACES[self.space].to_x(value) - self.starts[0])

    def spread_at(self, position: float) -> float:
        """The spread with the centre at ``position``: smaller than ``spread`` close to a bound."""
        self._check_place(position)
        low, high = self._range()
        return min(self.spread, position - low, high - position)

    def clamped(self, position: float) -> float:
        """The nearest position whose replicas lie inside the bounds."""
        self._check_place(position)
        low, high = self._range()
        margin = min(_MARGIN * self.spread, (high - low) / 2)
        return min(max(position, low + margin), high - margin)

    def write(self, position: float, level: float = 0.0) -> None:
        """Set every target to the value of a replica at ``level``."""
        self._check_place(position, level)
        self._write(self._values(position, level))

    @contextmanager
    def neutral(self, position: float) -> Iterator[None]:
        """Inside the ``with`` block all replicas hold the value under which the probe compares them: by default the
        centre."""
        self._check_place(position)
        before = self._current_values()
        self._write(self._neutral_values(position))
        try:
            yield
        finally:
            self._write(before)

    def _check_place(self, position: float = 0.0, level: float = 0.0) -> None:
        """Raise where there is no centre yet, or ``position`` and ``level`` are no numbers."""
        if not self.starts:
            raise HdetError(
                f"{self.name} has no centre yet: it takes the values of its targets when a scheduler is built with "
                "hyperparameters=[...]."
            )
        rule = f"within {_FARTHEST:g} of where it started"
        check_number(f"position of {self.name}", position, rule, lambda x: abs(x) <= _FARTHEST)
        check_number(f"level of {self.name}", level, "in [-1, 1]", lambda z: abs(z) <= 1)

    def _values(self, position: float, level: float) -> list[float]:
        """By target, for a replica at ``level``."""
        space = _SPACES[self.space]
        low, high = self.bounds
        shift = position + self.spread_at(position) * level
        return [min(max(_from(space, start + shift), low), high) for start in self.starts]

    def _range(self) -> tuple[float, float]:
        """Lowest and highest position at which all targets lie inside the bounds."""
        space = _SPACES[self.space]
        low, high = self.bounds
        lowest = -math.inf if low == space.low else space.to_x(low) - min(self.starts)
        highest = math.inf if high == space.high else space.to_x(high) - max(self.starts)
        return lowest, highest

    def _neutral_values(self, position: float) -> list[float]:
        return self._values(position, 0.0)

    def _find_targets(self, optimizer: Optimizer) -> list[float]:
        """Find the targets, and return their values."""
        return self._current_values()

    def _current_values(self) -> list[float]:
        """By target."""
        raise NotImplementedError

    def _write(self, values: Sequence[float]) -> None:
        """By target, in place where it is a tensor."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.space}, spread {self.spread:g}, bounds {self.bounds}, acts on the {self.acts_on}"
            f"{', regularises' if self.regularises else ''}{'' if self.move else ', does not move'}"
        )
