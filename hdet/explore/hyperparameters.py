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
from typing import Literal, NamedTuple

from torch.optim import Optimizer

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
_MARGIN = 0.1
"""Least distance of the centre from its bounds, in spreads, so that replicas always differ."""


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
        if space not in _SPACES:
            raise ValueError(f"Invalid {space=} of {name}. Must be one of {', '.join(_SPACES)}.")
        if not 0 < spread < math.inf:
            raise ValueError(f"Invalid {spread=} of {name}. Must be > 0, in the space {space!r}.")
        widest = _SPACES[space]
        low, high = (widest.low, widest.high) if bounds is None else bounds
        if not widest.low <= low < high <= widest.high:
            raise ValueError(
                f"Invalid {bounds=} of {name}. Must satisfy {widest.low} <= low < high <= {widest.high} in the space "
                f"{space!r}."
            )
        self.name, self.spread, self.space, self.bounds = name, float(spread), space, (low, high)
        self.acts_on, self.regularises, self.move = acts_on, regularises, move
        self.starts: list[float] = []
        """By target: where the centre started, in the space."""

    def attach(self, optimizer: Optimizer) -> None:
        """Find the targets, and take their values as the centre.

        Raises:
            TypeError, ValueError: if there are none, or a value is not a number inside the bounds.
        """
        values = self._find_targets(optimizer)
        space = _SPACES[self.space]
        low, high = self.bounds
        for value in values:
            if not low <= value <= high or value in (space.low, space.high):
                hint = ": 0 has no logarithm, pass space='linear'" if self.space == "log" and value == 0 else ""
                raise ValueError(f"{self.name} is {value}. Must be in its bounds {self.bounds}{hint}.")
        self.starts = [space.to_x(value) for value in values]

    def value(self, position: float, level: float = 0.0) -> float:
        """The first target's value on a replica at ``level``, with the centre at ``position``."""
        return self._values(position, level)[0]

    def position_of(self, value: float) -> float:
        """The position at which the first target's centre is ``value``, inside the bounds."""
        return self.clamped(_SPACES[self.space].to_x(value) - self.starts[0])

    def spread_at(self, position: float) -> float:
        """The spread with the centre at ``position``: smaller than ``spread`` close to a bound."""
        low, high = self._range()
        return min(self.spread, position - low, high - position)

    def clamped(self, position: float) -> float:
        """The nearest position whose replicas lie inside the bounds."""
        low, high = self._range()
        margin = min(_MARGIN * self.spread, (high - low) / 2)
        return min(max(position, low + margin), high - margin)

    def write(self, position: float, level: float = 0.0) -> None:
        """Set every target to the value of a replica at ``level``."""
        self._write(self._values(position, level))

    @contextmanager
    def neutral(self, position: float) -> Iterator[None]:
        """Inside the ``with`` block all replicas hold the value under which the probe compares them: by default the
        centre."""
        before = self._current_values()
        self._write(self._neutral_values(position))
        try:
            yield
        finally:
            self._write(before)

    def _values(self, position: float, level: float) -> list[float]:
        """By target, for a replica at ``level``."""
        space = _SPACES[self.space]
        low, high = self.bounds
        shift = position + self.spread_at(position) * level
        return [min(max(space.from_x(start + shift), low), high) for start in self.starts]

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
