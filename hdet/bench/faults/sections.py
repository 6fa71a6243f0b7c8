"""What a section of the fault test is, and where they are found.

A section is a module of this package::

    '''What it does to hdet, in one line.'''

    FULL = 500  # cases of a full run

    def run(share: float, seed: int) -> Outcome: ...

``share`` in (0, 1] is the share of the cases that is tried.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

import hdet.bench.faults


@dataclass
class Outcome:
    """What became of a section's cases."""

    tried: int = 0
    """Cases."""
    failures: list[str] = field(default_factory=list)
    """Of the cases in which hdet did the wrong thing, what happened."""
    refused: Counter[str] = field(default_factory=Counter)
    """Of the cases that are refused by design, how many by which rule; they have held."""

    @property
    def held(self) -> int:
        """Cases in which hdet did the right thing."""
        return self.tried - len(self.failures)


def sections() -> dict[str, ModuleType]:
    """The sections by name."""
    found = {}
    for module in pkgutil.iter_modules(hdet.bench.faults.__path__):
        if not module.name.startswith("_") and module.name != "sections":
            loaded = importlib.import_module(f"{hdet.bench.faults.__name__}.{module.name}")
            if hasattr(loaded, "run"):
                found[module.name] = loaded
    return found


def tell(failure: str) -> str:
    """Print a failure when it happens, on standard error; returns it."""
    print(f"FAILED: {failure}", file=sys.stderr, flush=True)
    return failure


def cases(full: int, share: float) -> int:
    """How many cases a share of ``full`` is; at least one."""
    return max(1, round(full * share))
