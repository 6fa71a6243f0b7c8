"""Real processes over gloo, with a time limit that kills the whole launch."""

import functools
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

HERE = Path(__file__).parent
LIMIT = 240
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is forked, before it imports torch


def launch_forked(processes: int, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder, which defines ``main()``, in that many processes, in a session of its own; kill all of
    it at the limit."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        status = forked.launch(processes, HERE / program, *arguments, output=output, limit=LIMIT)
        told = output.read_text()
    if status is None:
        raise AssertionError(f"no end after {LIMIT} s:\n{told}")
    return subprocess.CompletedProcess([program, *arguments], status, told)


class Launch:
    """Scenarios of a worker file run once per number of processes; every test reads its own scenario's results."""

    def __init__(self, directory: Path, worker: str) -> None:
        self._directory, self._worker = directory, worker
        self._done: dict[int, Path] = {}

    def results(self, processes: int, scenario: str) -> list[dict]:
        """What every rank returned from ``scenario``, by rank."""
        if processes not in self._done:
            out = self._directory / str(processes)
            out.mkdir()
            self._done[processes] = out  # also if it hangs: what had ended by then can be read
            (out / "output.txt").write_text("The launch was killed.")
            run = launch_forked(processes, self._worker, str(out))
            (out / "output.txt").write_text(run.stdout)
        out = self._done[processes]
        results = []
        for rank in range(processes):
            file = out / f"{scenario}.{rank}.pickle"
            assert file.exists(), f"{scenario} did not end on rank {rank}:\n{(out / 'output.txt').read_text()[-6000:]}"
            results.append(pickle.loads(file.read_bytes()))
        return results


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("launch"), "worker.py")


@pytest.fixture(scope="session")
def launch_sharded(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("sharded"), "sharded_worker.py")


@pytest.fixture(scope="session")
def launch_state(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("state"), "state_worker.py")


@pytest.fixture(scope="session")
def launch_matrix(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("matrix"), "matrix_worker.py")


@pytest.fixture(scope="session")
def launch_ownership(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("ownership"), "ownership_worker.py")


@pytest.fixture(scope="session")
def launch_agreement(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("agreement"), "agreement_worker.py")


@pytest.fixture(scope="session")
def launch_worker(tmp_path_factory) -> Callable[[str], Launch]:
    """By name of a worker file."""
    return functools.cache(lambda worker: Launch(tmp_path_factory.mktemp(Path(worker).stem), worker))
