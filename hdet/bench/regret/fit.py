"""``python -m hdet.bench.regret.fit split | leave-one-out | ablation``: fits the default controller's constants.

From runs at constant rates (:mod:`.collect`), on which the controller's runs are computed (:mod:`.quasi_static`): no
model is trained. All workloads count that have such runs and are meant for it
(:attr:`hdet.bench.regret.workload.Workload.say`). The candidates are all combinations of the values in
:data:`SPACE`, or some of them; the best has the lowest :func:`score`.

``split``
    fits on either half of the workloads, and reports on the other; a workload's half is a hash of its name.
``leave-one-out``
    fits on all workloads but one, for each, and reports on the one left out.
``ablation``
    shows the controller as it is with each constant halved and doubled, and without each part.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdet.bench.regret.collect import CACHE, CONTENDER
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.quasi_static import Array, Constants, Response, excesses, response
from hdet.bench.regret.runs import Store, version_of
from hdet.bench.regret.summary import mean_and_error
from hdet.bench.regret.workloads import STARTS, WORKLOADS
from hdet.monitor.tables import markdown

SPACE: dict[str, tuple[float, ...]] = {
    "memory": (0.5, 0.6, 0.7, 0.8),
    "until": (0.3, 0.4, 0.5),
    "noise_weight": (0.15, 0.2, 0.3, 0.5, 1.0),
    "movement_error": (0.35, 0.45, 0.55, 0.65, 0.8),
    "evidence_error": (0.4, 0.5, 0.65, 0.8, 1.0, math.inf),
    "prior": (0.3, 0.5, 0.7),
}
"""Values that are tried: every combination is a candidate."""
SEED = 0
"""Of random combinations."""
TARGETS = tuple(0.003 if start == 1 else 0.015 for start in STARTS)
"""[start] mean excess that is aimed at."""
TUNED = STARTS.index(1.0)

ABLATION: dict[str, dict[str, tuple[float, ...]]] = {
    "each constant": {
        "memory": (0.36, math.sqrt(0.6)),
        "until": (0.2, 0.8),
        "noise_weight": (0.15, 0.6),
        "movement_error": (0.225, 0.9),
        "evidence_error": (0.25, 1.0),
    },
    "each part": {
        "evidence_error": (math.inf,),
        "movement_error": (100.0,),
        "prior": (0.0, 0.25, 0.75),
        "early": (0.0, 2.0),
    },
    "what was measured": {"usual": (0.3, 0.45), "fall": (0.2, 0.8)},
    "the cost": {"probe_every": (0.0, 0.02, 0.08), "probe_from": (0.0, 0.2)},
}
"""Halved and doubled; of ``memory`` the time in which it halves. And what is not a constant of the class."""


def candidates(space: Mapping[str, Sequence[float]] = SPACE, draws: int | None = None) -> list[Constants]:
    """All combinations in a space, or that many random ones: the same ones every time."""
    found: Iterable[Sequence[float]] = itertools.product(*space.values())
    if draws is not None:
        generator = np.random.default_rng(SEED)
        found = [[values[int(generator.integers(len(values)))] for values in space.values()] for _ in range(draws)]
    return [Constants(**dict(zip(space, values, strict=True))) for values in found]


def half(workload: str) -> str:
    """``"first"`` or ``"second"``, by the name alone."""
    return "first" if hashlib.sha256(workload.encode()).digest()[0] % 2 else "second"


def load(cache: Path) -> dict[str, Response]:
    """The workloads that the constants are fitted on and that have runs enough.

    Raises:
        ValueError: if there are fewer than two.
    """
    runs: dict[str, dict[tuple[float, int], Outcome]] = {}
    for run, outcome in Store(cache).outcomes.items():
        workload = WORKLOADS.get(run.workload)
        fits = workload is not None and workload.say == "constants" and run.steps == workload.steps
        if fits and run.version == version_of(CONTENDER) and run.start is not None:
            runs.setdefault(run.workload, {})[run.start, run.seed] = outcome
    responses = {name: response(WORKLOADS[name].steps, own) for name, own in sorted(runs.items())}
    found = {name: work for name, work in responses.items() if work is not None}
    if len(found) < 2:
        raise ValueError(
            f"{cache} holds enough runs of {len(found)} workloads, which must be at least 2: "
            "run python -m hdet.bench.regret.collect"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------- fit


def score(excess: Array) -> Array:
    """[candidate] from [workload, candidate, start]: mean over starts of the mean excess over its target."""
    return np.asarray((excess.mean(0) / np.array(TARGETS)).mean(-1))


@dataclass(frozen=True)
class Fits:
    """All candidates on all workloads."""

    names: list[str]
    """[workload]"""
    candidates: list[Constants]
    excess: Array
    """[workload, candidate, start] as a share."""

    @classmethod
    def of(cls, works: Mapping[str, Response], tried: Sequence[Constants]) -> Fits:
        """Compute them."""
        return cls(list(works), list(tried), np.stack([excesses(work, STARTS, tried) for work in works.values()]))

    def best(self, names: Sequence[str]) -> int:
        """The candidate with the lowest score on these workloads."""
        return int(score(self.excess[[self.names.index(name) for name in names]]).argmin())

    def of_one(self, candidate: int, names: Sequence[str]) -> Array:
        """[workload, start] excess of one."""
        return self.excess[[self.names.index(name) for name in names], candidate]


def split(fits: Fits) -> list[tuple[str, Array, Constants]]:
    """What a fit on each half is worth there and on the other: (what it is, [workload, start] excess, constants)."""
    halves = {which: [name for name in fits.names if half(name) == which] for which in ("first", "second")}
    found = []
    for mine, other in (("first", "second"), ("second", "first")):
        if not (halves[mine] and halves[other]):
            raise ValueError(f"all workloads with runs are in one half: {', '.join(fits.names)}")
        best = fits.best(halves[mine])
        for where in (mine, other):
            label = f"fitted on the {mine} half, on the {where}"
            found.append((label, fits.of_one(best, halves[where]), fits.candidates[best]))
    return found


def leave_one_out(fits: Fits) -> tuple[Array, list[Constants]]:
    """[workload, start] excess of the best candidate for all other workloads, and [workload] that candidate."""
    best = [fits.best([other for other in fits.names if other != name]) for name in fits.names]
    return np.stack([fits.excess[i, chosen] for i, chosen in enumerate(best)]), [fits.candidates[i] for i in best]


def ablations() -> dict[str, Constants]:
    """The constants as they are, and with one of them changed."""
    changed = [(name, value) for part in ABLATION.values() for name, values in part.items() for value in values]
    return {"as it is": Constants()} | {f"{n} {v:.3g}": Constants()._replace(**{n: v}) for n, v in changed}


# ------------------------------------------------------------------------------------------------------------- tables


def table(rows: Mapping[str, Array]) -> str:
    """Means over workloads, in percent, by start, with standard errors; from ``{label: [workload, start] excess}``."""
    starts = [f"x{start:.3g}" for start in STARTS]
    header = ["", *starts, "mean", "harm at x1", "score", "workloads"]
    return markdown([header, *([label, *_cells(excess)] for label, excess in rows.items())], padded=False)


def _cells(excess: Array) -> list[str]:
    harm = 100 * np.maximum(excess[:, TUNED], 0).mean()
    total = float(score(excess[:, None])[0])
    by_start = [mean_and_error(column.tolist()) for column in excess.T]
    return [*by_start, f"{100 * excess.mean():+.2f}", f"{harm:.2f}", f"{total:.2f}", str(len(excess))]


def described(constants: Constants) -> str:
    """The constants that are fitted, in a line."""
    return ", ".join(f"{name} {getattr(constants, name):g}" for name in SPACE)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is asked for; returns the exit status."""
    options = _parser().parse_args(argv)
    started = time.perf_counter()
    try:
        space = {name: values for name, values in SPACE.items() if name not in options.keep}
        print(_report(options.what, load(options.cache), candidates(space, options.draws)))
    except (OSError, ValueError) as error:
        print(f"python -m hdet.bench.regret.fit: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0


def _report(what: str, works: Mapping[str, Response], tried: Sequence[Constants]) -> str:
    names = list(works)
    notes: list[str] = []
    if what == "ablation":
        changed = ablations()
        fits = Fits.of(works, list(changed.values()))
        rows = {label: fits.of_one(i, names) for i, label in enumerate(changed)}
    else:
        fits = Fits.of(works, tried)
        if what == "split":
            parts = split(fits)
            rows = {label: excess for label, excess, _ in parts}
            notes = [f"{label.partition(',')[0]}: {described(constants)}" for label, _, constants in parts[::2]]
        else:
            excess, chosen = leave_one_out(fits)
            rows = {"fitted on all others": excess}
            often = sorted(set(chosen), key=lambda constants: -chosen.count(constants))
            notes = [f"chosen {chosen.count(constants)} times: {described(constants)}" for constants in often]
        now = Fits.of(works, [Constants()])
        if what == "split":
            for which in ("first", "second"):
                rows[f"as it is, on the {which}"] = now.of_one(0, [name for name in names if half(name) == which])
        rows["as it is, on all"] = now.of_one(0, names)
    title = "Predicted excess over the tuned schedule in percent, mean over workloads ± standard error, by start."
    return "\n\n".join([title, table(rows), *(["\n".join(f"- {note}" for note in notes)] if notes else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hdet.bench.regret.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("split", "leave-one-out", "ablation"))
    parser.add_argument("--keep", nargs="+", choices=SPACE, default=[], help="constants that are not fitted")
    parser.add_argument("--draws", type=int, metavar="N", help="try N random combinations; default: all")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FILE", help=f"default: {CACHE}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
