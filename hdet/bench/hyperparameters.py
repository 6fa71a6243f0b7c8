"""``python -m hdet.bench.hyperparameters``: do other hyperparameters than the learning rate find their way?

200 labelled digits, a fifth of the labels wrong; an MLP with dropout; AdamW, 3000 steps; 4 processes with local
gradients, averaged every 20 steps. Another 400 images are the probe's; the rest validate. For every hyperparameter:

- **swept**: what each of a few fixed values ends at, all else at the start's values. The best is the optimum.
- **found**: from a start away from it, moved by hdet, alone and with all others at once.

Weight decay, dropout and label smoothing start on the side of too little regularisation, or, with ``--start strong``,
of too much. The learning rates of body and head start 10 times too low and 3 times too high. Resumes: every run is kept
in ``hyperparameters.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hdet
from hdet.bench import processes
from hdet.hyperparameters import Hyperparameter

_STEPS, _ROUND, _REPLICAS, _BATCH = 3000, 20, 4, 32
_LR = 3e-3
STARTS = {
    "weak": {"weight_decay": 0.1, "dropout": 0.1, "label_smoothing": 0.01},
    "strong": {"weight_decay": 3.0, "dropout": 0.8, "label_smoothing": 0.4},
}
SWEPT = {
    "weight_decay": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0),
    "dropout": (0.0, 0.1, 0.3, 0.5, 0.7, 0.85),
    "label_smoothing": (0.0, 0.01, 0.05, 0.1, 0.2, 0.4),
    "lr": (0.1, 0.3, 1.0, 3.0),
}
SPREADS = {"weight_decay": 0.5, "dropout": 0.15, "label_smoothing": 0.05}


@dataclass(frozen=True)
class Run:
    """One training run: fixed values, and the names of those that hdet moves (``lr``: those of two groups)."""

    start: str
    values: dict[str, float]
    moved: tuple[str, ...] = ()
    rates: tuple[float, float] = (1.0, 1.0)
    """Learning rates of body and head, in units of a good one."""
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps([self.start, self.values, self.moved, self.rates, self.seed])


@dataclass(frozen=True)
class Result:
    """What a run ended at."""

    loss: float
    accuracy: float
    centres: dict[str, float] = field(default_factory=dict)


class Data:
    """The digits, shared out by seed."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(len(digits.target), generator=generator)
        x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
        y = torch.tensor(digits.target)[order]
        labels = y[:200].clone()
        wrong = torch.rand(200, generator=generator) < 0.2
        labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
        self.train, self.held_out, self.validation = (x[:200], labels), (x[200:600], y[200:600]), (x[600:], y[600:])


def train(run: Run) -> Result:
    """One run in a process group; every process must call it."""
    rank = dist.get_rank()
    data = Data(run.seed)
    generator = torch.Generator().manual_seed(10 * run.seed + rank)
    torch.manual_seed(10 * run.seed + rank)  # dropout
    dropout = run.values["dropout"]
    body = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)
    )
    head = nn.Linear(128, 10)
    model = nn.Sequential(body, head)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)  # every replica begins at one point
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    groups = [
        {"params": part.parameters(), "name": name, "lr": _LR * rate}
        for part, name, rate in zip((body, head), ("body", "head"), run.rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=run.values["weight_decay"], betas=(0.9, 0.99))
    smoothing = hdet.scalar(
        "label_smoothing", run.values["label_smoothing"], spread=0.05, bounds=(0.0, 0.9), neutral=0.0
    )
    explored: list[Hyperparameter] = []
    if "weight_decay" in run.moved:
        explored.append(hdet.param_group("weight_decay", spread=SPREADS["weight_decay"]))
    if "dropout" in run.moved:
        explored.append(
            hdet.module_attribute(model, nn.Dropout, "p", spread=SPREADS["dropout"], bounds=(0.0, 0.95), name="dropout")
        )
    if "label_smoothing" in run.moved:
        explored.append(smoothing)

    def draw(split: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(split[0]), (size,), generator=generator)
        return split[0][chosen], split[1][chosen]

    def held_out() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(data.held_out, 128)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    moves_rates = "lr" in run.moved
    probe = hdet.Probe(loss_fn=loss_fn, batches=held_out(), held_out=True)
    scheduler = hdet.OneCycleLR(
        optimizer,
        [_LR * rate for rate in run.rates],
        _STEPS,
        pct_start=0.1,
        cycle_momentum=False,
        model=model,
        spread=0.3 if moves_rates else 0.0,
        auto_lr=moves_rates,
        per_group=True,
        converge_every=_ROUND,
        gradients="local",
        hyperparameters=explored,
        probe=probe if run.moved else None,
    )
    for _ in range(_STEPS):
        x, y = draw(data.train, _BATCH)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, label_smoothing=float(smoothing))
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    scheduler.converge()
    model.eval()
    with torch.no_grad():
        logits = model(data.validation[0])
    right = (logits.argmax(-1) == data.validation[1]).float().mean().item()
    assert scheduler.ensemble is not None
    centres = dict(scheduler.ensemble.centres)
    if moves_rates:
        gains = scheduler.ensemble.gains
        centres |= {
            f"lr {name}": rate * gain for name, rate, gain in zip(("body", "head"), run.rates, gains, strict=True)
        }
    return Result(F.cross_entropy(logits, data.validation[1]).item(), right, centres)


def plan(start: str, seeds: int, sweep_seeds: int) -> list[Run]:
    """All runs that the table needs."""
    values = STARTS[start]
    wrong = (0.1, 3.0)
    runs = [
        Run(start, {**values, name: value}, seed=seed)
        for seed in range(sweep_seeds)
        for name in values
        for value in SWEPT[name]
    ]
    runs += [
        Run(start, values, rates=(wrong[0] if i else rate, rate if i else wrong[1]), seed=seed)
        for seed in range(sweep_seeds)
        for i in (0, 1)
        for rate in SWEPT["lr"]
    ]
    for seed in range(seeds):
        runs += [Run(start, values, seed=seed), Run(start, values, rates=wrong, seed=seed)]
        runs += [Run(start, values, (name,), seed=seed) for name in values]
        runs.append(Run(start, values, ("lr",), wrong, seed))
        runs += [Run(start, values, tuple(values), seed=seed), Run(start, values, (*values, "lr"), wrong, seed)]
    return list({run.key: run for run in runs}.values())


def table(start: str, done: dict[str, Result], seeds: int, sweep_seeds: int) -> str:
    """The table of one start, as far as there are runs for it."""
    values, wrong = STARTS[start], (0.1, 3.0)

    def mean(runs: Sequence[Run]) -> list[Result]:
        return [done[run.key] for run in runs if run.key in done]

    def show(losses: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        return f"{statistics.fmean(losses):.3f}{spread}" if losses else "-"

    def row(label: str, kept: list[Run], moved: list[Run], best: str) -> str:
        before, after = mean(kept), mean(moved)
        better = sum(
            done[b.key].loss < done[a.key].loss for a, b in zip(kept, moved, strict=True) if {a.key, b.key} <= set(done)
        )
        names = sorted({name for result in after for name in result.centres})
        ends = ", ".join(
            f"{name} {statistics.median(r.centres[name] for r in after):.3g} "
            f"({min(r.centres[name] for r in after):.3g} to {max(r.centres[name] for r in after):.3g})"
            for name in names
        )
        return (
            f"| {label} | {best} | {ends} | {show([r.loss for r in before])} | {show([r.loss for r in after])} | "
            f"{better} of {len(after)} |"
        )

    def optimum(name: str) -> str:
        found = {}
        for value in SWEPT[name]:
            results = mean([Run(start, {**values, name: value}, seed=seed) for seed in range(sweep_seeds)])
            if results:
                found[value] = statistics.fmean(result.loss for result in results)
        if not found:
            return "-"
        best = min(found, key=found.__getitem__)
        return f"{best:g} ({found[best]:.3f})"

    def optimum_of_rate(i: int) -> str:
        found = {}
        for rate in SWEPT["lr"]:
            pair = (wrong[0] if i else rate, rate if i else wrong[1])
            results = mean([Run(start, values, rates=pair, seed=seed) for seed in range(sweep_seeds)])
            if results:
                found[rate] = statistics.fmean(result.loss for result in results)
        return f"{min(found, key=found.__getitem__):g} ({min(found.values()):.3f})" if found else "-"

    kept = [Run(start, values, seed=seed) for seed in range(seeds)]
    kept_wrong = [Run(start, values, rates=wrong, seed=seed) for seed in range(seeds)]
    lines = [
        "| moved, from | best of the sweep (loss) | centre at the end: median (range) | loss, start values kept | "
        "loss, moved | better |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in values.items():
        moved = [Run(start, values, (name,), seed=seed) for seed in range(seeds)]
        lines.append(row(f"{name} {value:g}", kept, moved, optimum(name)))
    moved = [Run(start, values, ("lr",), wrong, seed) for seed in range(seeds)]
    best = f"body {optimum_of_rate(0)}, head {optimum_of_rate(1)}"
    lines.append(row(f"lr body {wrong[0]:g}, head {wrong[1]:g}", kept_wrong, moved, best))
    moved = [Run(start, values, tuple(values), seed=seed) for seed in range(seeds)]
    lines.append(row("the three regularisers at once", kept, moved, ""))
    moved = [Run(start, values, (*values, "lr"), wrong, seed) for seed in range(seeds)]
    lines.append(row("all five at once", kept_wrong, moved, ""))
    return "\n".join(lines)


def _in_process(runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    torch.set_num_threads(1)
    for run in runs:
        yield run, train(run)


def _read(path: Path) -> dict[str, Result]:
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            key, result = json.loads(line)
            done[key] = Result(**result)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.hyperparameters", description=__doc__)
    parser.add_argument("--start", nargs="+", choices=STARTS, default=list(STARTS), help="default: both")
    parser.add_argument("--seeds", type=int, default=5, help="of the runs that hdet moves")
    parser.add_argument("--sweep-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench"), help="directory of hyperparameters.jsonl")
    parser.add_argument("--report", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds until the processes are killed")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "hyperparameters.jsonl"
    done = _read(path)
    runs = [run for start in options.start for run in plan(start, options.seeds, options.sweep_seeds)]
    missing: list[Any] = [] if options.report else [run for run in runs if run.key not in done]
    if missing:
        results = processes.run(_in_process, _REPLICAS, (missing,), device="cpu", limit=options.limit)
        for run, result in tqdm(results, total=len(missing), unit="run"):
            done[run.key] = result
            with path.open("a") as file:
                file.write(json.dumps([run.key, vars(result)]) + "\n")
    for start in options.start:
        print(f"\n**Start {start}**\n\n{table(start, done, options.seeds, options.sweep_seeds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
