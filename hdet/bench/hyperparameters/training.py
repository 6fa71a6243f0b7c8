"""One training run of the benchmark, in a process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import hdet
from hdet.bench.hyperparameters.questions import REPLICAS, Run
from hdet.explore.hyperparameters import Hyperparameter

_STEPS, _ROUND, _BATCH = 3000, 20, 32
_LR = 3e-3
_SPREADS = {"weight_decay": 0.5, "dropout": 0.15, "label_smoothing": 0.05}


@dataclass(frozen=True)
class Result:
    """The end of a run."""

    loss: float
    """On the validation images."""
    accuracy: float
    centres: dict[str, float] = field(default_factory=dict)
    """Of the hyperparameters that moved, by name."""


class Data:
    """scikit-learn's digits, split by seed into images to train on, for the probe and to validate.

    Args:
        seed: of the shuffle.
        labelled: number of images to train on.
        wrong: share of their labels that are replaced by random ones.
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
    rank, batch_size = dist.get_rank(), _BATCH * REPLICAS // dist.get_world_size()
    data = Data(run.seed, *run.data)
    generator = torch.Generator().manual_seed(10 * run.seed + rank)
    torch.manual_seed(10 * run.seed + rank)  # dropout
    model, optimizer = _build(run)
    if run.gradients == "shared" and run.moved:
        model = nn.parallel.DistributedDataParallel(model)
    smoothing = hdet.scalar(
        "label_smoothing",
        run.values["label_smoothing"],
        spread=_SPREADS["label_smoothing"],
        bounds=(0.0, 0.9),
        neutral=0.0,
    )

    def draw(split: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(split[0]), (size,), generator=generator)
        return split[0][chosen], split[1][chosen]

    def held_out() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(data.held_out, 128)

    moves_rates = "lr" in run.moved
    probe = hdet.Probe(loss_fn=_loss, batches=held_out(), held_out=True)
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
        hyperparameters=_explored(run, model, smoothing),
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
    accuracy = (logits.argmax(-1) == data.validation[1]).float().mean().item()
    assert scheduler.ensemble is not None
    centres = dict(scheduler.ensemble.centres)
    if moves_rates:
        gains = scheduler.ensemble.gains
        centres |= {
            f"lr {name}": rate * gain for name, rate, gain in zip(("body", "head"), run.rates, gains, strict=True)
        }
    return Result(F.cross_entropy(logits, data.validation[1]).item(), accuracy, centres)


def train_all(runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Make the runs one after the other, on one thread; every process of the group must call it."""
    torch.set_num_threads(1)
    for run in runs:
        yield run, train(run)


def _build(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The MLP, the same on every process, and its optimizer."""
    dropout = run.values["dropout"]
    body = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(dropout)
    )
    head = nn.Linear(128, 10)
    model = nn.Sequential(body, head)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    groups = [
        {"params": part.parameters(), "name": name, "lr": _LR * rate}
        for part, name, rate in zip((body, head), ("body", "head"), run.rates, strict=True)
    ]
    return model, torch.optim.AdamW(groups, weight_decay=run.values["weight_decay"], betas=(0.9, 0.99))


def _explored(run: Run, model: nn.Module, smoothing: Hyperparameter) -> list[Hyperparameter]:
    """The hyperparameters that the run moves, beside learning rates."""
    explored: list[Hyperparameter] = []
    if "weight_decay" in run.moved:
        explored.append(hdet.param_group("weight_decay", spread=_SPREADS["weight_decay"]))
    if "dropout" in run.moved:
        explored.append(
            hdet.module_attribute(
                model, nn.Dropout, "p", spread=_SPREADS["dropout"], bounds=(0.0, 0.95), name="dropout"
            )
        )
    if "label_smoothing" in run.moved:
        explored.append(smoothing)
    return explored


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
