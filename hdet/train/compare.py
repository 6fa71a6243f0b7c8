"""``python -m hdet.train.compare runs/a runs/b [--output compare.png]``: a table of finished runs, and their curves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdet import files
from hdet.monitor.base import read_jsonl
from hdet.monitor.tables import aligned


def table(runs: Sequence[Path]) -> str:
    """What the runs came to, one line each.

    Raises:
        OSError, ValueError: if a run has no ``summary.json``, or another file in its place.
    """
    rows: list[tuple[str, ...]] = [
        ("run", "spread", "validation loss", "max LR", "final LR", "gain", "converge overhead", "seconds")
    ]
    for run in runs:
        path = run / "summary.json"
        try:
            rows.append((run.name, *_row(files.read_json(path))))
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no summary of a run: {error!r}.") from error
    return aligned(rows)


def _row(summary: dict[str, Any]) -> tuple[str, ...]:
    loss = summary["validation_loss"]
    return (
        f"{summary['spread']:.3g}",
        "diverged" if loss is None else f"{loss:.4f}",
        f"{summary['max_lr']:.2e}",
        f"{summary['final_lr']:.2e}",
        " / ".join(f"{gain:.3g}" for gain in summary["gain"].values()),
        f"{summary['converge_overhead']:.2%}",
        f"{summary['wall_seconds']:.0f}",
    )


def plot(runs: Sequence[Path], output: Path) -> None:
    """Loss and learning rate of the runs over their steps, as a picture.

    Raises:
        FileNotFoundError: if a run has no ``metrics.jsonl``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True)
    for i, run in enumerate(runs):
        records, colour = read_jsonl(run / "metrics.jsonl"), f"C{i}"
        losses.plot(*_curve(records, "train_loss"), color=colour, alpha=0.3, linewidth=1)
        losses.plot(*_curve(records, "val_loss"), color=colour, marker="o", markersize=3, label=run.name)
        rates.plot(*_curve(records, "lr"), color=colour, label=run.name)
    losses.set_ylabel("loss (dots: validation)")
    rates.set_ylabel("base learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def _curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdet.train.compare", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="LOG_DIR", help="train.log_dir of a finished run")
    parser.add_argument("--output", type=Path, metavar="PNG", help="where to draw the curves")
    arguments = parser.parse_args(argv)
    try:
        print(table(arguments.runs))
        if arguments.output:
            plot(arguments.runs, arguments.output)
            print(f"curves: {arguments.output}")
    except FileNotFoundError as error:
        print(f"python -m hdet.train.compare: error: {error.filename} is missing: no finished run.", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"python -m hdet.train.compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
