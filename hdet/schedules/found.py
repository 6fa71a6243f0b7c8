r"""The schedule that a run found, as a small file, and its replay without replicas.

What is recorded is ``schedule(t) * gain(t)`` for each parameter group: the centre of the replicas' spread, and the
learning rate that their mean trained under. The schedule is the user's; the gain is the controller's.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdet import files
from hdet.errors import (
    check_field,
    check_file,
    check_instance,
    check_list,
    check_number,
    check_path,
    check_text,
    check_whole,
    shown,
)
from hdet.schedules.curves import check_step
from hdet.transaction import AllOrNothing

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
    """[g][k] learning rate of group ``g`` in knot ``k``, finite and >= 0."""

    def __post_init__(self) -> None:
        check_field(self, "groups", _groups)
        check_field(self, "steps", _steps)
        check_field(self, "lrs", _lrs, len(self.groups), len(self.steps))

    def lr(self, step: int, group: int = 0) -> float:
        """Learning rate of a group for the update after ``step`` others.

        Raises:
            TypeError, ValueError: unless ``step`` is a whole number >= 0, and ``group`` the index of one.
        """
        step, last = check_step(step), len(self.groups) - 1
        lrs = self.lrs[check_whole("group", group, f"in [0, {last}]", lambda g: 0 <= g <= last)]
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
            TypeError, ValueError: if the optimizer has another number of parameter groups, or for a bad ``last_epoch``;
                the optimizer is then as it was.
        """
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        last_epoch = check_whole("last_epoch", last_epoch, ">= -1", lambda epoch: epoch >= -1)
        if len(optimizer.param_groups) != len(self.groups):
            raise ValueError(
                f"The schedule has {len(self.groups)} parameter groups ({', '.join(self.groups)}), this optimizer "
                f"{len(optimizer.param_groups)}."
            )
        factors: list[Callable[[int], float]] = [_Factor(self, g) for g in range(len(self.groups))]
        with AllOrNothing(optimizer):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 1.0
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
            TypeError, ValueError: for a value outside its range.
        """
        rule = "at least 2 gradient norms, finite and > 0"
        norms = [check_number("norms", norm, rule, lambda x: x > 0) for norm in check_list("norms", norms, rule)]
        if len(norms) < 2:
            raise ValueError(f"Invalid norms={norms}. Must be {rule}.")
        max_lr = check_number("max_lr", max_lr, "finite and > 0", lambda x: x > 0)
        steps = len(norms) if total_steps is None else check_whole("total_steps", total_steps, ">= 2", lambda n: n >= 2)
        smoothing = check_number("smoothing", smoothing, "in [0, 1]", lambda x: 0 <= x <= 1)
        power = check_number("power", power, "finite and > 0", lambda x: x > 0)
        count = min(len(norms), steps, _POINTS)
        edges = [len(norms) * i // count for i in range(count + 1)]
        points = [statistics.median(norms[a:b]) for a, b in itertools.pairwise(edges)]
        radius = round(smoothing * count / 2)
        smooth = [statistics.median(points[max(0, i - radius) : i + radius + 1]) for i in range(count)]
        weights = [(min(smooth) / norm) ** power for norm in smooth]
        remaining = list(itertools.accumulate(reversed(weights)))[::-1]
        shape = [weight * (rest - weight) for weight, rest in zip(weights, remaining, strict=True)]
        if not max(shape) > 0:
            raise ValueError(
                f"Invalid power={power}. Of these norms nothing but the smallest is left. Must be smaller: 1 and 2 are "
                "usual."
            )
        knots = tuple((steps - 1) * i // (count - 1) for i in range(count))
        return FoundSchedule(("group0",), knots, (tuple(max_lr * x / max(shape) for x in shape),))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file of a few kilobytes, at once or not at all, and through no link. Its ``digest`` is that of
        the rest.

        Raises:
            ValueError, OSError: as :func:`hdet.files.write_at_once`.
        """
        path = check_file("path", path)
        found = {"groups": list(self.groups), "steps": list(self.steps), "lrs": [list(lrs) for lrs in self.lrs]}
        text = json.dumps({"format": _FORMAT, **found, "digest": _digest(found)})
        files.write_at_once(path, lambda file: file.write(text.encode() + b"\n"))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FoundSchedule:
        """Read :meth:`save`'s file. One without a ``digest`` is read too: a person may have written it.

        Raises:
            TypeError, ValueError: if it cannot be read, is another file, is damaged, or has values that make no
                schedule; the message names the file.
        """
        name = check_path("path", path)
        try:
            content = files.read_json(name)
        except OSError as error:
            raise ValueError(f"Cannot read the schedule {name}: {error.strerror}. Must be a file of save().") from error
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError(f"{name} is not a schedule saved by hdet (format {_FORMAT!r}).")
        parts = ("groups", "steps", "lrs")
        if not all(isinstance(content.get(part), list) for part in parts) or not all(
            isinstance(lrs, list) for lrs in content["lrs"]
        ):
            raise ValueError(f"{name} is no schedule: groups and steps must be lists, and lrs a list of lists.")
        if "digest" in content and content["digest"] != _digest({part: content[part] for part in parts}):
            raise ValueError(
                f"{name} is damaged: it is not what was saved. Save it anew; if you have changed it by hand, remove "
                "its digest."
            )
        unknown = set(content) - {"format", "digest", *parts}
        if unknown:
            raise ValueError(f"{name} has the unknown key {sorted(unknown)[0]!r}.")
        try:
            return FoundSchedule(
                tuple(content["groups"]), tuple(content["steps"]), tuple(tuple(lrs) for lrs in content["lrs"])
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def _digest(found: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _groups(name: str, value: object) -> tuple[str, ...]:
    rule = "at least one name of a parameter group"
    groups = tuple(check_text(name, group, rule) for group in check_list(name, value, rule))
    if not groups:
        raise ValueError(f"Invalid {name}=(). Must be {rule}.")
    return groups


def _steps(name: str, value: object) -> tuple[int, ...]:
    rule = "whole numbers that begin with 0 and increase"
    steps = tuple(check_whole(name, step, rule) for step in check_list(name, value, rule))
    if not steps or steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"Invalid {name}={shown(steps)}. Must be {rule}.")
    return steps


def _lrs(name: str, value: object, groups: int, knots: int) -> tuple[tuple[float, ...], ...]:
    rule = f"a learning rate, finite and >= 0, for each of {groups} groups and {knots} steps"
    rows = [check_list(name, row, rule, length=knots) for row in check_list(name, value, rule, length=groups)]
    return tuple(tuple(check_number(name, lr, rule, lambda lr: lr >= 0) for lr in row) for row in rows)


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
