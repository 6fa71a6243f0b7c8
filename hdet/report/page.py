"""The page: the story of each run in words, then charts, then settings. One file, no network, no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from hdet import files
from hdet.monitor import Report, story
from hdet.report.charts import Band, Chart, Line, Mark, draw, number
from hdet.report.run import Curve, Run

_COLOURS = 8
_JUMPY = 30.0
"""A positive quantity whose largest value is so many times its smallest has a logarithmic axis."""


def write(runs: Sequence[Run], path: Path) -> Path:
    """Write the report of some runs to a file; returns its path.

    Raises:
        ValueError: if something that is no regular file stands there.
        OSError: if it may not be written.
    """
    text = page(runs).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_at_once(path, lambda file: file.write(text))
    return path


def page(runs: Sequence[Run]) -> str:
    """The report of some runs, as HTML."""
    runs = _named_apart(runs)
    title = f"hdet report: {', '.join(run.name for run in runs)}"
    several = len(runs) > 1
    parts = [f"<h1>{escape(title)}</h1>"]
    for i, run in enumerate(runs):
        heading = f'<h2><span class="swatch b{i % _COLOURS}"></span>{escape(run.name)}</h2>' if several else ""
        told = "".join(f"<li>{escape(sentence)}</li>" for sentence in words(run))
        parts.append(f"<section>{heading}<p>{escape(state(run))}</p><ul>{told}</ul></section>")
    parts.append(_figures(runs))
    shared = (_rates(runs), *([_gains(runs)] if several else []), _losses(runs))
    parts.append(f'<section><h2>Learning rate and loss</h2><div class="charts">{_drawn(shared)}</div></section>')
    for i, run in enumerate(runs):
        if run.rounds:
            name = f": {escape(run.name)}" if several else ""
            swatch = f'<span class="swatch b{i % _COLOURS}"></span>' if several else ""
            parts.append(
                f'<section><h2>{swatch}Evidence, replicas, cost{name}</h2><div class="charts">'
                f"{_drawn(_of_one(run))}</div></section>"
            )
    parts.append(_settings(runs))
    style = (resources("hdet.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>{''.join(parts)}</main></body></html>\n"
    )


def words(run: Run) -> list[str]:
    """The story of a run, with what only the training program knows."""
    if not run.rounds and run.about.get("converge_every") is None:
        return [
            "The run has no rounds: it followed its schedule, with one learning rate for all processes.",
            *_validated(run),
        ]
    return [*story.sentences(run.rounds, peak_lr=run.peak_lr), *_validated(run)]


def state(run: Run) -> str:
    """How far the run is."""
    total = run.total_steps
    if total is None:
        return f"As of step {number(run.step)}."
    if run.step < total:
        return f"As of step {number(run.step)} of {number(total)}: the run goes on, or was stopped."
    return f"All {number(total)} steps."


def _validated(run: Run) -> list[str]:
    if not run.validation:
        return []
    step, loss = run.validation[-1]
    best_step, best = min(run.validation, key=lambda point: (math.isnan(point[1]), point[1]))
    lowest = f", the lowest was {best:.4g} at step {best_step}" if best < loss else ""
    return [f"The validation loss was {loss:.4g} at step {step}{lowest}."]


def _named_apart(runs: Sequence[Run]) -> Sequence[Run]:
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({i + 1})") if names.count(run.name) > 1 else run for i, run in enumerate(runs)
    ]


# -------------------------------------------------------------------------------------------------------- figures


def _figures(runs: Sequence[Run]) -> str:
    """What the runs came to, side by side."""
    rows: list[tuple[str, list[str]]] = [
        ("steps", [number(run.step) for run in runs]),
        ("replicas", [_text(run.about.get("replicas", 1)) for run in runs]),
        ("peak learning rate, given", [_known(run.peak_lr) for run in runs]),
        ("peak learning rate, at the end", [_known(run.peak_lr * _gain(run)) for run in runs]),
        ("gain", [_gains_of(run) for run in runs]),
        ("validation loss", [_last(run.validation) for run in runs]),
        ("training loss", [_last(run.training or _mean_losses(run)) for run in runs]),
        ("rounds undone", [number(sum(report.rolled_back for report in run.rounds)) for run in runs]),
        ("averages without a replica", [number(sum(bool(r.excluded) for r in run.rounds)) for run in runs]),
        ("time in converges", [_cost(run) for run in runs]),
    ]
    rows = [(name, cells) for name, cells in rows if any(cell not in ("", "0") for cell in cells)]
    return (
        f"<section><h2>In figures</h2>{_table(['', *(run.name for run in runs)], [(n, *c) for n, c in rows])}</section>"
    )


def _gain(run: Run) -> float:
    return run.rounds[-1].next_gain[0] if run.rounds else 1.0


def _gains_of(run: Run) -> str:
    indices = story.groups_of(run.rounds)
    return " / ".join(f"{run.rounds[-1].next_gain[g]:.3g}" for g in indices)


def _mean_losses(run: Run) -> Curve:
    return tuple((r.step, r.mean_loss) for r in run.rounds if r.complete and math.isfinite(r.mean_loss))


def _last(curve: Curve) -> str:
    return f"{curve[-1][1]:.4g}" if curve else ""


def _known(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _cost(run: Run) -> str:
    spent = sum(report.converge_ms for report in run.rounds) / 1e3
    if not run.rounds or not math.isfinite(spent):
        return ""
    share = f", {spent / run.seconds:.1%} of the run" if run.seconds > spent else ""
    return f"{spent:.3g} s{share}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return number(value) if isinstance(value, (int, float)) else str(value)


# --------------------------------------------------------------------------------------------------------- charts


def _drawn(charts: Iterable[Chart]) -> str:
    return "".join(draw(chart) for chart in charts)


def _end(runs: Sequence[Run]) -> float:
    return max(run.total_steps or run.step for run in runs)


def _rates(runs: Sequence[Run]) -> Chart:
    """Learning rates with and without gain."""
    lines: list[Line] = []
    bands: list[Band] = []
    marks: list[Mark] = []
    for i, run in enumerate(runs):
        several, colour = len(runs) > 1, i % _COLOURS
        name = f"{run.name}: " if several else ""
        if not run.rounds:
            lines.append(Line(f"{name}schedule", run.lr, colour))
            continue
        for g in _distinct_rates(run) if not several else [0]:
            group = f" of {run.rounds[0].groups[g]}" if g else ""
            lines.append(
                Line(f"{name}with gain{group}", [(r.step, r.base_lr[g]) for r in run.rounds], (colour + g) % _COLOURS)
            )
            if not several:
                bands.append(
                    Band(
                        f"replicas{group}",
                        [(r.step, min(r.replica_lr[g]), max(r.replica_lr[g])) for r in run.rounds if r.replica_lr[g]],
                        g % _COLOURS,
                    )
                )
        lines.append(
            Line(
                f"{name}without gain",
                [(r.step, r.schedule_lr[0]) for r in run.rounds],
                colour if several else 7,
                "dashed",
            )
        )
        marks += _marks(run, name)
    about = "The schedule as it was given, and times the gain. Logarithmic."
    return Chart("Learning rate", about, lines, bands, marks, log=True, last=_end(runs))


def _distinct_rates(run: Run) -> list[int]:
    """Indices of parameter groups whose learning rates differ."""
    found: dict[tuple[float, ...], int] = {}
    for g in range(len(run.rounds[0].groups)):
        found.setdefault(tuple(report.base_lr[g] for report in run.rounds if g < len(report.base_lr)), g)
    return sorted(found.values())


def _marks(run: Run, name: str) -> list[Mark]:
    marks = []
    for report in run.rounds:
        if report.rolled_back:
            why = f": {report.cause}" if report.cause else ""
            marks.append(Mark(report.step, report.base_lr[0], "undone", f"{name}step {report.step}: round undone{why}"))
        if report.excluded:
            who = ", ".join(map(str, report.excluded))
            marks.append(
                Mark(report.step, report.base_lr[0], "excluded", f"{name}step {report.step}: left out: replica {who}")
            )
    return marks


def _gains(runs: Sequence[Run]) -> Chart:
    lines = [Line(run.name, _gain_curve(run.rounds), i % _COLOURS) for i, run in enumerate(runs)]
    return Chart("Gain", "By what the schedule is multiplied. Logarithmic.", lines, log=True, last=_end(runs))


def _gain_curve(rounds: Sequence[Report], g: int = 0) -> list[tuple[float, float]]:
    start = [(0.0, rounds[0].gain[g])] if rounds and not rounds[0].round else []
    return [*start, *((float(r.step), r.next_gain[g]) for r in rounds)]


def _losses(runs: Sequence[Run]) -> Chart:
    """Training and validation."""
    lines = []
    for i, run in enumerate(runs):
        several, colour = len(runs) > 1, i % _COLOURS
        name = f"{run.name}: " if several else ""
        training = run.training or _mean_losses(run)
        lines.append(Line(f"{name}training", training, colour, "faint" if run.validation else "solid"))
        if run.validation:
            lines.append(Line(f"{name}validation", run.validation, colour if several else 1, "dots"))
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    is_log = bool(values) and min(values) > 0 and max(values) / min(values) > _JUMPY
    about = "Mean of all replicas." + (" Logarithmic." if is_log else "")
    return Chart("Loss", about, lines, log=is_log, last=_end(runs))


def _of_one(run: Run) -> list[Chart]:
    """What is drawn of each run by itself."""
    rounds = [report for report in run.rounds if report.complete]
    end = _end([run])
    charts = []
    indices = story.groups_of(run.rounds)
    for g in indices:
        name = f" of {run.rounds[0].groups[g]}" if len(indices) > 1 else ""
        charts += _evidence(rounds, g, name, end)
    losses = [(r.step, *_range(r.losses)) for r in rounds]
    means = [(r.step, r.mean_loss) for r in rounds]
    known = [y for _, low, high in losses for y in (low, high) if math.isfinite(y)]
    charts += [
        Chart(
            "Replicas: training loss",
            "Mean, lowest and highest over the replicas, by round.",
            [Line("mean", means)],
            [Band("lowest to highest", losses)],
            log=bool(known) and min(known) > 0 and max(known) / min(known) > _JUMPY,
            last=end,
        ),
        Chart(
            "Replicas: distance from their mean",
            "Of the parameters, before each average.",
            [Line("largest", [(r.step, _range(r.distance)[1]) for r in run.rounds], 0)],
            last=end,
        ),
        *_hyperparameters(rounds, end),
        Chart(
            "Cost of a converge",
            f"Wall-clock time in ms on the rank that writes; {number(run.rounds[-1].converge_bytes)} bytes sent.",
            [Line("ms", [(r.step, r.converge_ms) for r in run.rounds], 7)],
            last=end,
        ),
    ]
    return charts


def _evidence(rounds: Sequence[Report], g: int, name: str, end: float) -> list[Chart]:
    """Prior and evidence of one gain."""
    judged = [(r, r.judgements[g]) for r in rounds if g < len(r.judgements)]
    gain = Line("gain", _gain_curve(rounds, g), 0)
    about = "The gain in force, what the movement and what the probe argue for, and the estimate from both."
    return [
        Chart(
            f"Gain{name}: prior and evidence",
            f"{about} Logarithmic.",
            [
                gain,
                Line("by movement", [(r.step, j.centre) for r, j in judged], 1),
                Line("by the probe", [(r.step, j.evidence) for r, j in judged], 3),
                Line("estimate", [(r.step, j.estimate) for r, j in judged], 2, "dashed"),
            ],
            log=True,
            last=end,
        ),
        Chart(
            f"Movement{name}",
            "How far a round took the weights, relative to their size, and how far it should have. Logarithmic.",
            [
                Line("movement", [(r.step, r.movement[g]) for r in rounds], 0),
                Line("target", [(r.step, j.target) for r, j in judged], 1, "dashed"),
            ],
            log=True,
            last=end,
        ),
        Chart(
            f"Trust{name}",
            "Probability that the given rate is right.",
            [Line("trust", [(r.step, j.trust) for r, j in judged], 3)],
            last=end,
        ),
        *(
            []
            if any(math.isfinite(j.centre) for _, j in judged)
            else [
                Chart(
                    f"Hypergradient{name}",
                    "Above 0 the replicas with larger learning rates had the lower losses.",
                    [
                        Line("hypergradient", [(r.step, r.hypergradient[g]) for r in rounds], 4),
                        Line("velocity", [(r.step, r.velocity[g]) for r in rounds], 5, "dashed"),
                    ],
                    last=end,
                )
            ]
        ),
    ]


def _hyperparameters(rounds: Sequence[Report], end: float) -> list[Chart]:
    names = [h.name for h in rounds[0].hyperparameters] if rounds else []
    charts = []
    for i, name in enumerate(names):
        of = [(r.step, r.hyperparameters[i]) for r in rounds if i < len(r.hyperparameters)]
        centre = Line("centre", [(step, h.next_centre) for step, h in of], 5)
        band = Band("replicas", [(step, *_range(h.values)) for step, h in of], 5)
        charts.append(Chart(name, "Its centre, and the replicas' values.", [centre], [band], last=end))
    return charts


def _range(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    return (min(known), max(known)) if known else (math.nan, math.nan)


# ------------------------------------------------------------------------------------------------------- settings


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.changed))
    about = list(dict.fromkeys(name for run in runs for name in run.about))
    rows = [(name, "", *(_text(run.about.get(name, "")) for run in runs)) for name in about]
    for name in names:
        default = next(run.changed[name][1] for run in runs if name in run.changed)
        cells = (_text(run.changed[name][0]) if name in run.changed else "as default" for run in runs)
        rows.append((name, _text(default), *cells))
    if not rows:
        return ""
    table = _table(["setting", "default", *(run.name for run in runs)], rows)
    return f"<section><h2>Settings that differ from the defaults</h2>{table}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
