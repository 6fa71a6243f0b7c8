r"""The schedule that a run found, as a small file, and its replay without replicas.

What is recorded is ``schedule(t) * gain(t)`` for each parameter group: the centre of the replicas' spread, and the
learning rate that their mean trained under. The schedule is the user's; the gain is the controller's.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_FORMAT = "hdet schedule 1"
_POINTS = 1000
"""Most knots of a refined schedule. The median filter takes time quadratic in them."""


@dataclass(frozen=True)
class FoundSchedule:
    """Learning rates by step, as :meth:`hdet.Ensemble.found_schedule` returns them.

    Between two knots the learning rate is linear in the step; after the last knot it is constant.
    """

    groups: tuple[str, ...]
    """Names of the parameter groups."""
    steps: tuple[int, ...]
    """Knots, increasing; the first is 0."""
    lrs: tuple[tuple[float, ...], ...]
    """[g][k] learning rate of group ``g`` in knot ``k``."""

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] != 0 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"Invalid steps={self.steps[:5]}... Must begin with 0 and increase.")
        if len(self.lrs) != len(self.groups) or any(len(lrs) != len(self.steps) for lrs in self.lrs):
            raise ValueError("Invalid lrs. Must hold a learning rate for each of the groups and steps.")
        if not all(math.isfinite(lr) and lr >= 0 for lrs in self.lrs for lr in lrs):
            raise ValueError("Invalid lrs. Must be finite and >= 0.")

    def lr(self, step: int, group: int = 0) -> float:
        """Learning rate of a group for the update after ``step`` others."""
        lrs = self.lrs[group]
        right = bisect.bisect_right(self.steps, step)
        if right == len(self.steps):
            return lrs[-1]
        first, last = self.steps[right - 1], self.steps[right]
        share = (step - first) / (last - first)
        return lrs[right - 1] + share * (lrs[right] - lrs[right - 1])

    def scheduler(self, optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
        """A plain torch scheduler that sets these learning rates.

        The optimizer's own learning rates are set to 1, since the factor is the learning rate.

        Raises:
            ValueError: if the optimizer has another number of parameter groups.
        """
        if len(optimizer.param_groups) != len(self.groups):
            raise ValueError(
                f"The schedule has {len(self.groups)} parameter groups ({', '.join(self.groups)}), this optimizer "
                f"{len(optimizer.param_groups)}."
            )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1.0
        factors: list[Callable[[int], float]] = [_Factor(self, g) for g in range(len(self.groups))]
        return LambdaLR(optimizer, factors, last_epoch)

    @staticmethod
    def refined(
        norms: Sequence[float],
        max_lr: float,
        total_steps: int | None = None,
        *,
        smoothing: float = 0.1,
        power: float = 2.0,
    ) -> FoundSchedule:
        """The schedule that a run's gradient norms suggest for the next run of the same task.

        With ``G_t`` the norms after a median filter over ``smoothing`` of the run, and ``T`` of them::

            w_t = G_t ** -power,   lr(t) = max_lr * w_t * (w_{t+1} + ... + w_T) / max_s(w_s * (w_{s+1} + ... + w_T))

        Constant norms give linear decay; large norms at the start give a warm-up. From
        Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arXiv
        2310.07831: ``power=2`` with Euclidean norms for SGD, ``power=1`` with l1 norms for Adam.

        Args:
            norms: gradient norms before clipping, at least 2, finite and > 0: of all steps, or of evenly spaced ones.
            max_lr: the peak of the new schedule.
            total_steps: length of the next run in steps; default as many as there are norms.
            smoothing: in [0, 1].
            power: > 0.

        Raises:
            ValueError: for a value outside its range.
        """
        if len(norms) < 2 or not all(math.isfinite(norm) and norm > 0 for norm in norms):
            raise ValueError("Invalid norms. Must be at least 2 gradient norms, finite and > 0.")
        steps = len(norms) if total_steps is None else total_steps
        for name, ok, rule in (
            ("max_lr", 0 < max_lr < math.inf, "finite and > 0"),
            ("total_steps", steps >= 2, ">= 2"),
            ("smoothing", 0 <= smoothing <= 1, "in [0, 1]"),
            ("power", 0 < power < math.inf, "finite and > 0"),
        ):
            if not ok:
                raise ValueError(f"Invalid {name}. Must be {rule}.")
        count = min(len(norms), steps, _POINTS)
        edges = [len(norms) * i // count for i in range(count + 1)]
        points = [statistics.median(norms[a:b]) for a, b in itertools.pairwise(edges)]
        radius = round(smoothing * count / 2)
        smooth = [statistics.median(points[max(0, i - radius) : i + radius + 1]) for i in range(count)]
        weights = [(min(smooth) / norm) ** power for norm in smooth]
        remaining = list(itertools.accumulate(reversed(weights)))[::-1]
        shape = [weight * (rest - weight) for weight, rest in zip(weights, remaining, strict=True)]
        knots = tuple((steps - 1) * i // (count - 1) for i in range(count))
        return FoundSchedule(("group0",), knots, (tuple(max_lr * x / max(shape) for x in shape),))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file of a few kilobytes. It appears under ``path`` only when it is complete."""
        target = Path(path)
        text = json.dumps({"format": _FORMAT, "groups": self.groups, "steps": self.steps, "lrs": self.lrs})
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FoundSchedule:
        """Read :meth:`save`'s file.

        Raises:
            ValueError: if it is another file.
        """
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a schedule saved by hdet (format {_FORMAT!r}).")
        return FoundSchedule(tuple(found["groups"]), tuple(found["steps"]), tuple(tuple(lrs) for lrs in found["lrs"]))


class Recorder:
    """Collects the knots of a :class:`FoundSchedule` while a run goes on.

    Args:
        groups: names of the parameter groups.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        self._groups = tuple(groups)
        self.knots: list[tuple[int, tuple[float, ...]]] = []
        """(step, learning rate of each group), in increasing order of the step."""

    def add(self, step: int, lrs: Sequence[float]) -> None:
        """The learning rates for the update after ``step`` others. A later one for the same step replaces it."""
        while self.knots and self.knots[-1][0] >= step:  # a round of one step, or a run gone back to a checkpoint
            self.knots.pop()
        self.knots.append((step, tuple(lrs)))

    def schedule(self) -> FoundSchedule:
        """The knots so far."""
        steps = tuple(step for step, _ in self.knots)
        lrs = tuple(zip(*(lrs for _, lrs in self.knots), strict=True))
        return FoundSchedule(self._groups, steps, lrs)


@dataclass(frozen=True)
class _Factor:
    """The function that ``LambdaLR`` calls for one group; it can be pickled."""

    schedule: FoundSchedule
    group: int

    def __call__(self, step: int) -> float:
        return self.schedule.lr(step, self.group)
