"""What a run tells: the terminal, ``metrics.jsonl``, TensorBoard, and ``summary.json`` at the end."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

import hdet
from hdet.monitor.base import Monitor


class RunLog:
    """The log of one run. Every rank calls it alike; only the writer prints and writes.

    Args:
        directory: ``train.log_dir``.
        settings: the configuration, flat: ``{"optimizer.max_lr": 0.001}``.
        writer: whether this is the rank that writes.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *, writer: bool) -> None:
        self.directory, self.writer, self._settings = directory, writer, settings
        self.converge_seconds = 0.0
        """Time this rank has spent converging."""
        self.tensorboard = hdet.TensorBoard(directory, settings, metrics=("validation/loss",))
        self.monitors: list[Monitor] = [
            self.tensorboard,
            hdet.JsonLines(directory / "rounds.jsonl"),
            hdet.monitor.Callback(self._count),
        ]
        """To pass to the ensemble."""
        self._started = time.monotonic()
        self._metrics: TextIO | None = None
        self._bar: tqdm[Any] | None = None

    def open(self, *, step: int, total_steps: int) -> None:
        """Start the clock, the progress bar and, unless the run resumes after some ``step``, an empty
        ``metrics.jsonl``."""
        self._started = time.monotonic()
        if not self.writer:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._metrics = (self.directory / "metrics.jsonl").open("a" if step else "w", encoding="utf-8")
        self._write({"config": self._settings, "step": step})
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
            self._bar.set_postfix_str(f"loss {loss:.4f}, LR {lr:.2e}, gain {gain:.3f}", refresh=False)

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
            (self.directory / "summary.json").write_text(text + "\n", encoding="utf-8")

    def close(self) -> None:
        """Flush and close everything; twice is once."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        for monitor in self.monitors:
            monitor.close()

    def _count(self, report: hdet.Report) -> None:
        self.converge_seconds += report.converge_ms / 1e3

    def _write(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            record = {name: _strict(value) for name, value in record.items()}
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            self._metrics.flush()


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
