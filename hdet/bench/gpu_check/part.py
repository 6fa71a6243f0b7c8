"""``python -m hdet.bench.gpu_check.part NAME DEVICE FOLDER SECONDS``: one part, in the process that ends with it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hdet.bench.gpu_check import build, captured, kernels, replicas, training
from hdet.bench.gpu_check.place import NoTimeLeft, Place, Row, write

OUT_OF_TIME = 3
"""Exit status."""


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    run: Callable[[Place], Iterator[Row]]
    limit: float
    """Seconds after which it is killed."""
    needs_gpu: bool = False


PARTS = {
    "build": Part(build.build, 150),
    "tests": Part(build.tests, 150, needs_gpu=True),
    "kernels": Part(kernels.measure, 150),
    "captured": Part(captured.measure, 90),
    "nccl": Part(replicas.nccl, 90),
    "two_processes": Part(replicas.two_processes, 90),
    "training": Part(training.measure, 330),
}
"""By name, in the order in which they run."""


def results_of(name: str, folder: Path) -> Path:
    """The file in which a part leaves its rows."""
    return folder / f"{name}.rows.json"


def main() -> int:
    """Run the part; returns the exit status."""
    name, device, path, seconds = sys.argv[1:]
    folder = Path(path)
    rows: list[dict[str, object]] = []
    error, status = "", 0
    try:
        if device == "cpu":
            torch.set_num_threads(1)  # all is small
        for row in PARTS[name].run(Place(name, device, folder, float(seconds))):
            print(f"{row.case}: {row.result}", flush=True)
            rows.append(asdict(row))
            write(results_of(name, folder), {"rows": rows, "error": ""})
    except NoTimeLeft as reason:
        error, status = str(reason), OUT_OF_TIME
    except Exception as failure:
        traceback.print_exc()
        error, status = f"{type(failure).__name__}: {failure}", 1
    write(results_of(name, folder), {"rows": rows, "error": error})
    return status


if __name__ == "__main__":
    sys.exit(main())
