"""What the pictures have in common: one for light pages and one for dark ones, without a background, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).parent


class Palette(NamedTuple):
    """Colours, after Okabe and Ito."""

    ink: str
    """Of text, axes and what is in the middle."""
    faint: str
    """Of grids and what is for comparison."""
    blue: str
    sky: str
    yellow: str
    red: str

    @property
    def replicas(self) -> Sequence[str]:
        """One colour for each of four."""
        return self.blue, self.sky, self.yellow, self.red


PALETTES = {
    "light": Palette("#1f2328", "#8c959f", "#0072B2", "#56B4E9", "#E69F00", "#D55E00"),
    "dark": Palette("#e6edf3", "#848d97", "#4C9BE8", "#9AD7FF", "#F2C14E", "#FF8A4C"),
}


def draw_both(name: str, draw: Callable[[Palette], Figure]) -> None:
    """Write ``docs/NAME-light.svg`` and ``docs/NAME-dark.svg``, the same bytes whenever the drawing is the same."""
    for mode, palette in PALETTES.items():
        ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        settings = {
            **dict.fromkeys(ink, palette.ink),
            "axes.facecolor": "none",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 10,
            "legend.frameon": False,
            "svg.hashsalt": name,
        }
        with plt.rc_context(settings):
            figure = draw(palette)
            figure.savefig(HERE / f"{name}-{mode}.svg", transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(figure)
