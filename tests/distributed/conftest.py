"""Real processes over gloo, with a time limit that kills the whole launch."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 240


def launch_forked(processes: int, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder, which defines ``main()``, in that many processes, in a session of its own; kill all of
    it at the limit."""
    command = [sys.executable, str(HERE / "forked.py"), str(processes), str(HERE / program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"no end after {LIMIT} s:\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


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
