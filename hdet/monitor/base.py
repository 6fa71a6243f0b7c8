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
        if not callable(function):
            raise TypeError(f"Invalid {function=}. Must be a function that takes one hdet.Report.")
        self._function = function

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
    if isinstance(value, type) and issubclass(value, Monitor):
        raise TypeError(
            f"Invalid monitor={value.__name__}. That is the class: pass an instance, {value.__name__}(...)."
        )
    if callable(value):
        return (Callback(value),)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(monitor for item in value for monitor in as_monitors(item))
    raise TypeError(
        f"Invalid monitor={value!r}. Must be None, an hdet.monitor.Monitor, a function that takes one hdet.Report, or "
        'an iterable of these. To write to a directory pass hdet.TensorBoard("runs/x").'
    )


class WriterMonitor(Monitor):
    """Calls ``_open``, ``_write`` and ``_close`` on the writer rank only. Wrong use raises on every rank alike."""

    _writer: bool | None = None  # None before start() and after close()
    _closed = False

    def start(self, config: Settings, *, step: int, writer: bool) -> None:
        if self._writer is not None:
            raise RuntimeError(
                f"This {type(self).__name__} is in use by another ensemble. Give every ensemble a monitor of its own."
            )
        check_settings("config", config)
        self._writer, self._closed = writer, False
        if writer:
            self._open(config, step)

    def report(self, report: Report) -> None:
        if self._writer is None:
            raise RuntimeError(f"{type(self).__name__}.report() was called before start() or after close().")
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
        self.path = Path(check_path("path", path))
        if self.path.is_dir():
            raise ValueError(f"Invalid path={str(path)!r}. This is a directory: name a file in it.")

    def _open(self, config: Settings, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash cut the last line short
                    file.write(b"\n")
        self._append({"config": dict(config), "step": step})

    def _write(self, report: Report) -> None:
        self._append(asdict(report))

    def _append(self, record: dict[str, Any]) -> None:
        # Opened for each line, so that every line is flushed at once and there is nothing to close.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_strict(record), allow_nan=False) + "\n")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The reports that :class:`JsonLines` wrote, in order, without those that a resume from an earlier step made void.

    NaN and infinity are read as ``None``. A line that a crash cut short is left out.
    """
    reports: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "config" in record:
            reports = [report for report in reports if report["step"] <= record["step"]]
        else:
            reports.append(record)
    return reports


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
        raise TypeError(f"Invalid {name}={settings!r}. Must be a mapping of names to plain values.")
    for key, value in settings.items():
        if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)):
            raise TypeError(
                f"Invalid {name}[{key!r}]={value!r}. Keys must be str, values bool, int, float or str; "
                "pass str(value) for anything else."
            )
        if name == "hparams" and key.startswith("hdet/"):
            raise ValueError(f"Invalid {name}[{key!r}]. Names under hdet/ are hdet's own: choose another.")


def check_path(name: str, path: object) -> str:
    """``path``, an argument called ``name``, as a string; raises ``TypeError`` or ``ValueError`` if it is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Invalid {name}={path!r}. Must be a str or a path.")
    if not os.fspath(path):
        raise ValueError(f'Invalid {name}={path!r}. Must not be empty: pass for example "runs/x".')
    return str(os.fspath(path))
