"""Draw docs/schedules-light.svg and -dark.svg, all schedules: ``python docs/draw_schedules.py`` with hdet[train]."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
from drawing import Palette, draw_both
from matplotlib.figure import Figure

from hdet import schedules

STEPS = 1000
WARMUP = 50
Line = tuple[str, Callable[[int], float]]


def wsd(decay_type: str, final_factor: float = 0.0) -> Callable[[int], float]:
    return schedules.warmup_stable_decay(
        total_steps=STEPS, decay_steps=400, warmup_steps=WARMUP, decay_type=decay_type, final_factor=final_factor
    )


def power(**ending: int) -> Callable[[int], float]:
    # 1000 steps of 2**28 tokens: 268 billion in all, so that the power law shows with the paper's constants.
    return schedules.power(batch_size=1024, sequence_length=2**18, warmup_steps=WARMUP, **ending)


def infinite(cooldown_type: str, **ending: int) -> Callable[[int], float]:
    return schedules.infinite(
        cooldown_steps=350, constant_factor=0.5, warmup_steps=WARMUP, cooldown_type=cooldown_type, **ending
    )


# Panel by panel: where the legend has room, and the lines from back to front.
PANELS: dict[str, tuple[str | tuple[float, float], list[Line]]] = {
    "constant": ("lower right", [("with warm-up", schedules.constant(warmup_steps=WARMUP))]),
    "linear": (
        "upper right",
        [
            ("with warm-up", schedules.linear(total_steps=STEPS, warmup_steps=WARMUP)),
            ("final_factor=0.2", schedules.linear(total_steps=STEPS, final_factor=0.2)),
        ],
    ),
    "cosine": (
        "upper right",
        [
            ("with warm-up", schedules.cosine(total_steps=STEPS, warmup_steps=WARMUP)),
            ("final_factor=0.2", schedules.cosine(total_steps=STEPS, final_factor=0.2)),
        ],
    ),
    "one_cycle": (
        "upper right",
        [
            ("cos", schedules.one_cycle(total_steps=STEPS)),
            ("linear", schedules.one_cycle(total_steps=STEPS, anneal_strategy="linear")),
            ("three_phase", schedules.one_cycle(total_steps=STEPS, three_phase=True)),
        ],
    ),
    "rex": (
        "lower left",
        [
            ("with warm-up", schedules.rex(total_steps=STEPS, warmup_steps=WARMUP)),
            ("final_factor=0.2", schedules.rex(total_steps=STEPS, final_factor=0.2)),
        ],
    ),
    "uba": (
        "lower left",
        [(f"phi={phi:g}", schedules.uba(total_steps=STEPS, phi=phi)) for phi in (0.2, 1, 2, 5)],
    ),
    "warmup_stable_decay": (
        (0.05, 0.02),
        [
            ("cosine", wsd("cosine")),
            ("linear", wsd("linear")),
            ("exponential, to 0.1", wsd("exponential", 0.1)),
            ("sqrt", wsd("sqrt")),
        ],
    ),
    "power": (
        "lower left",
        [("open-ended", power()), ("decay_start=800", power(decay_start=800, decay_steps=200))],
    ),
    "infinite": (
        "upper right",
        [
            ("cosine, open-ended", infinite("cosine")),
            ("inverse_sqrt, open-ended", infinite("inverse_sqrt")),
            ("cosine, anneal_start=750", infinite("cosine", anneal_start=750, anneal_steps=200)),
        ],
    ),
}


def draw(palette: Palette) -> Figure:
    colours = (palette.blue, palette.red, palette.sky, palette.yellow)
    assert set(PANELS) == set(schedules.__all__)
    figure, grid = plt.subplots(3, 3, figsize=(9, 7.2), sharex=True, sharey=True, layout="constrained")
    for axes, (name, (place, lines)) in zip(grid.flat, PANELS.items(), strict=True):
        for i, (label, factor) in enumerate(lines):
            # Thinner towards the front, so that lines which share a stretch all show.
            width = 1.6 + 0.9 * (len(lines) - 1 - i) * (name != "uba")
            values = [factor(t) for t in range(STEPS + 1)]
            axes.plot(range(STEPS + 1), values, color=colours[i], linewidth=width, label=label)
        axes.set_title(name, family="monospace", weight="bold", fontsize=10.5)
        axes.grid(color=palette.faint, alpha=0.3, linewidth=0.6)
        axes.set(ylim=(-0.03, 1.06), xlim=(0, STEPS), xticks=(0, 250, 500, 750), yticks=(0, 0.25, 0.5, 0.75, 1))
        axes.legend(fontsize=8.5, loc=place, handlelength=1.4)
    figure.supxlabel(f"step, of {STEPS}", fontsize=10)
    figure.supylabel("factor = learning rate / peak", fontsize=10)
    return figure


if __name__ == "__main__":
    draw_both("schedules", draw)
