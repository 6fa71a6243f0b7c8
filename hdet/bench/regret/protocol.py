"""``python -m hdet.bench.regret.protocol``: the runs of a clean test, in order.

Its workloads are those that nothing of the controller was chosen on (:mod:`hdet.bench.regret.unseen`), or others.

===========  =======================================================================================================
stage        runs
===========  =======================================================================================================
near         OneCycle and the controller from the tuned max_lr and a tenth of it, seed 0
far          the same from the other starts
peers        the other contenders, seed 0; of those that need a learning rate, from the tuned one
seeds        OneCycle and the controller from the tuned max_lr, seeds 1 and 2
null         OneCycle with a thousandth more and less, on the workloads that are no language models, seeds 0 to 2
schedules    under a cosine, warm-up-stable-decay and a constant: OneCycle's counterpart from a quarter, a half, once
             and twice the tuned max_lr, and the controller from it, seed 0
precision    the same as ``schedules`` in bfloat16, by autocast and with weights and optimizer state in it
batches      the same with batches of 8 and of 1,024, OneCycle from 1/16 to 16 times the max_lr, which was tuned for
             another size, and the controller from it
watched      how far each round moves the weights at the tuned max_lr, and what a probe says there, seed 0
longer       the same as ``seeds``, on gpt_3000
===========  =======================================================================================================

The results are kept where ``python -m hdet.bench.regret`` keeps its own, and ``python -m hdet.bench.regret.summary``
shows them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hdet.bench.regret import models, peers
from hdet.bench.regret.contenders import CONTENDERS, ORACLE, REPEATS
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Result, Run, Store, make, version_of
from hdet.bench.regret.summary import excess, mean_and_error
from hdet.bench.regret.tune import CACHE, Sweep
from hdet.bench.regret.watched import rounds_of
from hdet.bench.regret.workloads import PRECISIONS, SCHEDULES, STARTS, WORKLOADS, Workload, unavailable, workload_of
from hdet.monitor.tables import markdown
from hdet.steer.posterior import target
from hdet.train.models import GPT

_OURS = "posterior"
_LONG = 3000
"""Steps from which on a workload has two seeds instead of three."""
_OTHER_SCHEDULES = (
    *("visits", "diamonds", "colours", "textures", "cup", "bible_adafactor"),
    *("films", "home_runs", "deaths", "nitrogen", "stereo", "word_pairs"),
)
_IN_BFLOAT16 = ("films", "home_runs", "nitrogen", "stereo", "deaths", "masses_gpt", "source_muon", "commentary_gru")
_BATCHED = ("films", "home_runs", "deaths", "nitrogen", "word_pairs")
_BATCHES = ("batch_8", "batch_1024")
_NEARBY = (0.25, 0.5, 1.0, 2.0)
_FAR_AND_NEAR = (1 / 16, 1 / 8, *_NEARBY, 4.0, 8.0, 16.0)
"""Starts of the sweep of a variation."""
_STAGES = ("near", "far", "peers", "seeds", "null", "schedules", "precision", "batches", "watched", "longer")


def is_language_model(workload: Workload) -> bool:
    """Whether its model predicts the next token."""
    return isinstance(workload.build(), (GPT, models.CharRNN))


def stage(name: str, workloads: Iterable[str]) -> list[Run]:
    """The runs of a stage on these workloads."""
    own = [workload_of(workload) for workload in workloads]
    both = (ORACLE, _OURS)
    if name == "near":
        return [_run(w.name, who, start, 0) for w in own for start in (1.0, 0.1) for who in both]
    if name == "far":
        return [_run(w.name, who, start, 0) for w in own for start in STARTS if start not in (1.0, 0.1) for who in both]
    if name == "peers":
        return [_run(w.name, who, 1.0, 0) for w in own for who in _peers_for(w)]
    if name == "seeds":
        return [_run(w.name, who, 1.0, n) for w in own for n in range(1, 2 if w.steps >= _LONG else 3) for who in both]
    if name == "watched":
        return [_run(w.name, name, 1.0, 0) for w in own]
    if name == "null":
        repeats = [f"repeat_{times:g}" for times in REPEATS[:2]]
        return [_run(w.name, who, 1.0, n) for w in own if not is_language_model(w) for n in range(3) for who in repeats]
    if name == "schedules":
        return _varied((w.name for w in own if w.name in _OTHER_SCHEDULES), SCHEDULES[1:])
    if name == "precision":
        return _varied((w.name for w in own if w.name in _IN_BFLOAT16), PRECISIONS)
    if name == "batches":
        return _varied((w.name for w in own if w.name in _BATCHED), _BATCHES, _FAR_AND_NEAR)
    return [_run("gpt_3000", who, 1.0, seed) for seed in range(1, 3) for who in both]


def _varied(workloads: Iterable[str], variations: Sequence[str], sweep: Sequence[float] = _NEARBY) -> list[Run]:
    return [
        _run(f"{workload}/{variation}", who, start, 0)
        for workload in workloads
        for variation in variations
        for who, start in ((_OURS, 1.0), *((ORACLE, start) for start in sweep))
    ]


def _peers_for(workload: Workload) -> list[str]:
    """What is compared on it. A tuned max_lr says nothing to an optimizer that is of another kind."""
    found = ["movement", "prodigy", "mechanic", "dog", "d_adaptation", "autolrs", "population", "published"]
    if workload.optimizer in ("sgd", "adamw"):
        found.append("schedule_free")
    if workload.optimizer == "adamw":
        found.append("nadamw_cosine")
    return found


def _run(workload: str, contender: str, start: float, seed: int) -> Run:
    used = start if CONTENDERS[contender].uses_start else None
    return Run(workload, contender, used, seed, workload_of(workload).steps, version_of(contender))


def _take_over(planned: Iterable[Run], store: Store, sweep: Sweep) -> None:
    """Runs of OneCycle that the sweep for the learning rate has made already."""
    for run in planned:
        if run.contender == ORACLE and run.start and run not in store.outcomes:
            loss = sweep.known(run.workload, run.start * workload_of(run.workload).tuned, run.seed)
            if loss is not None:
                store.add(Result(run, Outcome(loss, 0.0)))


def law(workload: Workload, outcome: Outcome) -> float:
    """``m / m*`` of a watched run: how far its rounds 11 to 40 moved the weights, in units of what the controller takes
    for right; the geometric mean."""
    shape = peers.shape_of(workload)
    length = max(1, workload.steps // 100)
    area, final = statistics.fmean(shape) / max(shape), shape[-1] / max(shape)
    share = length / workload.steps
    return statistics.geometric_mean(
        found.movement / target(found.height, share, area, final, length) for found in rounds_of(outcome)[10:40]
    )


def law_table(store: Store) -> str:
    """A line for each workload that was watched at its tuned max_lr, in Markdown."""
    rows = []
    for run, outcome in store.outcomes.items():
        if run.workload in WORKLOADS and run == _run(run.workload, "watched", 1.0, 0):
            ratio = law(WORKLOADS[run.workload], outcome)
            rows.append((run.workload, f"{ratio:.2f}", f"{math.log(ratio):+.2f}"))
    return markdown([("workload", "m / m*", "log"), *rows], padded=False)


def variations_table(store: Store) -> str:
    """The controller from the tuned max_lr under each variation, over the best of the sweep there and over OneCycle's
    counterpart from the same max_lr, in percent: mean over workloads ± standard error, in Markdown."""
    rows = []
    for variation in (*SCHEDULES[1:], *PRECISIONS, *_BATCHES):
        sweep = _FAR_AND_NEAR if variation in _BATCHES else _NEARBY
        over_best, over_same = [], []
        for run, outcome in store.outcomes.items():
            if run == _run(run.workload, _OURS, 1.0, 0) and run.workload.endswith(f"/{variation}"):
                swept = {start: store.outcomes.get(_run(run.workload, ORACLE, start, 0)) for start in sweep}
                losses = {start: found.loss for start, found in swept.items() if found}
                if len(losses) == len(sweep):
                    best = min((loss for loss in losses.values() if math.isfinite(loss)), default=math.nan)
                    over_best.append(excess(outcome.loss, best))
                    over_same.append(excess(outcome.loss, losses[1.0]))
        if len(over_best) > 1:
            rows.append((variation, mean_and_error(over_best), mean_and_error(over_same), str(len(over_best))))
    return markdown([("", "over the best of the sweep", "from the same rate", "workloads"), *rows], padded=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet; returns the exit status."""
    options = _parser().parse_args(argv)
    if reason := unavailable(options.workloads):
        print(reason, file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    store = Store(options.output / "runs.jsonl")
    planned = [run for name in options.stages for run in stage(name, options.workloads)]
    if options.tuning.exists():
        _take_over(planned, store, Sweep(options.tuning))
    misses = make(planned, store, options.workers)
    if "watched" in options.stages:
        print(law_table(store))
    if not {"schedules", "precision", "batches"}.isdisjoint(options.stages):
        print(variations_table(store))
    return misses.told(options.output / "runs.jsonl")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hdet.bench.regret.protocol",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stages", nargs="+", choices=_STAGES, default=list(_STAGES), help="default: all, in this order")
    unseen = [name for name, workload in WORKLOADS.items() if workload.say == "none"]
    add("--workloads", nargs="+", choices=WORKLOADS, default=unseen, metavar="NAME", help="default: the unseen ones")
    add("--workers", type=int, default=1, metavar="N", help="processes; default: 1")
    add("--tuning", type=Path, default=CACHE, metavar="FILE", help=f"runs of the sweep; default: {CACHE}")
    add("--output", type=Path, default=Path("bench/regret"), metavar="DIR", help="default: bench/regret")
    return parser


if __name__ == "__main__":
    sys.exit(main())
