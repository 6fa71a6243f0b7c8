"""Runs whose processes are killed: the small version of ``python -m hdet.bench.faults --runs 20``."""

import pytest

from hdet.bench import faults

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.slow
def test_runs_survive_the_death_of_their_processes(capsys, monkeypatch):
    """torchrun restarts them, and they end as the undisturbed run did, bit for bit. It keeps its store, in which the
    restarted processes used to find the addresses of the dead, and gave up."""
    monkeypatch.setenv("PYTHONPATH", str(faults.__file__).removesuffix("/hdet/bench/faults.py"))
    status = faults.main(["--runs=2", "--processes=2", "--steps=60", "--limit=120", "--seed=1"])
    told = capsys.readouterr().out
    assert status == 0, told
    assert "2 of 2 runs ended as the undisturbed one did" in told
    assert told.count("rank ") >= 2  # deaths


def test_what_differs_is_named():
    state = {"step": 1, "model": {"w": faults.torch.ones(2)}, "optimizer": {}, "scheduler": {"loss": float("nan")}}
    assert faults._differences(state, {**state, "scheduler": {"loss": float("nan")}}) == []
    assert faults._differences(state, {**state, "step": 2, "model": {"w": faults.torch.zeros(2)}}) == [
        "step differs",
        "model differs",
    ]
