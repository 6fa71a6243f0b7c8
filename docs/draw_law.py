"""Draw docs/law-light.svg and -dark.svg: ``python docs/draw_law.py`` with matplotlib installed, in seconds.

It shows what docs/research/2026-11-28-law.csv holds: for each workload of the study in
docs/research/2026-11-28-posterior.md and each multiple of its tuned learning rate, held constant, the movement of a
round in units of that of the law, m / m*, in the geometric mean over rounds 11 to 40 of 100. The three that are learned
by heart are relative to a rate that was guessed.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from drawing import Palette, draw_both
from matplotlib.figure import Figure

HERE = Path(__file__).parent
BY_HEART = ("diabetes", "few_texts", "tumours")
POWER = 0.7


def read() -> dict[str, list[tuple[float, float]]]:
    """[workload] (multiple, m / m*), in increasing order."""
    found = defaultdict(list)
    with (HERE / "research" / "2026-11-28-law.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["workload"]].append((float(row["multiple"]), float(row["ratio"])))
    return {name: sorted(points) for name, points in found.items()}


def at_tuned(points: list[tuple[float, float]]) -> float:
    """m / m* at the multiple nearest to 1."""
    return min(points, key=lambda point: abs(math.log(point[0])))[1]


def draw(palette: Palette) -> Figure:
    found = read()
    figure, (lines, dots) = plt.subplots(
        1, 2, figsize=(11, 4.6), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
    )
    for name, points in found.items():
        colour, width = (palette.red, 1.5) if name in BY_HEART else (palette.blue, 0.9)
        lines.plot(*zip(*points, strict=True), color=colour, linewidth=width, alpha=0.8)
    ends = (0.01, 30)
    lines.plot(ends, [x**POWER for x in ends], color=palette.ink, linestyle="--", linewidth=1.5)
    lines.axhline(1, color=palette.faint, linewidth=0.8)
    lines.axvline(1, color=palette.faint, linewidth=0.8)
    lines.text(0.012, 8, "dashed: the power 0.7\norange: learned by heart", fontsize=8)
    lines.set(xscale="log", yscale="log", xlim=ends, ylim=(0.02, 20))
    lines.set(title="How far the weights move", xlabel="learning rate over the tuned one", ylabel="m / m*")

    known = sorted((at_tuned(points), name) for name, points in found.items())
    for y, (ratio, name) in enumerate(known):
        dots.plot(ratio, y, "o", color=palette.red if name in BY_HEART else palette.blue, markersize=4)
    logs = [math.log(ratio) for ratio, name in known if name not in BY_HEART]
    spread = statistics.stdev(logs)
    dots.axvspan(math.exp(-spread), math.exp(spread), color=palette.blue, alpha=0.15, linewidth=0)
    dots.axvline(1, color=palette.faint, linewidth=0.8)
    dots.set_yticks(range(len(known)), [name for _, name in known], fontsize=7)
    dots.set(xscale="log", xlim=(0.2, 4), title="At the tuned rate", xlabel="m / m* (band: standard deviation)")
    dots.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    dots.minorticks_off()
    print(f"{len(logs)} workloads: mean {statistics.fmean(logs):+.2f}, standard deviation {spread:.2f}, of the log")
    return figure


if __name__ == "__main__":
    draw_both("law", draw)
