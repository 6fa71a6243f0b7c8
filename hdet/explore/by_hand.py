"""Learning rates written by hand, and what they meant.

Between two steps a user may write ``group["lr"] = x``: a base, around which the replicas are to spread; or
``group["lr"] *= y``: a factor of what stood there, which was each replica's own. Both leave one number in the
optimizer, and a replica cannot tell them apart alone:

- It takes ``y``, if that or its inverse has at most 4 digits and fewer than ``x``; else ``x``. Its base becomes ``y``
  times what it was, or ``x / gain``.
- At the next converge the replicas compare. As a base or as a factor, one of the readings is the same on all; that is
  then the base of all. If neither is, they have written different things, which is an error.

Until then replicas that read it wrongly are off by the square of their multiplier, or have no spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hdet.errors import ReplicaMismatchError

_FEW = 4
"""Most digits of a factor. By chance a number has so few in one of a hundred cases."""


class ByHand(NamedTuple):
    """A learning rate that was written by hand, as one replica has read it."""

    multiplier: float
    """``rho`` of the replica when it was written."""
    is_factor: bool
    """Whether it was read as a factor of the replica's own."""

    def readings(self, base: float) -> list[float]:
        """``base``, which is what came of it; and what would have, read as a base and read as a factor."""
        other = base * self.multiplier if self.is_factor else base / self.multiplier
        return [base, other, base] if self.is_factor else [base, base, other]


def read_by_hand(value: float, own: float, multiplier: float) -> ByHand:
    """Read ``value``, which stands where the replica's ``own`` learning rate was written."""
    if not own or not value:
        return ByHand(multiplier, is_factor=False)
    digits = min(_digits(value / own), _digits(own / value))
    return ByHand(multiplier, is_factor=digits <= _FEW and digits < _digits(value))


def agree(name: str, readings: Sequence[Sequence[float]]) -> float:
    """The base learning rate of a group, given :meth:`ByHand.readings` of every rank.

    Raises:
        ReplicaMismatchError: if the replicas have written different ones.
    """
    for values in zip(*readings, strict=True):
        if all(math.isclose(value, values[0], rel_tol=1e-5) for value in values):
            return values[0]
    bases = ", ".join(f"{reading[1]:.6g}" for reading in readings)
    raise ReplicaMismatchError(
        f"The learning rate of {name} was written by hand, and not alike on all replicas: read as base learning rates, "
        f"they have written {bases}, and these are no common factor of their own either. Write the same on every rank: "
        'group["lr"] = x, a base that all replicas spread around, or group["lr"] *= y.'
    )


def _digits(value: float) -> int:
    """Significant digits of a number, of the first six."""
    return len(f"{value:.5e}".partition("e")[0].replace(".", "").replace("-", "").rstrip("0"))
