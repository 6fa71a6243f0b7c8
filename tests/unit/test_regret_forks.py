"""Forks of runs: what the right move of the learning rate would have been."""

import dataclasses
import json
import math

import numpy as np
import pytest

from hdet.bench.regret import forked, forks, peers, resumed, runs
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Result
from hdet.bench.regret.workloads import WORKLOADS

SHORT = dataclasses.replace(WORKLOADS["dropout"], steps=60)


def test_a_run_that_is_kept_is_the_plain_run_and_a_move_at_its_start_another_rate():
    """Dropout draws from torch's global generator, which each fork must find as it was."""
    run = forked.PlainRun(SHORT, SHORT.tuned, 3)
    halved = run.copy().finish(0.5)
    run.train_until(20)
    told = run.copy().finish(2.0)
    assert run.finish(1.0) == peers.one_cycle(SHORT, SHORT.tuned, 3)
    assert halved == peers.one_cycle(SHORT, SHORT.tuned / 2, 3)
    assert len({halved, told, run.finish(1.0)}) == 3


def test_a_run_that_diverges_is_a_loss_that_is_not_known():
    assert math.isnan(forked.PlainRun(SHORT, 1e30, 0).finish(1.0))
    found = forked.fork(SHORT, 1e30, 0)
    assert math.isnan(found.loss)
    json.dumps(found.details, allow_nan=False)


def test_beside_each_fork_stands_what_the_controller_believes():
    found = forked.fork(SHORT, SHORT.tuned / 4, 0).details
    early, late = found["0.05"], found["0.3"]
    assert early["evidence"] is None
    assert late["movement"] > 1.5  # the weights move too little
    assert 0 < late["trust"] < 1
    assert found["0.1"]["told"] == pytest.approx(found["0.05"]["told"], rel=0.2)


def made_up(workload, start, best, kept=None):
    """A run whose loss grows with the distance from the best rate, of which movement and probe know a part each."""
    off = math.log(best / start)
    loss = {move: 1 + 0.1 * (off - move) ** 2 for move in (-math.log(2), 0.0, math.log(2), off)}
    at = {"halved": loss[-math.log(2)], "doubled": loss[math.log(2)], "told": loss[off]}
    at |= {"movement": math.exp(off), "evidence": None, "estimate": math.exp(off), "trust": 0.0}
    times = {f"{time:g}": at for time in forked.TIMES}
    return {"workload": workload, "start": start, "seed": 0, "steps": 1, "kept": kept or loss[0.0]} | times


def test_the_best_move_and_what_lies_between():
    run = made_up("a", 1 / 3, 1.0)
    assert forks.best_move(run["0.1"], run["kept"], 1.0) == math.log(2)
    assert forks.best_move(made_up("a", 1.0, 1.0)["0.1"], 1.0, 1.0) == 0
    assert forks.at(run["0.1"], run["kept"], 1.0, 9.0) == pytest.approx(run["0.1"]["doubled"] - 1)
    assert forks.at(run["0.1"], run["kept"], 1.0, 0.0) == pytest.approx(run["kept"] - 1)
    between = forks.at(run["0.1"], run["kept"], 1.0, math.log(2) / 2)
    assert run["0.1"]["doubled"] - 1 < between < run["kept"] - 1
    assert forks.excess(None, 1.0) == 0.6


def test_the_rule_for_a_workload_is_fitted_on_the_others():
    """One of them has it the other way round, and learns from the rest."""
    runs = [made_up(name, start, 1.0) for name in "abcd" for start in (1 / 3, 1.0, 3.0)]
    for run in runs[-3:]:
        for time in forked.TIMES:
            run[f"{time:g}"] = run[f"{time:g}"] | {"movement": 1 / run[f"{time:g}"]["movement"]}
    tuned = {(name, 0): 1.0 for name in "abcd"}
    rules = forks.fit_rules(runs, "0.1", tuned)
    assert rules["d"][1] == pytest.approx(math.log(2) / math.log(3))
    assert rules["a"][1] < rules["d"][1] / 2
    shown = forks.report(runs)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| x")]
    assert len(rows) == 3 * len(forked.TIMES)
    for start, _, kept, best, own, _, told, workloads in rows:
        assert workloads == "4"
        assert float(told.split()[0]) == pytest.approx(0, abs=1e-9)
        assert float(best.split()[0]) == float(own.split()[0]) <= float(kept.split()[0])
        assert (float(kept.split()[0]) == 0) == (start == "x1")


def test_the_command_makes_what_is_not_there_and_keeps_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "dropout", SHORT)
    made = []

    def execute(run):
        made.append(run)
        forks_of = made_up(run.workload, run.start, 1.0)
        return Result(
            run, Outcome(forks_of["kept"], 0.0, 1.0, {f"{time:g}": forks_of[f"{time:g}"] for time in forked.TIMES})
        )

    monkeypatch.setattr(runs, "execute", execute)
    command = [
        "--workers",
        "1",
        "--workloads",
        "dropout",
        "--starts",
        "3",
        "--cache",
        str(tmp_path / "a" / "forks.jsonl"),
    ]
    assert forks.main(command) == 0
    first = capsys.readouterr().out
    lines = (tmp_path / "a" / "forks.jsonl").read_text().splitlines()
    assert [json.loads(line)["start"] for line in lines] == [1.0, 3.0]
    assert forks.main(command) == 0
    assert len(made) == 2
    assert capsys.readouterr().out == first
    assert np.count_nonzero(["| x3 |" in line for line in first.splitlines()]) == len(forked.TIMES)


def test_a_run_goes_on_with_another_length(monkeypatch, capsys):
    short = dataclasses.replace(WORKLOADS["regression"], steps=40)
    straight = resumed.train(short, 0, ours=False)
    assert straight == peers.one_cycle(short, short.tuned, 0)
    assert resumed.train(short, 0, ours=False, stop=20) == straight  # of the same length after all
    assert resumed.train(short, 0, ours=False, stop=10) != straight
    monkeypatch.setitem(WORKLOADS, "regression", short)
    assert resumed.main(["--workloads", "regression", "--seeds", "2"]) == 0
    assert "| all | " in capsys.readouterr().out
