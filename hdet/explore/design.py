r"""Which replica holds which value of which hyperparameter in a round, and what the losses say about it. No torch here.

A **factor** is whatever is explored: the learning rate, that of a parameter group, a weight decay. Replica ``r`` holds
factor ``h`` at the **level** ``z_{h,r}`` in [-1, 1]: that many spreads from its centre. To first order::

    loss_r = level of the batch + sum_h z_{h,r} effect_h + noise

so a round of N replicas is an experiment of N runs, and one least-squares fit tells the effects apart. How well depends
on the levels. Two designs:

- ``"independent"``, the paper's: every factor spreads evenly over [-1, 1], in a permutation of its own. Two factors are
  then correlated by chance, and each one's estimate carries noise of the other.
- ``"orthogonal"``: columns ``z_h`` that are orthogonal to one another and to the constant. For N = 4, 8, 12, 16, 20,
  24, 32, ... these are columns of a Hadamard matrix (Plackett and Burman, 1946), where every replica sits at one end of
  every spread: the least variance that levels in [-1, 1] allow. For other N they are a Fourier basis. N replicas carry
  N - 1 such columns; more factors take turns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from hdet.explore.spread import multipliers, permutation

Design = Literal["orthogonal", "independent"]

_UNIT = 1 - 2**-40  # multipliers() takes a spread below 1; round_to_grid() makes the ends 1 again


class Effect(NamedTuple):
    """What one round says about one factor, in units of the loss per spread."""

    value: float
    """By how much the loss rises from a factor's centre to one spread above it; NaN if it cannot be estimated."""
    error: float
    """Its standard error, from the residuals of the fit; NaN with no more replicas than factors."""


def levels(
    replicas: int, factors: Sequence[str], *, design: Design = "orthogonal", seed: int, round: int
) -> tuple[tuple[float, ...], ...]:
    """The level of every factor on every replica: ``[factor][replica]``, in [-1, 1], each factor's mean exactly 0.

    With more than ``replicas - 1`` factors the orthogonal design
    explores ``replicas - 1`` of them in a round, in rotation; the others' levels are 0. It depends on nothing but its
    arguments, so that ranks agree without communication.

    Examples:
        >>> levels(4, ["a", "b", "c"], seed=0, round=0)  # doctest: +NORMALIZE_WHITESPACE
        ((-1.0, 1.0, -1.0, 1.0), (1.0, -1.0, -1.0, 1.0), (1.0, 1.0, -1.0, -1.0))
    """
    if replicas == 1 or not factors:
        return ((0.0,) * replicas,) * len(factors)
    if design == "independent":
        even = tuple(round_to_grid((rho - 1) / _UNIT) for rho in multipliers(replicas, _UNIT))
        orders = [permutation(replicas, seed=seed, round=round, hyperparameter=name) for name in factors]
        return tuple(tuple(even[i] for i in order) for order in orders)
    columns = _columns(replicas)
    rows = permutation(replicas, seed=seed, round=round, hyperparameter="design/rows")
    order = permutation(len(columns), seed=seed, round=round, hyperparameter="design/columns")
    active = {(round * len(columns) + i) % len(factors) for i in range(min(len(columns), len(factors)))}
    next_column = iter(order)
    result = []
    for h, name in enumerate(factors):
        if h not in active:
            result.append((0.0,) * replicas)
            continue
        column, sign = columns[next(next_column)], _sign(seed, round, name)
        result.append(tuple(sign * column[row] for row in rows))
    return tuple(result)


def effects(levels: Sequence[Sequence[float]], losses: Sequence[float]) -> list[Effect]:
    """Least squares without a constant: ``losses_r = sum_h levels_{h,r} effect_h``, over replicas with finite losses.

    For losses from which the batch's own level was removed: by the paired probe, or by subtracting the mean. The effect
    of a factor whose levels are all zero is NaN; if the levels are linearly dependent, that of every factor is.

    Args:
        levels: [factor][replica].
        losses: [replica].

    Returns:
        By factor.
    """
    rows = [r for r, loss in enumerate(losses) if math.isfinite(loss)]
    varied = [h for h, column in enumerate(levels) if any(column[r] for r in rows)]
    columns = [[levels[h][r] for r in rows] for h in varied]
    finite = [losses[r] for r in rows]
    unknown = Effect(math.nan, math.nan)
    result = [unknown] * len(levels)
    inverse = _inverse([[math.fsum(map(_times, a, b)) for b in columns] for a in columns])
    if inverse is None:
        return result
    moments = [math.fsum(map(_times, column, finite)) for column in columns]
    values = [math.fsum(map(_times, row, moments)) for row in inverse]
    residuals = [
        loss - math.fsum(value * column[r] for value, column in zip(values, columns, strict=True))
        for r, loss in enumerate(finite)
    ]
    degrees = len(rows) - len(varied)
    variance = math.fsum(x * x for x in residuals) / degrees if degrees else math.nan
    for i, h in enumerate(varied):
        result[h] = Effect(values[i], math.sqrt(variance * max(0.0, inverse[i][i])))
    return result


def multipliers_of(levels: Sequence[float], spread: float) -> tuple[float, ...]:
    """``rho_r = 1 + spread * level_r``, on a grid on which levels symmetric about 0 give a mean of exactly 1."""
    return tuple(1.0 + round_to_grid(spread * level) for level in levels)


def round_to_grid(x: float) -> float:
    """The nearest multiple of ``2**-52``: then ``1 + x`` and ``1 - x`` are both exact."""
    return round(x * 2.0**52) / 2.0**52


@lru_cache
def _columns(n: int) -> tuple[tuple[float, ...], ...]:
    """``n - 1`` columns of length ``n`` in [-1, 1], orthogonal to one another and to the constant."""
    matrix = _hadamard(n)
    if matrix is not None:  # rows are multiplied by their first element, which makes the first column constant
        return tuple(tuple(float(row[h] * row[0]) for row in matrix) for h in range(1, n))
    waves = []
    for k in range(1, n // 2 + 1):
        waves.append([math.cos(2 * math.pi * k * r / n) for r in range(n)])
        if 2 * k != n:
            waves.append([math.sin(2 * math.pi * k * r / n) for r in range(n)])
    return tuple(tuple(round_to_grid(x / max(map(abs, wave))) for x in wave) for wave in waves)


def _hadamard(n: int) -> list[list[int]] | None:
    """A Hadamard matrix by Sylvester's and Paley's constructions, or ``None``."""
    if n == 1:
        return [[1]]
    q = n - 1
    if n % 4 == 0 and all(q % d for d in range(2, math.isqrt(q) + 1)):
        squares = {x * x % q for x in range(1, q)}
        core = [[-1 if i == j else (1 if (j - i) % q in squares else -1) for j in range(q)] for i in range(q)]
        return [[1] * n] + [[1, *row] for row in core]
    if n % 2 == 0 and (half := _hadamard(n // 2)) is not None:
        return [row + row for row in half] + [row + [-x for x in row] for row in half]
    return None


def _inverse(matrix: list[list[float]]) -> list[list[float]] | None:
    """By Gauss-Jordan elimination with pivoting; ``None`` if singular. Plain floats: equal bits on all ranks."""
    n = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) < 1e-9:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(n):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]


def _sign(seed: int, round: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{round}/{name}/sign".encode(), digest_size=1).digest()
    return 1 if digest[0] % 2 else -1


def _times(a: float, b: float) -> float:
    return a * b
