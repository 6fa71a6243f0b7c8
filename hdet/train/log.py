"""What a run tells: the terminal, ``metrics.jsonl``, TensorBoard; at the end ``summary.json`` and ``report.html``."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

import hdet
from hdet import files, report
from hdet.monitor import story
from hdet.monitor.base import Monitor
from hdet.train.config import ConfigError

_FILES = ("metrics.jsonl", "rounds.jsonl", "summary.json", "summary.json.tmp", "checkpoint.pt", "checkpoint.pt.tmp",
          "find_lr.png", "find_lr.png.tmp", "report.html")  # fmt: skip
_OF_THE_PLACE = ("train.log_dir", "train.resume")
"""Settings that say nothing about a run."""
_SHOWN = ("hdet.auto_lr", "hdet.probe", "hdet.spread", "optimizer.max_lr")
"""Settings that TensorBoard's HParams tab has under hdet's names."""


class RunLog:
    """The log of one run. Every rank calls it alike; only the writer prints and writes.

    Args:
        directory: ``train.log_dir``.
        settings: the configuration, flat: ``{"optimizer.max_lr": 0.001}``.
        defaults: the same of a configuration without settings.
        writer: whether this is the rank that writes.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], defaults: dict[str, Any], *, writer: bool) -> None:
        self.directory, self.writer, self._settings = directory, writer, settings
        others = {name: defaults.get(name) for name, value in settings.items() if value != defaults.get(name)}
        self._defaults = {name: default for name, default in others.items() if name not in _OF_THE_PLACE}
        self.converge_seconds = 0.0
        """Time this rank has spent converging."""
        compared = {name: settings[name] for name in self._defaults if name not in _SHOWN}
        self.tensorboard = hdet.TensorBoard(directory, compared, metrics=("validation/loss",))
        self.monitors: list[Monitor] = [
            self.tensorboard,
            hdet.JsonLines(directory / "rounds.jsonl"),
            hdet.monitor.Callback(self._take),
        ]
        """To pass to the ensemble."""
        self._latest: hdet.Report | None = None
        self._started = time.monotonic()
        self._metrics: TextIO | None = None
        self._bar: tqdm[Any] | None = None

    def open(self, *, step: int, total_steps: int) -> None:
        """Start the clock, the progress bar and, unless the run resumes after some ``step``, an empty
        ``metrics.jsonl``."""
        self._started = time.monotonic()
        if not self.writer:
            return
        path = self.directory / "metrics.jsonl"
        with writing(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            cut_short = step and not _ends_a_line(path)
            self._metrics = io.TextIOWrapper(files.open_to_write(path, append=step > 0), encoding="utf-8")
            if cut_short:
                self._metrics.write("\n")
        self._write({"config": self._settings, "defaults": self._defaults, "step": step})
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 15.0,
            bar_format=None if terminal else "step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
            file=sys.stderr if terminal else _Lines(sys.stderr),
        )

    @property
    def seconds(self) -> float:
        """Since this process began to train."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a line, on the writer."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update()

    def training(self, step: int, *, loss: float, lr: float, gain: float) -> None:
        """Mean training loss since the last line, learning rate of the last step, gain."""
        self._write({"step": step, "train_loss": loss, "lr": lr, "gain": gain, "seconds": self.seconds})
        for tag, value in (("train/loss", loss), ("train/lr", lr)):
            self.tensorboard.add_scalar(tag, value, step)
        if self._bar is not None:
            state = f"gain {gain:.3g}" if self._latest is None else story.now(self._latest)
            self._bar.set_postfix_str(f"loss {loss:.4f}, LR {lr:.2e}, {state}", refresh=False)

    def validation(self, step: int, *, loss: float, accuracy: float) -> None:
        """Loss per target and share of targets guessed right."""
        self._write({"step": step, "val_loss": loss, "val_accuracy": accuracy, "seconds": self.seconds})
        self.tensorboard.add_scalar("validation/loss", loss, step)
        self.tensorboard.add_scalar("validation/accuracy", accuracy, step)
        self.say(f"step {step}: validation loss {loss:.4f}, accuracy {accuracy:.3f}")

    def summary(self, values: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        if self.writer:
            text = json.dumps({name: _strict(value) for name, value in values.items()}, indent=2, allow_nan=False)
            path = self.directory / "summary.json"
            with writing(path):
                files.write_at_once(path, lambda file: file.write(f"{text}\n".encode()), beside=f"{path.name}.tmp")

    def tell(self) -> None:
        """Write ``report.html``, and say what it says in one sentence. Files of another run are no reason to fail."""
        if self.writer:
            try:
                run = report.read(self.directory)
                path = report.write([run], self.directory / "report.html")
            except (OSError, ValueError) as error:
                self.say(f"No report was written: {error}")
                return
            if run.rounds:
                self.say(story.in_one_sentence(run.rounds))
            self.say(f"report: {path}")

    def picture(self, finding: hdet.LRFinding) -> Path:
        """Write ``find_lr.png``."""
        path = self.directory / "find_lr.png"
        if self.writer:
            temporary = path.with_name(f"find_lr.{secrets.token_hex(8)}.png")
            with writing(path):
                try:
                    finding.plot(temporary)
                    files.check_place(path)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Flush and close everything; twice is once."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        for monitor in self.monitors:
            monitor.close()

    def _take(self, report: hdet.Report) -> None:
        self.converge_seconds += report.converge_ms / 1e3
        self._latest = report

    def _write(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            record = {name: _strict(value) for name, value in record.items()}
            with writing(self.directory / "metrics.jsonl"):
                self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
                self._metrics.flush()


def check_directory(directory: Path) -> None:
    """Raise :class:`ConfigError` if the directory cannot be written to, or anything but a regular file stands where a
    run writes one. Makes nothing."""
    here = directory
    with writing(directory):
        while not os.path.lexists(here) and here != here.parent:
            here = here.parent
        if not here.is_dir():
            raise ValueError(f"{here} is no directory.")
        if not os.access(here, os.W_OK | os.X_OK):
            raise ValueError(f"{here} may not be written to.")
        if here == directory:
            for name in _FILES:
                files.check_place(directory / name)
            files.check_tree(directory / "deepspeed")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong inside is a :class:`ConfigError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"Cannot write {path}: {error}") from error


def _ends_a_line(path: Path) -> bool:
    """Whether a file is missing, empty, or ends as its writer ends it."""
    try:
        with files.open_to_read(path) as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except FileNotFoundError:
        return True


class _Lines:
    """A stream on which tqdm's redraws become lines, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
