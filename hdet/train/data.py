"""Batches. Which examples a replica sees in a step depends on (seed, rank, step) and on nothing else, so that a resumed
run sees those an uninterrupted one would have seen."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdet import files
from hdet.train.config import ConfigError, TaskConfig


class Batch(NamedTuple):
    """Examples and what the model should answer."""

    inputs: Tensor
    """Tokens ``(batch, block_size)`` int64, or images ``(batch, 1, 8, 8)`` float32 in [0, 1]."""
    targets: Tensor
    """The next tokens ``(batch, block_size)``, or classes ``(batch,)``; int64."""


class Data(Protocol):
    """A training set to draw from and a fixed validation set."""

    classes: int
    """Number of different targets."""

    def draw(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:
        """A random training batch, or one of what is held out from training for the probe."""

    def validation_batches(self, size: int, limit: int) -> int:
        """Number of validation batches of ``size`` there are, at most ``limit``."""

    def validation(self, index: int, size: int, batches: int) -> Batch:
        """Batch ``index`` of the ``batches`` that make up the validation set."""


def step_seed(seed: int, rank: int, step: int, purpose: int | str = 0) -> int:
    """A 63-bit seed of its own for every step of every rank, and every ``purpose`` of the batch: the number of a
    micro-batch, or a word."""
    text = f"{seed}/{rank}/{step}/{purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Windows:
    """Windows of ``block_size + 1`` tokens from a long sequence, in memory or memory-mapped.

    Args:
        train, val: one-dimensional arrays of uint8 or uint16.
        block_size: tokens the model sees at once.
        classes: size of the vocabulary.
        probe_fraction: share of ``train``, its end, that is held out.

    Raises:
        ConfigError: if any of the sequences is shorter than one window.
    """

    def __init__(
        self,
        train: NDArray[np.integer],
        val: NDArray[np.integer],
        block_size: int,
        classes: int,
        probe_fraction: float = 0.0,
    ) -> None:
        cut = len(train) - int(probe_fraction * len(train))
        train, self.held_out = train[:cut], train[cut:]
        for name, tokens in (("training", train), ("validation", val), ("probe's", self.held_out)):
            if len(tokens) <= block_size and (tokens is not self.held_out or probe_fraction):
                raise ConfigError(
                    f"The {name} data has {len(tokens)} tokens, and a window takes {block_size + 1} (model.block_size "
                    "+ 1). Use a longer file, a shorter block_size, or another task.val_fraction or probe_fraction."
                )
        self.train, self.val, self.block_size, self.classes = train, val, block_size, classes

    def draw(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:
        tokens = self.held_out if held_out else self.train
        starts = torch.randint(len(tokens) - self.block_size, (size,), generator=generator)
        return self._windows(tokens, starts.tolist())

    def validation_batches(self, size: int, limit: int) -> int:
        return min(limit, max(1, len(self.val) // (self.block_size * size)))

    def validation(self, index: int, size: int, batches: int) -> Batch:
        last = len(self.val) - self.block_size - 1
        places = max(1, batches * size - 1)
        return self._windows(self.val, [last * (index * size + i) // places for i in range(size)])

    def _windows(self, tokens: NDArray[np.integer], starts: list[int]) -> Batch:
        rows = np.stack([tokens[start : start + self.block_size + 1] for start in starts]).astype(np.int64)
        if rows.max() >= self.classes:
            raise ConfigError(
                f"The data holds token {rows.max()}, but task.vocab_size={self.classes}. Pass the vocabulary's size."
            )
        windows = torch.from_numpy(rows)
        return Batch(windows[:, :-1], windows[:, 1:])


class Digits:
    """scikit-learn's 1797 images of digits, shuffled once and for all; the last 360 are the validation set.

    Args:
        probe_fraction: share of the others, their end, that is held out.
    """

    classes = 10
    _HELD_OUT = 360

    def __init__(self, probe_fraction: float = 0.0) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self._images = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)[order]
        self._labels = torch.from_numpy(labels).long()[order]
        self._seen = len(labels) - self._HELD_OUT
        self._trained = self._seen - round(probe_fraction * self._seen)

    def draw(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:
        low, high = (self._trained, self._seen) if held_out else (0, self._trained)
        chosen = torch.randint(low, high, (size,), generator=generator)
        return Batch(self._images[chosen], self._labels[chosen])

    def validation_batches(self, size: int, limit: int) -> int:
        return min(limit, -(-self._HELD_OUT // size))

    def validation(self, index: int, size: int, batches: int) -> Batch:
        first = len(self._labels) - self._HELD_OUT + index * size
        return Batch(self._images[first : first + size], self._labels[first : first + size])


def load(task: TaskConfig, block_size: int, *, held_out: bool = False) -> Data:
    """The data of a task, a share of it ``held_out`` from training for the probe.

    Raises:
        ConfigError: if a file is missing or too short.
    """
    probe_fraction = task.probe_fraction if held_out else 0.0
    if task.name == "digits":
        return Digits(probe_fraction)
    train: NDArray[np.integer]
    val: NDArray[np.integer]
    if task.name == "char_lm":
        train = _standard_library()
    elif task.name == "text":
        train = _text("task.path", task.path)
    elif task.path is None:
        train = _standard_library().astype(np.uint16)
    else:
        train = _tokens("task.path", task.path)
    if task.val_path is None:
        cut = int(len(train) * (1 - task.val_fraction))
        train, val = train[:cut], train[cut:]
    elif task.name == "text":
        val = _text("task.val_path", task.val_path)
    else:
        val = _tokens("task.val_path", task.val_path)
    return Windows(train, val, block_size, task.vocab_size if task.name == "tokens" else 256, probe_fraction)


def _standard_library() -> NDArray[np.uint8]:
    directory = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(directory.glob("*.py"))
    if not files:
        raise ConfigError(
            f"task.name=char_lm reads the Python standard library's source, and {directory} holds none. Use another "
            "Python, or task.name=text with a file of yours."
        )
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def _text(name: str, path: str | None) -> NDArray[np.uint8]:
    with _opened(name, path) as file:
        return np.frombuffer(file.read(), np.uint8)


def _tokens(name: str, path: str) -> NDArray[np.uint16]:
    with _opened(name, path) as file:
        size = os.fstat(file.fileno()).st_size
        if size % 2 or not size:
            raise ConfigError(f"Invalid {name}={path}: {size} bytes are not a sequence of uint16 tokens.")
        return np.memmap(file, np.uint16, mode="r")


def _opened(name: str, path: str | None) -> BinaryIO:
    try:
        return files.open_to_read(path or "")
    except FileNotFoundError as error:
        raise ConfigError(f"Invalid {name}={path}: there is no such file.") from error
    except OSError as error:
        raise ConfigError(f"Invalid {name}={path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"Invalid {name}={path}: {error}") from error
