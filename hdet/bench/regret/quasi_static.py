r"""What the default controller would do on a workload, computed from its runs at constant gains.

A run at each of several constant gains (:mod:`.watched`) gives the final loss and, round by round, the movement and the
probe's slopes. Between the gains, all three are interpolated over the log gain. A run of the controller is then
computed round by round, as if a round at gain ``g`` were that of the run at constant ``g``. Its loss is that at its
mean log gain, weighted by the schedule's height.

The controller is that of :mod:`hdet.steer.posterior`, without bounds and rollback, for many candidates at once. Log
gains are over the tuned rate. Arrays are numpy's, and their shapes are given in brackets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.watched import Round, rounds_of
from hdet.steer.posterior import FALL, LOWEST, USUAL, Posterior, target

Array = np.ndarray[Any, np.dtype[np.float64]]

STEP = 0.05
GRID: Array = np.arange(math.log(0.003), math.log(40), STEP)
"""Log gains at which everything is known."""
CAP = 0.6
"""Largest excess: a run that is worse counts as this bad."""
LEAST = math.expm1(-2)
"""Smallest excess."""
NEEDED = 4
"""Gains with a finite loss that a workload needs."""

_POWER, _LARGEST, _WIDE, _FAR = 0.7, math.log(4), 2 * math.log(100), 60.0
_FOLLOWED, _WATCHED = 0.4, 0.6
"""Shares of the run: a gain counts if its movement is known up to the first; none is read after the second."""
_BAND = 0.6
"""Standard deviation, in log gain, of the weights with which log losses are smoothed."""
_EDGE = 0.3
"""How near to the smallest or largest gain, in log gain, losses are not smoothed."""


class Constants(NamedTuple):
    """A candidate. The first five are :class:`hdet.steer.posterior.Posterior`'s."""

    memory: float = Posterior.memory
    until: float = Posterior.until
    noise_weight: float = Posterior.noise_weight
    movement_error: float = Posterior.movement_error
    evidence_error: float = Posterior.evidence_error
    prior: float = 0.5
    """Probability that the user's rate is right, before the run; in [0, 1)."""
    early: float = 1.0
    """What the first rounds add to the error: ``v' = v + early^2 / (100 p)``."""
    probe_every: float = Posterior.probe_every
    """Share of the run between probes; 0 for one in every round."""
    probe_from: float = Posterior.probe_from
    """Share of the run before which there is none."""
    usual: float = USUAL
    """``q`` at the right learning rate."""
    fall: float = FALL
    """By how much ``q`` falls where the learning rate is e times higher."""


@dataclass(frozen=True)
class Response:
    """How a workload responds to the gain."""

    steps: int
    """In a round."""
    progress: Array
    """[round] share of the run that is over at its end."""
    height: Array
    """[round] the schedule's, as a share of its peak."""
    movement: Array
    """[watched round, grid] log."""
    debiased: list[Array]
    noise: list[Array]
    """[gain][seed, watched round] the probe's slopes; NaN without a probe."""
    gains: Array
    """[gain] log of the gains that were run."""
    loss: Array
    """[grid] log of the final loss over that at the tuned rate."""

    def balance(self, noise_weight: float) -> Array:
        """[watched round, grid] ``q`` of the probes, 0 where there was none."""
        rows = []
        for debiased, noise in zip(self.debiased, self.noise, strict=True):
            progress, height = self.progress[: noise.shape[-1]], self.height[: noise.shape[-1]]
            above = progress * debiased / self.progress[0]
            cost = noise_weight * noise / np.maximum(height, LOWEST)
            size = np.abs(above) + np.abs(cost)
            q = np.divide(above - cost, size, out=np.zeros_like(size), where=size > 0)
            rows.append(np.nan_to_num(q).mean(0))
        return _over_grid(self.gains, np.array(rows))

    def excess(self, log_gain: Array) -> Array:
        """Of the final loss over that at the tuned rate, as a share; for any shape."""
        return np.clip(np.expm1(np.interp(log_gain, GRID, self.loss)), LEAST, CAP)


def response(steps: int, runs: Mapping[tuple[float, int], Outcome]) -> Response | None:
    """What ``{(gain, seed): run}`` tell of a workload; ``None`` if fewer than :data:`NEEDED` gains have a finite loss.

    Args:
        steps: of the whole run.
        runs: as :func:`hdet.bench.regret.watched.watch` leaves them.
    """
    rounds = {key: rounds_of(outcome) for key, outcome in runs.items()}
    if not rounds:
        return None
    longest = max(rounds.values(), key=len)
    progress = np.array([seen.progress for seen in longest])
    height = np.array([seen.height for seen in longest])
    watched, followed = (int((progress <= share + 1e-9).sum()) for share in (_WATCHED, _FOLLOWED))

    gains, losses, movements, debiased, noise = [], [], [], [], []
    for gain in sorted({gain for gain, _ in runs}):
        seeds = [seed for other, seed in runs if other == gain]
        loss = [runs[gain, seed].loss for seed in seeds]
        columns = np.array([_columns(rounds[gain, seed], watched) for seed in seeds])
        moved = columns[:, 0].mean(0)
        if all(map(_is_positive, loss)) and bool(np.isfinite(moved[:followed]).all()):
            gains.append(math.log(gain))
            losses.append(math.fsum(map(math.log, loss)) / len(loss))
            movements.append(moved)
            debiased.append(columns[:, 1])
            noise.append(columns[:, 2])
    if len(gains) < NEEDED:
        return None
    known = np.array(gains)
    beyond = np.minimum(GRID - known[0], 0) + np.maximum(GRID - known[-1], 0)
    return Response(
        steps=max(1, round(steps * progress[0])),
        progress=progress,
        height=height,
        movement=_over_grid(known, np.array(movements)) + _POWER * beyond,
        debiased=debiased,
        noise=noise,
        gains=known,
        loss=_smoothed(known, np.array(losses)),
    )


def _is_positive(loss: float) -> bool:
    return 0 < loss < math.inf


def _columns(rounds: Sequence[Round], count: int) -> Array:
    """[log movement, debiased, noise][round] of the first rounds; NaN where unknown."""
    found = np.full((3, count), np.nan)
    for i, seen in enumerate(rounds[:count]):
        moved = math.log(seen.movement) if _is_positive(seen.movement) else math.nan
        found[:, i] = moved, seen.debiased, seen.noise
    return found


def _over_grid(gains: Array, rows: Array) -> Array:
    """[column, grid] from [gain, column], constant beyond the gains."""
    return np.stack([np.interp(GRID, gains, column) for column in rows.T])


def _smoothed(gains: Array, losses: Array) -> Array:
    """[grid] log losses less that at gain 1: a local quadratic, and between straight lines near the ends."""
    plain = np.interp(GRID, gains, losses)
    found = np.array([_local(gains, losses, min(max(at, gains[0]), gains[-1])) for at in GRID])
    found = np.where((gains[0] + _EDGE > GRID) | (gains[-1] - _EDGE < GRID), plain, found)
    return found - np.interp(0.0, GRID, found)


def _local(gains: Array, losses: Array, at: float) -> float:
    weights = np.exp(-0.5 * ((gains - at) / _BAND) ** 2) + 1e-9
    degree = min(2 if int((weights > 0.05).sum()) >= 3 else 1, len(gains) - 1)
    return float(np.polyval(np.polyfit(gains - at, losses, degree, w=np.sqrt(weights)), 0.0))


# -------------------------------------------------------------------------------------------------------- controller


def gains_of(
    work: Response, starts: Sequence[float], candidates: Sequence[Constants], balance: Array | None = None
) -> Array:
    """[round, candidate, start] log gain over the tuned rate in each round of the controller's run.

    Args:
        starts: over the tuned rate.
        candidates: all of one ``noise_weight``.
        balance: of the workload, if it is known already.
    """
    columns = (column[:, None] for column in np.array(candidates, float).T)
    memory, until, _, by_movement, by_evidence, prior, early, every, since, usual, fall = columns
    by_movement, by_evidence = 1 / by_movement**2, 1 / by_evidence**2
    if balance is None:
        balance = work.balance(candidates[0].noise_weight)
    start = np.log(np.array(starts, float))[None, :]
    gain = np.zeros((len(candidates), len(starts)))
    centre, evidence, heard = gain, gain, np.zeros_like(gain)
    share, area = float(work.progress[0]), float(work.height.mean())
    length = 100 * share
    kept = memory**length
    every = np.maximum(every, share)
    rests = work.progress[work.height >= Posterior.rest_below].max()
    found = []
    for i, (progress, height) in enumerate(zip(work.progress, work.height, strict=True)):
        found.append(gain + start)
        if progress > rests or i >= len(work.movement):
            continue
        is_probed = np.floor(progress / every + 1e-9) > np.floor((progress - share) / every + 1e-9)
        is_probed = is_probed & (progress >= since)
        told = gain + (_at(balance[i], start + gain) - usual) / fall
        whole = memory * heard + 1 - memory
        evidence = np.where(is_probed, (memory * heard * evidence + (1 - memory) * told) / whole, evidence)
        heard = np.where(is_probed, whole, heard)
        moved = _at(work.movement[i], start + gain)
        right = math.log(target(float(height), share, area, 0.0, work.steps))
        step = (1 - kept) * (gain + (right - moved) / _POWER - centre)
        step = np.where(np.isfinite(step) & (progress <= until), step, 0.0)
        centre = centre + np.clip(step, -_LARGEST, _LARGEST)
        certainty = by_movement + heard * by_evidence
        estimate = (by_movement * centre + heard * by_evidence * evidence) / certainty
        variance = 1 / certainty + early**2 / np.maximum(100 * np.minimum(progress, until), length)
        gain = estimate * (1 - _right_as_given(estimate, variance, prior))
    return np.stack(found)


def _right_as_given(estimate: Array, variance: Array, prior: Array) -> Array:
    """:func:`hdet.steer.posterior.right_as_given` for any ``prior``."""
    wide = np.sqrt(2 * math.pi * variance) / _WIDE * np.exp(np.minimum(estimate**2 / (2 * variance), _FAR))
    return prior / (prior + (1 - prior) * wide)


def _at(row: Array, log_gain: Array) -> Array:
    """``row`` over the grid, at any points."""
    place = np.clip((log_gain - GRID[0]) / STEP, 0, len(GRID) - 1.000001)
    index = place.astype(int)
    part = place - index
    return row[index] * (1 - part) + row[index + 1] * part


def excesses(work: Response, starts: Sequence[float], candidates: Sequence[Constants]) -> Array:
    """[candidate, start] excess of the final loss over that of the tuned rate, as a share."""
    found = np.empty((len(candidates), len(starts)))
    for weight in {candidate.noise_weight for candidate in candidates}:
        chosen = [i for i, candidate in enumerate(candidates) if candidate.noise_weight == weight]
        gains = gains_of(work, starts, [candidates[i] for i in chosen])
        found[chosen] = work.excess(np.average(gains, axis=0, weights=work.height))
    return found
