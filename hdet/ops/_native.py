"""Finds and loads the compiled kernels, and knows which ones there are."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from hdet.ops import _schema  # noqa: F401  the schemas must exist before a library implements them

logger = logging.getLogger("hdet")

FIRST_TORCH = (2, 10)
"""The first torch that can load the libraries."""


class Backend(NamedTuple):
    """Which kernels run. ``str()`` says it in one line."""

    cpu: str
    """``"native"`` or ``"reference"``: what runs for CPU tensors."""
    cuda: str
    """The same for CUDA tensors."""
    note: str
    """Why something is not native; empty if everything that could be is."""

    def __str__(self) -> str:
        return f"hdet ops: cpu {self.cpu}, cuda {self.cuda}" + (f" ({self.note})" if self.note else "")


def load() -> Backend:
    """Load what was compiled. A library that is absent or does not fit this torch leaves the reference in its place.

    Logs a warning, on one process per machine, if this torch could run the CPU library and does not.
    """
    if os.environ.get("HDET_NATIVE", "1") == "0":
        return Backend("reference", "reference", "switched off by HDET_NATIVE=0")
    if _version(torch.__version__) < FIRST_TORCH:
        return Backend("reference", "reference", f"native ops need torch 2.10 or newer, this is {torch.__version__}")
    notes: list[str] = []
    cpu = _load("_native_cpu.so", notes)
    cuda = _load("_native_cuda.so", notes) if torch.version.cuda else "reference"
    backend = Backend(cpu, cuda, "; ".join(notes))
    if cpu != "native" and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s. HDET_NATIVE=0 chooses plain torch without this warning.", backend)
    return backend


def _load(name: str, notes: list[str]) -> str:
    path = Path(__file__).with_name(name)
    if not path.exists():
        notes.append(f"{name} was not compiled: {_remedy(path.parents[2])}")
        return "reference"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        notes.append(f"{name} does not load: {error}")
        return "reference"
    return "native"


def _remedy(root: Path) -> str:
    """What to do where a library is missing from the package in ``root``."""
    if (root / "csrc" / "build_native.py").exists():
        where, sources = f"{root}, a source tree", f"-e {root}"
    else:
        where, sources = str(root), "--force-reinstall --no-deps of its sources"
    return f"hdet was imported from {where}; pip install -v --no-build-isolation {sources} compiles it, or says why not"


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


BACKEND = load()
