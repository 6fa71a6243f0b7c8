"""The runs of the benchmark: the rows of its table, and what each needs to be trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Literal

REPLICAS = 4
FEW, MANY = (200, 0.2), (900, 0.0)
"""Number of labels, and the share of wrong ones."""
Gradients = Literal["shared", "local"]
# Values at the start.
WEAK = {"weight_decay": 0.1, "dropout": 0.1, "label_smoothing": 0.01}
SMOOTH = {**WEAK, "label_smoothing": 0.3}
RIGHT, WRONG = (1.0, 1.0), (0.01, 0.01)
"""Learning rates of body and head, in units of a good one for both."""


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
        """What identifies it in the file of results."""
        return json.dumps([self.values, self.rates, self.gradients, self.seed, self.moved, self.data])

    @property
    def processes(self) -> int:
        """How many it takes: with shared gradients and replicas that do not differ, one with the whole batch."""
        return REPLICAS if self.moved or self.gradients == "local" else 1


@dataclass(frozen=True)
class Question:
    """A row of the table: from a start, does hdet find the optimum?"""

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
