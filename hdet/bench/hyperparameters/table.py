"""The benchmark's table, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from hdet.bench.hyperparameters.questions import QUESTIONS, Question, Run
from hdet.bench.hyperparameters.training import Result
from hdet.monitor.tables import markdown

_HEADER = (
    "moved, from",
    "gradients",
    "best of a sweep (loss)",
    "centre at the end: median (range)",
    "loss, start values kept",
    "loss, moved",
    "better",
)


def table(done: Mapping[str, Result], seeds: int, sweep_seeds: int) -> str:
    """One row per question, from the runs that there are.

    Args:
        done: results by the runs' keys.
        seeds: number of seeds of the runs that hdet moves.
        sweep_seeds: of those with fixed values.
    """
    rows: list[Sequence[str]] = [_HEADER]
    for question in QUESTIONS:
        kept, found = ([run(seed) for seed in range(seeds)] for run in (question.kept, question.found))
        pairs = [pair for pair in zip(kept, found, strict=True) if all(run.key in done for run in pair)]
        better = sum(done[moved.key].loss < done[still.key].loss for still, moved in pairs)
        ends = [done[run.key].centres for run in found if run.key in done]
        centres = ", ".join(
            f"{name} {statistics.median(end[name] for end in ends):.2g} "
            f"({min(end[name] for end in ends):.2g} to {max(end[name] for end in ends):.2g})"
            for name in (ends[0] if ends else ())
        )
        best = "; ".join(_best(done, question, name, sweep_seeds) for name in question.swept)
        losses = (_mean_and_deviation(_losses(done, runs)) for runs in (kept, found))
        rows.append((question.label, question.gradients, best, centres, *losses, f"{better} of {len(pairs)}"))
    return markdown(rows, padded=False)


def _losses(done: Mapping[str, Result], runs: Iterable[Run]) -> list[float]:
    return [done[run.key].loss for run in runs if run.key in done]


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}" if values else "-"


def _best(done: Mapping[str, Result], question: Question, name: str, seeds: int) -> str:
    """The value of a sweep with the lowest mean loss, and that loss."""
    swept = {
        value: _losses(done, (question.fixed(name, value, seed) for seed in range(seeds)))
        for value in question.swept[name]
    }
    means = {value: statistics.fmean(found) for value, found in swept.items() if found}
    if not means:
        return "-"
    value = min(means, key=means.__getitem__)
    return f"{name} {value:g} ({means[value]:.3f})"
