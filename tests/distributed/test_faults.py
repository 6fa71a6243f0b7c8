"""The fault test, a tenth or less of each section: ``python -m hdet.bench.faults``."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hdet.bench.faults
from hdet.bench.faults import __main__ as program
from hdet.bench.faults import exits, kills
from hdet.bench.faults.sections import Outcome, cases, sections

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def test_short_runs_end():
    """Those that do not hang for the order in which a process group and a model under DistributedDataParallel are
    freed; and those that fail on one rank."""
    outcome = exits.run(0.1, seed=1)
    assert outcome.tried == 50
    assert not outcome.failures, outcome.failures[0]
    assert 5 < sum(outcome.refused.values()) < 30


@pytest.mark.slow
def test_runs_survive_the_death_of_their_processes():
    outcome = kills.run(0.1, seed=1)
    assert outcome.tried == 10
    assert not outcome.failures, outcome.failures[0]


def test_a_run_survives_the_death_of_its_processes():
    outcome = kills.run(0.03, seed=2)
    assert outcome.tried == 3
    assert not outcome.failures, outcome.failures[0]


def test_what_differs_is_named():
    state = {"step": 1, "model": {"w": torch.ones(2)}, "optimizer": {}, "scheduler": {"loss": float("nan")}}
    assert kills.differences(state, {**state, "scheduler": {"loss": float("nan")}}) == []
    assert kills.differences(state, {**state, "step": 2, "model": {"w": torch.zeros(2)}}) == [
        "step differs",
        "model differs",
    ]


def test_every_module_with_a_run_is_a_section():
    found = sections()
    folder = Path(hdet.bench.faults.__file__).parent
    assert {"configs", "exits", "kills"} <= set(found)
    assert all((folder / f"{name}.py").exists() and module.__doc__ and module.FULL for name, module in found.items())
    assert (cases(500, 0.1), cases(100, 1.0), cases(3, 0.01)) == (50, 100, 1)


@pytest.mark.parametrize("failures", [[], ["it hung"]])
def test_the_table_tells_what_was_tried_and_what_failed(monkeypatch, capsys, failures):
    def run(share, seed):
        assert (share, seed) == (0.5, 3)
        return Outcome(tried=10, failures=list(failures), refused=Counter(x=2))

    monkeypatch.setattr(program, "sections", lambda: {"one": SimpleNamespace(run=run), "two": None})
    assert program.main(["--sections", "one", "--share=0.5", "--seed=3"]) == len(failures)
    told = capsys.readouterr().out
    assert told.splitlines()[1].split()[:4] == ["one", "10", str(10 - len(failures)), "2"]
    assert told.splitlines()[1].split()[-1] == str(len(failures))
    assert ("FAILED: it hung" in told) == bool(failures)
    with pytest.raises(SystemExit):
        program.main(["--share=0"])


def test_the_command_line_runs_a_section():
    done = subprocess.run(
        [sys.executable, "-m", "hdet.bench.faults", "--sections", "configs", "--share", "0.01"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(hdet.bench.faults.__file__).parents[3],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "configs" in done.stdout
