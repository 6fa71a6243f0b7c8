"""Draw docs/slopes-light.svg and -dark.svg: ``python docs/draw_slopes.py`` with hdet[train].

The two slopes by learning rate. It takes about three minutes.
"""

from __future__ import annotations

import math
from functools import cache

import matplotlib.pyplot as plt
import torch
from drawing import Palette, draw_both
from matplotlib.figure import Figure

from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS
from hdet.steer.posterior import Posterior

MULTIPLES = (0.03, 0.1, 1 / 3, 1.0, 3.0, 8.0)
STAGES = ((0.05, 0.15), (0.15, 0.3), (0.3, 0.55))
SEEDS = (0, 1)
STILL = Setting(controller=Posterior(until=0.0, evidence_error=1e9), keep_slopes=True)  # probes, and moves nothing


@cache
def slopes(name: str, multiple: float) -> list[tuple[float, float, float]]:
    """(progress, raw, debiased) of every probe."""
    workload = WORKLOADS[name]
    outcomes = [simulate(workload, workload.tuned * multiple, seed, STILL) for seed in SEEDS]
    return [
        (progress, found.raw, found.debiased)
        for outcome in outcomes
        for progress, found in outcome.details.get("slopes", [])
    ]


def mean_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def draw(palette: Palette) -> Figure:
    colours = (palette.sky, palette.blue, palette.ink)
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharex=True)
    for row, name in zip(grid, ("char_lm", "digits_mlp"), strict=True):
        measured = {multiple: slopes(name, multiple) for multiple in MULTIPLES}
        for axes, column, title in zip(row, (1, 2), ("raw slope R", "debiased slope A"), strict=True):
            for (low, high), colour in zip(STAGES, colours, strict=True):
                points = [
                    (multiple, *mean_of([x[column] for x in found if low <= x[0] < high]))
                    for multiple, found in measured.items()
                    if found
                ]
                xs, means, errors = zip(*points, strict=True)
                label = f"{100 * low:.0f}-{100 * high:.0f}% of the run"
                axes.errorbar(xs, means, errors, color=colour, marker="o", markersize=3, capsize=2, label=label)
            axes.axhline(0, color=palette.faint, linewidth=0.8)
            axes.axvline(1, color=palette.faint, linewidth=0.8, linestyle=":")
            axes.set_title(f"{name}: {title}")
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=0.02 if column == 1 else 0.002)
    for axes in grid[-1]:
        axes.set_xlabel("max_lr, in units of the best one")
    grid[0][0].set_ylabel('> 0: "more"')
    grid[1][0].set_ylabel('> 0: "more"')
    grid[0][0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_both("slopes", draw)
