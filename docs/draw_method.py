"""Draw docs/method-light.svg and -dark.svg, the method in one figure: ``python docs/draw_method.py`` with matplotlib.

A sketch, with a wide spread: nothing in it is measured. Multipliers are assigned as the library does it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import matplotlib.pyplot as plt
from drawing import Palette, draw_both
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from hdet.explore.spread import assignment

SPREAD, ROUNDS, REPLICAS = 0.5, 3, 4
GAINS = (0.7, 1.0, 1.25)
"""Of the rounds: the controller has found that the learning rate is too low."""


def paths(axes: plt.Axes, palette: Palette) -> None:
    """Rounds 1 and 2: along the line on which all replicas lie, how far each has gone."""
    begin = 0.0
    for round, gain in enumerate(GAINS):
        multipliers = assignment(REPLICAS, SPREAD, seed=3, round=round, hyperparameter="lr/0")
        share = [i / 20 for i in range(21)]
        steps = [round + x for x in share]
        for rho, colour in zip(multipliers, palette.replicas, strict=True):
            ends = [begin + gain * rho * x for x in share]
            axes.plot(steps, ends, color=colour, linewidth=2)
            axes.plot(steps[-1], ends[-1], "o", color=colour, markersize=4)
        axes.plot(steps, [begin + gain * x for x in share], color=palette.ink, linewidth=1.2, linestyle="--")
        low, high = (begin + gain * (1 + side * SPREAD) for side in (-1, 1))
        axes.plot([round + 1] * 2, [low, high], color=palette.ink, linewidth=1)
        begin += gain
        axes.plot(round + 1, begin, "s", color=palette.ink, markersize=7, zorder=5)
    axes.plot(0, 0, "s", color=palette.ink, markersize=7, zorder=5)
    axes.text(0.05, 3.45, "1  fan out", fontsize=12, weight="bold")
    axes.text(0.05, 3.25, "each replica trains with\na learning rate of its own", va="top")
    axes.annotate(
        "2  converge",
        (1.04, 0.66),
        (1.25, 0.15),
        fontsize=12,
        weight="bold",
        arrowprops={"arrowstyle": "->", "color": palette.ink},
    )
    axes.text(1.25, 0.05, "average the weights", va="top")
    axes.set(xlim=(-0.05, 3.15), ylim=(-0.45, 3.7), xticks=[0, 1, 2, 3], yticks=[], xlabel="rounds of T steps")
    axes.set_xticklabels(["0", "T", "2T", "3T"])
    axes.set_ylabel("weights, along one line")


def observe(axes: plt.Axes, palette: Palette) -> None:
    """The loss along the line of a round's end, and how far the round went."""

    def loss(x: float) -> float:
        return 0.55 * (x - 2.1) ** 2 + 0.8

    xs = [i / 50 for i in range(176)]
    axes.plot(xs, [loss(x) for x in xs], color=palette.faint, linewidth=1.5)
    for x, label, colour in (
        (0.9, r"$m-\delta_r$", palette.yellow),
        (1.3, "$m$", palette.ink),
        (1.7, r"$m+\delta_r$", palette.red),
    ):
        axes.plot(x, loss(x), "s" if label == "$m$" else "o", color=colour, markersize=7, zorder=5)
        axes.text(x + 0.06, loss(x) + 0.14, label, color=colour)
    axes.plot(0, loss(0), "s", color=palette.ink, markersize=7)
    axes.text(0.1, loss(0), "$m'$", va="center")
    axes.annotate("", (1.3, 0.28), (0, 0.28), arrowprops={"arrowstyle": "<->", "color": palette.blue, "linewidth": 1.5})
    axes.text(0.65, 0.12, "movement", color=palette.blue, ha="center", va="top")
    axes.vlines([0, 1.3], 0.28, [loss(0), loss(1.3)], color=palette.blue, linewidth=0.7, linestyle=":")
    axes.text(3.45, 3.55, "3  observe", fontsize=12, weight="bold", ha="right")
    axes.text(3.45, 3.3, "how far the mean moved;\nlosses at mirrored points", va="top", ha="right")
    axes.set(xlim=(-0.1, 3.5), ylim=(-0.35, 3.8), xticks=[], yticks=[], xlabel="weights, along one line", ylabel="loss")


def steer(axes: plt.Axes, palette: Palette) -> None:
    """The posterior of the log gain: the estimate of the movement, and the user's own rate."""
    centre, width = 1.15, 0.42
    xs = [-1 + i / 50 for i in range(176)]
    bell = [1.7 * math.exp(-((x - centre) ** 2) / (2 * width**2)) for x in xs]
    axes.fill_between(xs, bell, color=palette.blue, alpha=0.25, linewidth=0)
    axes.plot(xs, bell, color=palette.blue, linewidth=1.5)
    axes.vlines(0, 0, 0.75, color=palette.red, linewidth=4)
    axes.text(0, 0.85, "your rate", color=palette.red, ha="center")
    axes.text(1.5, 1.45, "what movement\nand losses say", color=palette.blue)
    mean = 0.92
    axes.plot([mean] * 2, [0, 2.45], color=palette.ink, linewidth=1.2, linestyle="--")
    axes.annotate(
        "new gain", (mean, 2.45), (mean, 2.75), ha="center", arrowprops={"arrowstyle": "-", "color": palette.ink}
    )
    axes.text(-1, 3.55, "4  steer", fontsize=12, weight="bold")
    axes.text(-1, 3.3, "the mean of the two moves the gain", va="top")
    axes.set(xlim=(-1.05, 3.0), ylim=(0, 3.8), yticks=[], xlabel="log gain", ylabel="belief")
    axes.set_xticks([0], ["0"])


def draw(palette: Palette) -> Figure:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9), width_ratios=(1.35, 1, 1))
    figure.subplots_adjust(left=0.03, right=0.99, top=0.99, bottom=0.28, wspace=0.2)
    for axes, part in zip(panels, (paths, observe, steer), strict=True):
        part(axes, palette)
    way = {"coordsA": "axes fraction", "coordsB": "axes fraction", "arrowstyle": "-|>", "mutation_scale": 16}
    for left, right in pairwise(panels):
        figure.add_artist(ConnectionPatch((1.02, 0.5), (-0.09, 0.5), axesA=left, axesB=right, color=palette.ink, **way))
    below = {"axesA": panels[2], "axesB": panels[0], "connectionstyle": "bar,fraction=-0.05"}
    figure.add_artist(ConnectionPatch((0.5, -0.16), (0.5, -0.16), color=palette.ink, **below, **way))
    told = "next round: learning rate = your schedule × gain × the replica's multiplier"
    figure.text(0.5, 0.085, told, ha="center", fontsize=11)
    return figure


if __name__ == "__main__":
    draw_both("method", draw)
