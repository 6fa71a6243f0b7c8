"""``python -m hdet.bench.hyperparameters``: do other hyperparameters than the learning rate find their way?

200 labelled digits, a fifth of the labels wrong (for the learning rates: 900, all of them right); an MLP with dropout;
AdamW, 3000 steps; 4 processes, averaged every 20 steps. Another 400 images are the probe's; the rest validate. Weight
decay and learning rates are explored under shared gradients, where nothing but them tells the replicas apart; dropout
and label smoothing, which act through the gradient, under local ones. For every hyperparameter:

- **swept**: what each of a few fixed values ends at, all else at the start's values. The best is the optimum.
- **found**: from a start away from it, moved by hdet, alone and with all others at once.

Weight decay and dropout start too low, label smoothing too high, the learning rates of body and head 100 times too low.
Resumes: every run is kept in ``hyperparameters.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hdet
from hdet.bench import processes
from hdet.explore.hyperparameters import Hyperparameter

_STEPS, _ROUND, _REPLICAS, _BATCH = 3000, 20, 4, 32
_LR = 3e-3
FEW, MANY = (200, 0.2), (900, 0.0)
Gradients = Literal["shared", "local"]
WEAK = {"weight_decay": 0.1, "dropout": 0.1, "label_smoothing": 0.01}
SMOOTH = {**WEAK, "label_smoothing": 0.3}
RIGHT, WRONG = (1.0, 1.0), (0.01, 0.01)
"""Learning rates of body and head, in units of a good one for both."""
SPREADS = {"weight_decay": 0.5, "dropout": 0.15, "label_smoothing": 0.05}


@dataclass(frozen=True)
class Run:
    """One training run: fixed values, and the names of those that hdet moves (``lr``: those of two groups)."""

    values: dict[str, float]
    rates: tuple[float, float]
    gradients: Gradients
    seed: int
    moved: tuple[str, ...] = ()
    data: tuple[int, float] = FEW

    @property
    def key(self) -> str:
        return json.dumps([self.values, self.rates, self.gradients, self.seed, self.moved, self.data])

    @property
    def processes(self) -> int:
        """Data parallelism without replicas that differ is one process with a larger batch."""
        return _REPLICAS if self.moved or self.gradients == "local" else 1


@dataclass(frozen=True)
class Question:
    """A row of the table: from a start, does hdet find its way?"""

    label: str
    moved: tuple[str, ...]
    values: dict[str, float]
    rates: tuple[float, float]
    gradients: Gradients
    data: tuple[int, float]
    """Number of labels, and the share of wrong ones."""
    swept: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By name (``lr body``, ``lr head``), the values that a sweep tries."""

    def kept(self, seed: int) -> Run:
        """The run that keeps the start's values."""
        return Run(self.values, self.rates, self.gradients, seed, data=self.data)

    def found(self, seed: int) -> Run:
        """The run in which they move."""
        return replace(self.kept(seed), moved=self.moved)

    def fixed(self, name: str, value: float, seed: int) -> Run:
        """The run with another fixed value of one of them."""
        if name in self.values:
            return replace(self.kept(seed), values={**self.values, name: value})
        body, head = self.rates
        return replace(self.kept(seed), rates=(value, head) if name == "lr body" else (body, value))


_RATES = (0.01, 0.1, 1.0, 10.0)
QUESTIONS = (
    Question(
        "weight decay 0.1",
        ("weight_decay",),
        WEAK,
        RIGHT,
        "shared",
        FEW,
        {"weight_decay": (0.1, 0.3, 1.0, 3.0, 10.0)},
    ),
    Question("dropout 0.1", ("dropout",), WEAK, RIGHT, "local", FEW, {"dropout": (0.1, 0.3, 0.5, 0.7, 0.85)}),
    Question(
        "label smoothing 0.3",
        ("label_smoothing",),
        SMOOTH,
        RIGHT,
        "local",
        FEW,
        {"label_smoothing": (0.01, 0.05, 0.1, 0.2, 0.3)},
    ),
    Question(
        "learning rates: body 0.01, head 0.01",
        ("lr",),
        WEAK,
        WRONG,
        "shared",
        MANY,
        {"lr body": _RATES, "lr head": _RATES},
    ),
    Question("the three regularisers at once", tuple(SMOOTH), SMOOTH, RIGHT, "local", FEW),
    Question("all five at once", (*SMOOTH, "lr"), SMOOTH, WRONG, "local", FEW),
)


@dataclass(frozen=True)
class Result:
    """What a run ended at."""

    loss: float
    accuracy: float
    centres: dict[str, float] = field(default_factory=dict)


class Data:
    """The digits, shared out by seed.

    Args:
        seed: of the shuffle.
        labelled: number of images to train on.
        wrong: share of their labels that is replaced by any.
    """

    def __init__(self, seed: int, labelled: int, wrong: float) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(len(digits.target), generator=generator)
        x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
        y = torch.tensor(digits.target)[order]
        last = labelled + 400
        labels = y[:labelled].clone()
        mistaken = torch.rand(labelled, generator=generator) < wrong
        labels[mistaken] = torch.randint(0, 10, (int(mistaken.sum()),), generator=generator)
        self.train, self.held_out = (x[:labelled], labels), (x[labelled:last], y[labelled:last])
        self.validation = x[last:], y[last:]


def train(run: Run) -> Result:
    """One run in a process group; every process must call it."""
    rank, batch_size = dist.get_rank(), _BATCH * _REPLICAS // dist.get_world_size()
    data = Data(run.seed, *run.data)
    generator = torch.Generator().manual_seed(10 * run.seed + rank)
    torch.manual_seed(10 * run.seed + rank)  # dropout
    dropout = run.values["dropout"]
    body = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)
    )
    head = nn.Linear(128, 10)
    model: nn.Module = nn.Sequential(body, head)
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
    if run.gradients == "shared" and run.moved:
        model = nn.parallel.DistributedDataParallel(model)
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
        gradients=run.gradients if run.processes > 1 else "shared",
        hyperparameters=explored,
        probe=probe if run.moved else None,
    )
    for _ in range(_STEPS):
        x, y = draw(data.train, batch_size)
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


def plan(seeds: int, sweep_seeds: int) -> list[Run]:
    """All runs that the table needs."""
    runs = [
        question.fixed(name, value, seed)
        for seed in range(sweep_seeds)
        for question in QUESTIONS
        for name, values in question.swept.items()
        for value in values
    ]
    for seed in range(seeds):
        runs += [run for question in QUESTIONS for run in (question.kept(seed), question.found(seed))]
    return list({run.key: run for run in runs}.values())


def table(done: dict[str, Result], seeds: int, sweep_seeds: int) -> str:
    """The table, as far as there are runs for it."""

    def losses(runs: Iterable[Run]) -> list[float]:
        return [done[run.key].loss for run in runs if run.key in done]

    def show(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{spread}" if values else "-"

    def best(question: Question, name: str) -> str:
        swept = {
            value: losses(question.fixed(name, value, seed) for seed in range(sweep_seeds))
            for value in question.swept[name]
        }
        means = {value: statistics.fmean(found) for value, found in swept.items() if found}
        if not means:
            return "-"
        value = min(means, key=means.__getitem__)
        return f"{name} {value:g} ({means[value]:.3f})"

    lines = [
        "| moved, from | gradients | best of a sweep (loss) | centre at the end: median (range) | loss, start values "
        "kept | loss, moved | better |",
        "|---|---|---|---|---|---|---|",
    ]
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
        optimum = "; ".join(best(question, name) for name in question.swept)
        lines.append(
            f"| {question.label} | {question.gradients} | {optimum} | {centres} | {show(losses(kept))} | "
            f"{show(losses(found))} | {better} of {len(pairs)} |"
        )
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
    parser.add_argument("--seeds", type=int, default=5, help="of the runs that hdet moves")
    parser.add_argument("--sweep-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench"), help="directory of hyperparameters.jsonl")
    parser.add_argument("--report", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds until the processes are killed")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "hyperparameters.jsonl"
    done = _read(path)
    missing = [] if options.report else [r for r in plan(options.seeds, options.sweep_seeds) if r.key not in done]
    for count in sorted({run.processes for run in missing}):
        runs: Any = [run for run in missing if run.processes == count]
        results = processes.run(_in_process, count, (runs,), device="cpu", limit=options.limit)
        for run, result in tqdm(results, total=len(runs), unit="run"):
            done[run.key] = result
            with path.open("a") as file:
                file.write(json.dumps([run.key, vars(result)]) + "\n")
    print(table(done, options.seeds, options.sweep_seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
