"""An hdet scheduler that a framework's training loop drives: what the adapters have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import hdet
from hdet import report
from hdet.integrations.dcp import Checkpointed
from hdet.monitor import as_monitors

logger = logging.getLogger("hdet")

Scheduler = hdet.OneCycleLR | hdet.Ensemble


class Driven:
    """A scheduler, the losses of the micro-batches until its next step, and its state for a framework's files.

    Args:
        scheduler: what is driven.
        sums: whether the losses of a step's micro-batches are shares that add up to its loss; else their mean is.
        rounds: file that :class:`hdet.JsonLines` writes, if one does.
    """

    def __init__(self, scheduler: Scheduler, *, sums: bool = False, rounds: Path | None = None) -> None:
        self.scheduler, self._sums, self._rounds = scheduler, sums, rounds
        self._total: Tensor | float | None = None
        self._count = 0

    @property
    def ensemble(self) -> hdet.Ensemble | None:
        """``None`` where the scheduler is torch's OneCycleLR and nothing else."""
        if isinstance(self.scheduler, hdet.Ensemble):
            return self.scheduler
        return getattr(self.scheduler, "ensemble", None)

    def add(self, loss: Tensor | float | None) -> None:
        """Take the loss of a micro-batch."""
        if loss is not None:
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            self._total = loss if self._total is None else self._total + loss
            self._count += 1

    def drop(self) -> None:
        """Forget the losses since the last step: they were another optimizer's."""
        self._total, self._count = None, 0

    def step(self, batch: Any = None) -> None:
        """Call once after each step of the optimizer, also one that a loss scaler has skipped: on all ranks alike."""
        loss = self._total
        if loss is not None and self._count > 1 and not self._sums:
            loss = loss / self._count
        self.drop()
        self.scheduler.step(loss, batch=batch)

    def converge(self) -> None:
        """Average, if the replicas have trained apart. Collective then; else nothing is sent."""
        if self.is_apart:
            self.scheduler.converge()

    def tell(self) -> None:
        """The run has ended: write its report beside the rounds' file, on the rank that writes, and print where."""
        ensemble = self.ensemble
        if self._rounds is None or ensemble is None or not ensemble.replicas.writer or not self._rounds.exists():
            return
        try:
            path = report.write([report.read(self._rounds)], report.place(self._rounds))
        except (OSError, ValueError) as error:
            logger.warning(f"No report of the run was written: {error}")
        else:
            print(f"hdet report: {path}")

    @property
    def is_apart(self) -> bool:
        """Whether steps were taken since the replicas converged: the same on every rank."""
        return self.ensemble is not None and self.ensemble.steps != self.ensemble._rounds.converged_at

    def state(self) -> dict[str, Any]:
        """The scheduler's state, the same on every rank. Collective if the model is sharded and averages are kept."""
        if self._is_sharded:
            return Checkpointed(self.scheduler).gathered()
        return self.scheduler.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`, of any number of shards."""
        if self._is_sharded:
            Checkpointed(self.scheduler).load_state_dict(state)
        else:
            self.scheduler.load_state_dict(state)

    @property
    def _is_sharded(self) -> bool:
        return self.ensemble is not None and not self.ensemble._phases.converge.weights.whole

    def base_lr(self) -> list[float]:
        """Schedule times gain, by parameter group: the same on every rank."""
        if self.ensemble is None:
            return [float(lr) for lr in self.scheduler.get_last_lr()]
        pairs = zip(self.ensemble.get_base_lr(), self.ensemble.gains, strict=True)
        return [float(lr) * gain for lr, gain in pairs]

    def metrics(self) -> dict[str, float]:
        """Gain and base learning rate of every parameter group, under the tags of :class:`hdet.TensorBoard`."""
        if self.ensemble is None:
            return {}
        names = self.ensemble._group_names
        ends = [f"/{name}" for name in names] if len(names) > 1 else [""]
        found: dict[str, float] = {}
        for end, gain, lr in zip(ends, self.ensemble.gains, self.base_lr(), strict=True):
            found |= {f"hdet/gain{end}": gain, f"hdet/base_lr{end}": lr}
        return found


def check_given(who: str, scheduler: object, settings: Mapping[str, Any], taken: Mapping[str, str]) -> None:
    """Check what a user has passed to an adapter, before there is anything to build it on.

    Args:
        who: the adapter's name.
        scheduler: the class to build.
        settings: its arguments.
        taken: arguments that are the framework's, and where it takes them from.

    Raises:
        TypeError, ValueError: if the scheduler is none of hdet's, or for an argument that is the framework's.
    """
    if scheduler not in (hdet.OneCycleLR, hdet.Ensemble):
        raise TypeError(
            f"Invalid scheduler={scheduler!r}. {who} builds hdet.OneCycleLR or hdet.Ensemble: pass the class, and its "
            f"arguments after it: {who}(..., hdet.OneCycleLR, max_lr=9e-4, spread=1/9)."
        )
    for name, source in taken.items():
        if name in settings:
            raise ValueError(f"Do not pass {name}= to {who}: it is {source}.")


def with_rounds(
    settings: Mapping[str, Any], folder: Any, name: str = "rounds.jsonl"
) -> tuple[dict[str, Any], Path | None]:
    """The settings with a :class:`hdet.JsonLines` among the monitors, and the file that it writes.

    Args:
        settings: the user's. If they have one, it stays the only one.
        folder: where the framework keeps what it logs; ``None``, or on another machine, if nowhere.
        name: of the file in it.
    """
    monitors = as_monitors(settings.get("monitor"))
    given = next((one.path for one in monitors if isinstance(one, hdet.JsonLines)), None)
    if given is None and folder and "://" not in str(folder):
        given = Path(folder) / name
        monitors = (*monitors, hdet.JsonLines(given))
    return {**settings, "monitor": monitors or None}, given


def build(
    scheduler: Callable[..., Scheduler],
    optimizer: Any,
    args: tuple[Any, ...],
    settings: Mapping[str, Any],
    *,
    total_steps: int | None,
    schedule: Any = None,
) -> Scheduler:
    """The scheduler, with what the framework knows filled in where the user has passed nothing.

    Args:
        total_steps: of the run.
        schedule: the framework's own, as the base of an Ensemble.
    """
    filled = dict(settings)
    has_length = "total_steps" in filled or {"epochs", "steps_per_epoch"} <= set(filled)
    if total_steps is not None and not has_length and not (scheduler is hdet.OneCycleLR and len(args) > 1):
        filled["total_steps"] = total_steps
    if schedule is not None:
        filled.setdefault("schedule", schedule)
    return scheduler(optimizer, *args, **filled)
