"""Where a part runs, for how long, and what it keeps from one call to the next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hdet
from hdet import files

ROOT = Path(hdet.__file__).parents[1]
"""The checkout: it has sources and tests beside the package."""


VOCABULARY = 256
"""Of :func:`random_walks`."""


class NoTimeLeft(Exception):
    """What is left of a part takes longer than what is left of the time. The next call goes on."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    """What was done."""
    result: str
    """What came out, for the reader."""
    values: dict[str, Any] = field(default_factory=dict)
    """The same in numbers."""


class Place:
    """What a part is told.

    Args:
        part: its name.
        device: ``"cuda"`` or ``"cpu"``. On the CPU all sizes are small.
        folder: for files.
        seconds: that it may take.
    """

    def __init__(self, part: str, device: str, folder: Path, seconds: float) -> None:
        self.part, self.device, self.folder = part, device, folder
        self.is_small = device == "cpu"
        self._until = time.monotonic() + seconds
        self._kept_in = kept_by(part, folder)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._until - time.monotonic()

    def keep(self, name: str, make: Callable[[], Any], *, takes: float = 0.0) -> Any:
        """What ``make()`` returned when it was called under this name on this device: now, or in an earlier call.

        Args:
            name: of the result.
            make: returns a plain value.
            takes: seconds, about.

        Raises:
            NoTimeLeft: if it must be made, and there is less time.
        """
        key = f"{device_name(self.device)}: {name}"
        kept = json.loads(self._kept_in.read_text(encoding="utf-8")) if self._kept_in.exists() else {}
        if key not in kept:
            if takes > self.left:
                raise NoTimeLeft(f"{name} takes about {takes:.0f} s, and {self.left:.0f} s are left")
            kept[key] = make()
            write(self._kept_in, kept)
        return kept[key]


def random_walks(count: int, length: int, seed: int) -> Iterator[Tensor]:
    """Batches of tokens ``(count, length + 1)``, on the CPU, that can be learned in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        yield (start + torch.randint(3, (count, length + 1), generator=generator).cumsum(1)) % VOCABULARY


def kept_by(part: str, folder: Path) -> Path:
    """The file of what a part has kept."""
    return folder / f"{part}.kept.json"


def device_name(device: str) -> str:
    """The device on which results were measured, with the torch that ran there."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


def write(path: Path, content: Any) -> None:
    """Write a JSON file at once."""
    text = json.dumps(content, indent=1) + "\n"
    files.write_at_once(path, lambda file: file.write(text.encode()), beside=f"{path.name}.tmp")
