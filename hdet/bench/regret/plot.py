"""The picture of the regret benchmark: regret against the start, one panel per workload, one line per contender."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from hdet.bench.regret.contenders import CONTENDERS, Contender
from hdet.bench.regret.table import Regrets

_COLUMNS = 4
_BOTTOM, _TOP = -10.0, 300.0
_TICKS = (-10, -3, -1, 0, 1, 3, 10, 30, 100, 300)


def draw(regrets: Regrets, path: Path, contenders: Mapping[str, Contender] = CONTENDERS) -> None:
    """Draw mean regrets in percent, with the range over the seeds. A cross at the upper edge is a run that diverged,
    or whose regret is beyond it; a dashed line is a contender that does not use the start.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    workloads = list(regrets.oracles)
    columns = min(_COLUMNS, max(1, len(workloads)))
    rows = max(1, math.ceil(len(workloads) / columns))
    figure = Figure(figsize=(1 + 3.6 * columns, 1 + 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    ours = [name for name, contender in contenders.items() if contender.ours]
    peers = [name for name in contenders if name not in ours]
    colours = {name: f"C{i}" for i, name in enumerate(peers)}
    colours |= {name: str(i / len(ours)) for i, name in enumerate(ours)}  # from black to grey
    lines = {}
    for axes, workload in zip(panels, workloads, strict=False):
        axes.axhspan(0, 3, color="black", alpha=0.06, linewidth=0)
        for name in (*peers, *ours):
            cells = {start: cell for (_, start), cell in sorted(regrets.of(name, workload).items())}
            if not cells:
                continue
            starts = list(cells)
            means, lows, highs = ([_shown(cell[i]) for cell in cells.values()] for i in range(3))
            style = {"color": colours[name], "linestyle": "-" if contenders[name].uses_start else "--"}
            width = 2.5 if name in ours else 1.3
            (lines[name],) = axes.plot(starts, means, linewidth=width, marker=".", label=name, **style)
            axes.fill_between(starts, lows, highs, color=colours[name], alpha=0.12, linewidth=0)
            beyond = [start for start, mean in zip(starts, means, strict=True) if mean == _TOP]
            axes.plot(beyond, [_TOP] * len(beyond), "x", color=colours[name], clip_on=False, in_layout=False, zorder=3)
        axes.set_title(workload)
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set(ylim=(_BOTTOM, _TOP), yticks=_TICKS, yticklabels=_TICKS)
        axes.set(xticks=regrets.starts, xticklabels=[f"{start:.2g}" for start in regrets.starts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[max(1, len(workloads)) :]:
        axes.set_visible(False)
    figure.supxlabel("max_lr, in units of the tuned one")
    figure.supylabel("regret (%)")
    if lines:
        names = [name for name in contenders if name in lines]
        figure.legend([lines[name] for name in names], names, frameon=False, loc="outside right center")
    figure.savefig(path, dpi=130)


def _shown(regret: float) -> float:
    """In percent, and within the panel."""
    return min(max(100 * regret, _BOTTOM), _TOP)
