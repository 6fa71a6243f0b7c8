"""The files of a run, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hdet.monitor import Report, read_run, report_of
from hdet.settings import DECLARED, GROUPS
from hdet.steer import Posterior, Published

Curve = tuple[tuple[int, float], ...]
"""Points (step, value) in the order of the steps."""
_WAY_OUT = (
    'Name the folder of a run: train.log_dir of hdet train, or the one that hdet.JsonLines("FOLDER/rounds.jsonl") '
    "writes to."
)
_ABOUT = ("replicas", "total_steps", "converge_every", "schedule", "peak_lr")
"""Facts of a run that have no default."""
_SAME = {"total_steps": "train.total_steps", "schedule": "schedule.name", "peak_lr": "optimizer.max_lr"}
"""The training program's names of these."""
_AUTOMATIC = ("averaging.optimizer_state", "members")
"""Settings whose values are chosen by the run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of one run say."""

    name: str
    """Of its folder."""
    rounds: tuple[Report, ...]
    """In the order of their steps; empty for a run without replicas."""
    training: Curve
    """Mean training loss, by ``train.log_every``."""
    validation: Curve
    """Validation loss."""
    lr: Curve
    """Learning rate of the first parameter group, gain included."""
    seconds: float
    """That the last process of the run has trained; NaN where it is not known."""
    about: Mapping[str, Any]
    """Replicas, length, schedule, where they are known."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings that differ from their defaults: value and default, by name."""

    @property
    def step(self) -> int:
        """The last step that the files know of."""
        ends = [curve[-1][0] for curve in (self.training, self.validation, self.lr) if curve]
        return max([*ends, *(report.step for report in self.rounds[-1:])], default=0)

    @property
    def total_steps(self) -> int | None:
        """The run's length in steps, where it is known."""
        total = self.about.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the base schedule; NaN where it is not known."""
        known = [report.peak_lr for report in self.rounds if math.isfinite(report.peak_lr)]
        given = self.about.get("peak_lr")
        return known[-1] if known else float(given) if isinstance(given, (int, float)) else math.nan


def read(path: Path) -> Run:
    """The run in a folder, or in one file that :class:`hdet.JsonLines` wrote.

    Raises:
        ValueError: if it is no run; the message names the file, the rule and the way out.
        OSError: if a file may not be read.
    """
    folder = path if path.is_dir() else path.parent
    rounds_file = path / "rounds.jsonl" if path.is_dir() else path
    metrics_file = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing. {_WAY_OUT}")
    if not rounds_file.exists() and not metrics_file.exists():
        raise ValueError(f"{folder} has no rounds.jsonl and no metrics.jsonl. {_WAY_OUT}")
    begun, reports = _rounds(rounds_file) if rounds_file.exists() else ({}, ())
    program, metrics = _lines(metrics_file) if path.is_dir() and metrics_file.exists() else ({}, [])
    training = _curve(metrics_file, metrics, "train_loss")
    seconds = _curve(metrics_file, metrics, "seconds")
    about = _about(begun.get("config"), program.get("config"), reports)
    changed = _changed_in_program(program) if program else _changed(begun.get("config"))
    return Run(
        name=_name(path),
        rounds=reports,
        training=training,
        validation=_curve(metrics_file, metrics, "val_loss"),
        lr=_curve(metrics_file, metrics, "lr"),
        seconds=seconds[-1][1] if seconds else math.nan,
        about=about,
        changed=changed,
    )


def place(path: Path) -> Path:
    """Where the report of the run in ``path`` goes."""
    if path.is_dir():
        return path / "report.html"
    return path.with_name("report.html") if path.name == "rounds.jsonl" else path.with_suffix(".html")


def _name(path: Path) -> str:
    whole = path.resolve()
    return whole.name if path.is_dir() else whole.parent.name if whole.name == "rounds.jsonl" else whole.stem


def _rounds(path: Path) -> tuple[Mapping[str, Any], tuple[Report, ...]]:
    begun, records = _lines(path)
    return begun, tuple(_report(path, record) for record in records)


def _report(path: Path, record: Mapping[str, Any]) -> Report:
    try:
        return report_of(record)
    except ValueError as error:
        raise ValueError(
            f"{path}: the line of step {record['step']} is no report of a round: {error}. Must be as hdet.JsonLines "
            f"writes it. {_WAY_OUT}"
        ) from error


def _lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    begun, records = read_run(path)
    if not begun and not records and path.stat().st_size:
        raise ValueError(f"{path} has no line with a step. Must be as hdet.JsonLines writes it. {_WAY_OUT}")
    return begun, records


def _curve(path: Path, records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    points = []
    for record in records:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {name} of step {record['step']} is {str(value)[:60]!r}. Must be a number.")
        points.append((record["step"], float(value)))
    return tuple(points)


def _about(ensemble: Any, program: Any, reports: Sequence[Report]) -> dict[str, Any]:
    """:data:`_ABOUT`, from the configuration lines."""
    ours = ensemble if isinstance(ensemble, dict) else {}
    theirs = program if isinstance(program, dict) else {}
    found = {
        "replicas": reports[-1].replicas if reports else None,
        **ours,
        **{name: theirs[other] for name, other in _SAME.items() if other in theirs},
    }
    return {name: found[name] for name in _ABOUT if found.get(name) is not None}


def _changed_in_program(begun: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the training program, which notes the defaults of what was changed."""
    config, defaults = begun.get("config"), begun.get("defaults")
    if not isinstance(config, dict) or not isinstance(defaults, dict):
        return {}
    shown = {name: default for name, default in defaults.items() if name not in _SAME.values()}
    return {name: (config.get(name), default) for name, default in shown.items()}


def _changed(config: Any) -> dict[str, tuple[Any, Any]]:
    """Of an ensemble in a script of the user's."""
    if not isinstance(config, dict):
        return {}
    defaults = _defaults("Posterior" if "controller.memory" in config else "Published")
    return {
        name: (value, defaults[name])
        for name, value in config.items()
        if name in defaults and value != defaults[name] and name not in (*_ABOUT, *_AUTOMATIC)
        and not (name == "rollback" and not config.get("auto_lr"))
    }  # fmt: skip


def _defaults(controller: str) -> dict[str, Any]:
    """Plain defaults, by the names that a run's first line has."""
    found: dict[str, Any] = {}
    for name, setting in DECLARED.items():
        if name in GROUPS and is_dataclass(setting.default):
            for inner in fields(setting.default):
                found[f"{name}.{inner.name}"] = getattr(setting.default, inner.name)
        elif name == "hyperparameters":
            found[name] = ""
        elif name == "probe":
            found[name] = False
        elif isinstance(setting.default, (bool, int, float, str)):
            found[name] = setting.default
    kind: Any = {"Posterior": Posterior, "Published": Published}[controller]
    for inner in fields(kind):
        value = getattr(kind(), inner.name)
        found[f"controller.{inner.name}"] = str(value) if isinstance(value, tuple) else value
    return found
