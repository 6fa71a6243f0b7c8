"""Fan-out: the symmetric spread of multipliers, and which replica holds which of them in which round. No torch here.

With ``N`` replicas and spread ``alpha`` the multipliers are (arXiv 2604.24708)::

    rho_r = 1 + alpha * (r - (N - 1) / 2) / max((N - 1) / 2, 1/2),      r = 0 .. N-1

symmetric about 1, inside ``[1 - alpha, 1 + alpha]``, with mean exactly 1. In round ``k`` replica ``r`` trains under
``rho_pi(r)``, where the permutation ``pi`` is drawn anew for every round and every hyperparameter.
"""

from __future__ import annotations

import hashlib

# Offsets are multiples of 2**-52: then 1 + x and 1 - x are both exact in float64, and the mean is 1 to the last bit.
_GRID = 2.0**52


def multipliers(replicas: int, spread: float) -> tuple[float, ...]:
    """The spread of multipliers, in increasing order.

    Args:
        replicas: number of replicas ``N``, at least 1.
        spread: ``alpha``, the largest relative distance from the base, ``0 <= alpha < 1``.

    Returns:
        ``N`` multipliers whose exact sum is ``N``.

    Examples:
        >>> multipliers(4, 0.75)
        (0.25, 0.75, 1.25, 1.75)
        >>> multipliers(1, 0.5)
        (1.0,)
    """
    if replicas < 1:
        raise ValueError(f"Invalid {replicas=}. There must be at least one replica.")
    check_spread(spread)
    centre = (replicas - 1) / 2
    offsets = (spread * ((r - centre) / max(centre, 0.5)) for r in range(replicas))
    return tuple(1.0 + round(offset * _GRID) / _GRID for offset in offsets)


def permutation(replicas: int, *, seed: int, round: int, hyperparameter: str) -> tuple[int, ...]:
    """A uniform permutation of ``range(replicas)``, equal on every rank without communication.

    Replicas are sorted by a BLAKE2b hash of (seed, round, hyperparameter,
    replica), so that no random number generator is read or advanced, and the
    result is the same in every version of Python.

    Returns:
        ``pi``: replica ``r`` holds multiplier number ``pi[r]`` in this round.
    """

    def key(replica: int) -> bytes:
        text = f"{seed}/{round}/{hyperparameter}/{replica}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return tuple(sorted(range(replicas), key=key))


def assignment(replicas: int, spread: float, *, seed: int, round: int, hyperparameter: str) -> tuple[float, ...]:
    """The multiplier ``rho_pi(r)`` of every replica ``r`` in one round."""
    rho = multipliers(replicas, spread)
    return tuple(rho[i] for i in permutation(replicas, seed=seed, round=round, hyperparameter=hyperparameter))


def check_spread(spread: float) -> None:
    """Raise ``ValueError`` unless ``0 <= spread < 1``: at 1 or above, a replica's learning rate would be zero or
    negative."""
    if not 0.0 <= spread < 1.0:
        raise ValueError(
            f"Invalid {spread=}. Must be in [0, 1): multipliers lie in [1 - spread, 1 + spread], and a learning rate "
            "must stay positive. The paper uses 1/9."
        )
