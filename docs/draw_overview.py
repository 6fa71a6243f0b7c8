"""Draw docs/overview-light.svg and -dark.svg: ``python docs/draw_overview.py`` with hdet[bench], in half a minute.

Left, six rounds of four replicas, as the library assigns multipliers. In the middle the common learning rate of the
benchmark's workload ``mixture``, simulated, from three values of max_lr. Right, the results of
docs/research/2026-11-28-evidence.md: change them here when they change there.
"""

from __future__ import annotations

from functools import cache

import matplotlib.pyplot as plt
import torch
from drawing import Palette, draw_both
from matplotlib.figure import Figure

from hdet import schedules
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS
from hdet.explore.spread import assignment

SPREAD, ROUNDS, EVERY, STEPS = 0.2, 6, 10, 200
STARTS = (0.1, 1.0, 8.0)
RESULTS = {  # max_lr over the best: (excess, standard error) in %, of docs/research/2026-11-28-evidence.md:
    # hdet on all workloads, hdet on language models, OneCycle on all
    1 / 100: ((1.5, 0.8), (0.8, 0.4), (50.3, 4.4)),
    1 / 10: ((0.3, 0.5), (0.1, 0.6), (18.1, 4.2)),
    1 / 3: ((1.2, 0.6), (0.5, 0.7), (5.0, 1.3)),
    1: ((0.4, 0.2), (0.3, 0.3), (0, 0)),
    3: ((1.0, 0.7), (1.3, 0.8), (7.1, 4.2)),
    8: ((0.2, 0.8), (-0.2, 0.5), (18.8, 6.3)),
}


def fan_out(axes: plt.Axes, palette: Palette) -> None:
    """Learning rates of the replicas and their mean, round by round."""
    factor = schedules.one_cycle(total_steps=STEPS)
    for round in range(ROUNDS):
        steps = [*range(round * EVERY, (round + 1) * EVERY + 1)]
        base = [factor(step) for step in steps]
        multipliers = assignment(4, SPREAD, seed=0, round=round, hyperparameter="lr/0")
        for rho, colour in zip(multipliers, palette.replicas, strict=True):
            axes.plot(steps, [rho * b for b in base], color=colour, linewidth=2)
        axes.plot(steps, base, color=palette.ink, linewidth=1, linestyle="--")
        axes.axvline(steps[-1], color=palette.faint, linewidth=0.6, alpha=0.5, zorder=0)
    lines = axes.lines[:5]
    labels = [*(f"replica {r}" for r in range(4)), "common"]
    axes.legend(lines, labels, fontsize=8)
    axes.set(title="Fan out, average, draw anew", xlabel="step", ylabel="learning rate / max_lr")


@cache
def gains_from(start: float) -> list[float]:
    """The gains of a simulated run, round by round."""
    workload = WORKLOADS["mixture"]
    return [1.0, *simulate(workload, workload.tuned * start, 0, Setting()).details["gains"]]


def common_rate(axes: plt.Axes, palette: Palette) -> None:
    """The common learning rate of three simulated runs, in units of the best max_lr."""
    workload = WORKLOADS["mixture"]
    factor = schedules.one_cycle(total_steps=workload.steps)
    for start, colour in zip(STARTS, (palette.blue, palette.ink, palette.red), strict=True):
        gains = gains_from(start)
        every = workload.steps // (len(gains) - 1)
        steps = range(workload.steps)
        axes.plot(steps, [start * factor(s) * gains[s // every] for s in steps], color=colour, label=f"{start:g} times")
        axes.plot(steps, [start * factor(s) for s in steps], color=colour, linewidth=0.8, linestyle=":")
    axes.legend(title="max_lr over the best", title_fontsize=8, fontsize=8, loc="lower center")
    axes.set(title="The common rate (dotted: OneCycle)", xlabel="step", yscale="log", ylim=(1e-3, 15))


def results(axes: plt.Axes, palette: Palette) -> None:
    """Excess over tuned OneCycle by start."""
    starts = list(RESULTS)
    kinds = (("hdet", palette.red), ("hdet, language models", palette.blue), ("OneCycle", palette.faint))
    for i, (label, colour) in enumerate(kinds):
        means, errors = zip(*(result[i] for result in RESULTS.values()), strict=True)
        axes.errorbar(starts, means, errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
    axes.axhline(0, color=palette.ink, linewidth=0.6)
    axes.set(title="Loss over tuned OneCycle, in %", xlabel="max_lr over the best", xscale="log")
    axes.set_xticks(starts, ["1/100", "1/10", "1/3", "1", "3", "8"])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def draw(palette: Palette) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    fan_out(left, palette)
    common_rate(middle, palette)
    results(right, palette)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_both("overview", draw)
