"""The model's form against a measurement: all-reduces among real processes over gloo, on this machine's loopback.

Alpha and bandwidth are fitted to all-reduces of two and of four processes; those of three are predicted. So are hdet's
own converges, from the fit and this machine's copy bandwidth.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from hdet.bench import converge, processes
from hdet.bench.contenders import CONTENDERS
from hdet.bench.kernels import copy_bandwidth
from hdet.bench.measure import OURS, repeated
from hdet.bench.scaling.network import Link, ring
from hdet.bench.shapes import SHAPES

FITTED, HELD_OUT = (2, 4), 3
"""Numbers of processes."""
SIZES = tuple(2**k for k in range(10, 27, 2))
"""Bytes."""
SHAPES_PREDICTED = ("1m", "10m")


class Timed(NamedTuple):
    """An all-reduce that was measured."""

    ranks: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What was found."""

    link: Link
    error: float
    """Median of ``|model / measured - 1|`` over the all-reduces that it was fitted to."""
    held_out_error: float
    """The same over those of :data:`HELD_OUT` processes."""


class Predicted(NamedTuple):
    """A converge of hdet, by the model and as measured."""

    shape: str
    ranks: int
    model: float
    measured: float
    """Seconds."""


def measure(sizes: Sequence[int] = SIZES, *, limit: float = 300.0) -> list[Timed]:
    """All-reduces of all sizes, among :data:`FITTED` and :data:`HELD_OUT` processes, the slowest process's medians."""
    found = []
    for ranks in sorted({*FITTED, HELD_OUT}):
        found += list(processes.run(_all_reduces, ranks, (tuple(sizes),), device="cpu", limit=limit))
    return found


def _all_reduces(sizes: tuple[int, ...]) -> Iterator[Timed]:
    torch.set_num_threads(1)
    for nbytes in sizes:
        buffer = torch.zeros(nbytes // 4)
        calls = processes.from_first(max(3, min(100, 2**25 // nbytes)))
        turn = repeated(lambda buffer=buffer: dist.all_reduce(buffer), at_least=0.0)  # type: ignore[misc]
        turn()
        samples = [processes.slowest(turn()) for _ in range(calls)]
        yield Timed(dist.get_world_size(), nbytes, statistics.median(samples))


def fit(timed: Sequence[Timed]) -> Fit:
    """Fit a ring's alpha and bandwidth by least squares of the relative errors; of a bandwidth for each rank and one
    that all share, that which fits better.

    Raises:
        ValueError: if no positive bandwidth fits.
    """
    fitted = [one for one in timed if one.ranks in FITTED]
    held_out = [one for one in timed if one.ranks == HELD_OUT]
    candidates = []
    for is_shared in (False, True):
        unit_alpha, unit_bytes = Link(1.0, np.inf, "", is_shared), Link(0.0, 1.0, "", is_shared)
        columns = [[ring(unit, one.ranks, one.nbytes).seconds for one in fitted] for unit in (unit_alpha, unit_bytes)]
        seconds = np.array([one.seconds for one in fitted])
        table = (np.array(columns) / seconds).T
        alpha, per_byte = np.linalg.lstsq(table, np.ones(len(seconds)), rcond=None)[0]
        if alpha < 0:  # what is left is bandwidth
            alpha, per_byte = 0.0, (table[:, 1].sum() / (table[:, 1] ** 2).sum())
        if per_byte > 0:
            link = Link(float(alpha), float(1 / per_byte), "fitted to gloo on this machine's loopback", is_shared)
            candidates.append(Fit(link, _error(link, fitted), _error(link, held_out)))
    if not candidates:
        raise ValueError(f"No alpha-beta model with a positive bandwidth fits these {len(fitted)} all-reduces.")
    return min(candidates, key=lambda one: one.error)


def _error(link: Link, timed: Sequence[Timed]) -> float:
    errors = [abs(ring(link, one.ranks, one.nbytes).seconds / one.seconds - 1) for one in timed]
    return statistics.median(errors) if errors else float("nan")


def predict(link: Link, shapes: Sequence[str] = SHAPES_PREDICTED, *, seconds: float = 5.0) -> list[Predicted]:
    """hdet's converge of whole models, by the fit, and measured.

    The model: a ring over the model's bytes, and five passes over them, of packing and unpacking, at a share of this
    machine's copy bandwidth for each process."""
    bandwidth = copy_bandwidth("cpu")
    found = []
    for ranks in FITTED:
        results = processes.run(_converges, ranks, (tuple(shapes), seconds), device="cpu", limit=300.0)
        for name, measured in zip(shapes, results, strict=True):
            nbytes = 4 * SHAPES[name]().numel
            model = ring(link, ranks, nbytes).seconds + 5 * nbytes / (bandwidth / ranks)
            found.append(Predicted(name, ranks, model, measured))
    return found


def _converges(shapes: tuple[str, ...], seconds: float) -> Iterator[float]:
    for name in shapes:
        ours = {OURS: CONTENDERS[OURS]}
        yield converge.measure(SHAPES[name](), repeat=25, seconds=seconds, contenders=ours).seconds(OURS).median
