"""Monitors, which receive each :class:`hdet.Report`: the base class, functions and JSON lines.

An ensemble calls every monitor alike on every rank: ``start`` once, ``report`` after each converge. Monitors that write
files do so on the writer rank only, so the same script runs unchanged on every rank::

    monitor=hdet.TensorBoard("runs/x")
    monitor=[hdet.TensorBoard("runs/x", {"optimizer": "AdamW"}), hdet.JsonLines("runs/x/rounds.jsonl"), print]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from hdet import files
from hdet.errors import (
    HdetError,
    check_callable,
    check_file,
    check_flag,
    check_instance,
    check_path,
    check_whole,
    shown,
)
from hdet.monitor.report import Report

Settings: TypeAlias = Mapping[str, bool | int | float | str]
"""Plain settings of a run, by name."""


class Monitor:
    """Receives the report of every converge. Derive from it and override what you need; the methods do nothing here.

    ``start`` and ``report`` are called on every rank, at the same points. A monitor that calls a collective must do so
    on all ranks. An exception in it ends the run.
    """

    def start(self, config: Settings, *, step: int, writer: bool) -> None:
        """Called once, at the first scheduler step.

        Args:
            config: the settings of the run.
            step: scheduler steps taken before this one: 0, or in a resumed run the step of the checkpoint. Reports of
                an earlier process for later steps are void.
            writer: whether this rank is the one that writes files.
        """

    def report(self, report: Report) -> None:
        """Called after each converge."""

    def close(self) -> None:
        """Called when training has ended; a second call does nothing."""


MonitorLike: TypeAlias = Monitor | Callable[[Report], object] | Iterable[Monitor | Callable[[Report], object]] | None
"""What ``monitor=`` takes; see :func:`as_monitors`."""


class Callback(Monitor):
    """Calls ``function(report)`` after each converge, on every rank; ``report.writer`` is True on one of them.

    Raises:
        TypeError: if ``function`` cannot be called.
    """

    def __init__(self, function: Callable[[Report], object]) -> None:
        self._function = check_callable("function", function, "a function that takes one hdet.Report")

    def report(self, report: Report) -> None:
        self._function(report)


def as_monitors(value: object) -> tuple[Monitor, ...]:
    """The monitors that ``monitor=value`` asks for.

    Args:
        value: ``None``, a :class:`Monitor`, a function of one report, or an iterable of these.

    Raises:
        TypeError: for anything else.
    """
    if value is None:
        return ()
    if isinstance(value, Monitor):
        return (value,)
    if isinstance(value, type):
        raise TypeError(
            f"Invalid monitor={value.__name__}. That is the class: pass an instance, {value.__name__}(...)."
        )
    if callable(value):
        return (Callback(value),)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, Tensor, np.ndarray)):
        items = list(value)
        if not any(isinstance(item, Iterable) and not callable(item) for item in items):
            return tuple(monitor for item in items for monitor in as_monitors(item))
    raise TypeError(
        f"Invalid monitor={shown(value)}. Must be None, an hdet.monitor.Monitor, a function that takes one "
        "hdet.Report, or "
        'an iterable of these. To write to a directory pass hdet.TensorBoard("runs/x").'
    )


class WriterMonitor(Monitor):
    """Calls ``_open``, ``_write`` and ``_close`` on the writer rank only. Wrong use raises on every rank alike."""

    _writer: bool | None = None  # None before start() and after close()
    _closed = False

    def start(self, config: Settings, *, step: int, writer: bool) -> None:
        if self._writer is not None:
            raise HdetError(
                f"This {type(self).__name__} is in use by another ensemble. Give every ensemble a monitor of its own."
            )
        check_settings("config", config)
        step = check_whole("step", step, ">= 0", lambda step: step >= 0)
        writer = check_flag("writer", writer)
        self._writer, self._closed = writer, False
        if writer:
            self._open(config, step)

    def report(self, report: Report) -> None:
        check_instance("report", report, Report, "an hdet.Report")
        if self._writer is None:
            raise HdetError(f"{type(self).__name__}.report() was called before start() or after close().")
        if self._writer:
            self._write(report)

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer, self._closed = self._writer, None, True
            if writer:
                self._close()

    def _open(self, config: Settings, step: int) -> None:
        raise NotImplementedError

    def _write(self, report: Report) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """By default nothing is left to do."""


class JsonLines(WriterMonitor):
    """Appends every report to a file, as one line of strict JSON: NaN and infinity become ``null``.

    The first line is ``{"config": {...}, "step": 0}``. A resumed run appends such a line with the step of its
    checkpoint, then its reports; :func:`read_jsonl` leaves out earlier reports of steps beyond it.

    Args:
        path: the file. Its directory is made when the run starts.

    Raises:
        TypeError, ValueError: if ``path`` cannot be a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(check_file("path", path))

    def _open(self, config: Settings, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.open_to_write(self.path, append=True) as file:
            if file.seek(0, os.SEEK_END):
                with files.open_to_read(self.path) as written:
                    written.seek(-1, os.SEEK_END)
                    if written.read() != b"\n":  # a crash cut the last line short
                        file.write(b"\n")
        self._append({"config": dict(config), "step": step})

    def _write(self, report: Report) -> None:
        self._append(asdict(report))

    def _append(self, record: dict[str, Any]) -> None:
        # Opened for each line, so that every line is flushed at once and there is nothing to close.
        with files.open_to_write(self.path, append=True) as file:
            file.write(json.dumps(_strict(record), allow_nan=False).encode() + b"\n")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The reports that :class:`JsonLines` wrote, in order, without those that a resume from an earlier step made void.

    NaN and infinity are read as ``None``. A line that a crash cut short is left out.

    Raises:
        ValueError: if ``path`` is no regular file.
        OSError: if it is missing or may not be read.
    """
    return read_run(path)[1]


def read_run(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same, and before it the line with which the run, or its latest part, began; empty if there is none.

    Raises:
        ValueError, OSError: as :func:`read_jsonl`.
    """
    begun: dict[str, Any] = {}
    reports: list[dict[str, Any]] = []
    with files.open_to_read(check_path("path", path)) as file:
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if "config" in record:
            begun = record
            reports = [report for report in reports if report["step"] <= record["step"]]
        else:
            reports.append(record)
    return begun, reports


def _strict(value: Any) -> Any:
    """``value`` with ``None`` for the floats that JSON does not have, and named tuples as dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return value


def check_settings(name: str, settings: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``settings``, an argument called ``name``, are plain settings."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"Invalid {name}={shown(settings)}. Must be a mapping of names to plain values.")
    for key, value in settings.items():
        if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"Invalid {name}[{shown(key)}]={shown(value)}. Keys must be str, values bool, int, float or str; "
                "pass str(value) for anything else."
            )
        if name == "hparams" and key.startswith("hdet/"):
            raise ValueError(f"Invalid {name}[{key!r}]. Names under hdet/ are hdet's own: choose another.")
