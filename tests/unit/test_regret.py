"""The regret benchmark: its training loops, the store of its runs, its tables and targets, its command line."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from hdet.bench.measure import Unavailable
from hdet.bench.regret import peers, plot, runs, simulation, table
from hdet.bench.regret.__main__ import main, parser, plan_of
from hdet.bench.regret.autolrs import autolrs, forecast
from hdet.bench.regret.contenders import CONTENDERS, Contender
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import SWEEP, Result, Run, Store, execute, execute_all, plan
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import FIRST, FURTHER, MORE, PRECISIONS, SCHEDULES, STARTS, WORKLOADS, workload_of
from hdet.schedules.found import Recorder
from hdet.steer.posterior import Posterior

SHORT = dataclasses.replace(WORKLOADS["regression"], steps=WORKLOADS["regression"].steps // 10)
SHORTER = dataclasses.replace(SHORT, steps=20)
TINY = ["--quick", "--workloads", "regression", "--starts", "1/3", "1", "--workers", "1"]


def contender(name, run=None, **fields):
    return Contender(name=name, run=run or (lambda *_: Outcome(1.0, 0.0)), describe=f"{name}.", **fields)


def add(monkeypatch, name, run, **fields):
    monkeypatch.setitem(CONTENDERS, name, contender(name, run, **fields))


def a_run(contender="one_cycle", start=1.0, seed=0, workload="regression"):
    return Run(workload, contender, start, seed, 80, "1.1")


def losses(found):
    """Outcomes, from ``{(workload, contender, start): losses by seed}``."""
    return {
        a_run(who, start, seed, where): Outcome(loss, 1.0)
        for (where, who, start), own in found.items()
        for seed, loss in enumerate(own)
    }


def written(path):
    return [json.loads(line) for line in (path / "runs.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- peers


def test_one_cycle_lowers_the_loss():
    before = peers.evaluate(SHORT, peers.build(SHORT, 0), SHORT.validation())
    assert peers.one_cycle(SHORT, SHORT.tuned, 0) < 0.5 * before


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name in vars(peers)])
@pytest.mark.parametrize("workload", [SHORTER, dataclasses.replace(SHORTER, optimizer="adamw", weight_decay=0.1)])
def test_a_run_is_a_function_of_its_arguments_and_prints_nothing(name, workload, capsys):
    try:
        first, second = (getattr(peers, name)(workload, 0.02, 1) for _ in range(2))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert math.isfinite(first)
    assert first == second
    assert first != getattr(peers, name)(workload, 0.02, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["prodigy", "d_adaptation", "dog", "mechanic"])
def test_what_uses_no_start_is_independent_of_max_lr(name):
    try:
        assert getattr(peers, name)(SHORTER, 0.001, 0) == getattr(peers, name)(SHORTER, 1000.0, 0)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not CONTENDERS[name].uses_start


def test_mechanic_wraps_the_workloads_optimizer_with_its_settings(monkeypatch):
    """At a scale of 1 throughout it is the optimizer itself."""
    mechanic = pytest.importorskip("mechanic_pytorch")
    workload = dataclasses.replace(SHORTER, optimizer="adamw", weight_decay=0.3)
    made = []

    def mechanize(base):
        made.append(base)
        return lambda parameters, **settings: base(parameters, **(settings | {"lr": 0.01}))

    monkeypatch.setattr(mechanic, "mechanize", mechanize)
    monkeypatch.setattr(peers, "schedule_of", lambda *_: None)
    model = peers.build(workload, 0)
    expected = peers.train(workload, model, peers.optimizer_of(workload, model, 0.01), None, 0)
    assert peers.mechanic(workload, 0.5, 0) == expected
    assert made == [torch.optim.AdamW]


def test_autolrs_finds_a_rate_from_far_away():
    """On one batch, so that the losses have no noise. It knows its start to a factor of 100, and all of its steps,
    trials or not, are counted."""
    batch = SHORT.draw(64, torch.Generator().manual_seed(0))
    workload = dataclasses.replace(SHORT, steps=400, draw=lambda *_: batch, validation=lambda: batch)
    assert autolrs(workload, SHORT.tuned / 80, 0) < 0.5 * peers.one_cycle(workload, SHORT.tuned / 80, 0)
    drawn = []

    def draw(size, generator):
        drawn.append(size)
        return SHORT.draw(size, generator)

    autolrs(dataclasses.replace(workload, draw=draw), SHORT.tuned, 0)
    assert drawn == [SHORT.batch_size] * 400


def test_autolrs_forecasts_the_end_of_an_exponential_and_no_spike():
    steps = np.arange(30)
    assert forecast(list(2 + 3 * np.exp(-steps / 10)), 1000) == pytest.approx(2, abs=0.05)
    assert forecast([1.0, 50.0, 9.0, 4.0, 3.0, 2.5], 100) == pytest.approx(np.mean([1.0, 50.0, 9.0, 4.0, 3.0, 2.5]))
    assert forecast([3.0, 2.9, 2.8, 2.7, 2.6, 2.5], 10**6) >= 2.55 - (3.0 - 2.55)


@pytest.mark.parametrize("name", ["one_cycle", "population"])
def test_a_run_may_diverge(name):
    assert not math.isfinite(getattr(peers, name)(SHORT, 1e30, 0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_to_max_lr_and_ends_as_it_says(schedule):
    workload = workload_of(f"regression/{schedule}")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    found = peers.schedule_of(workload, optimizer, 0.1, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        found.step()
    assert rates[0] < 0.03
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    assert rates[60] == pytest.approx(0.1, rel=1e-3) or schedule in ("one_cycle", "cosine")
    assert rates[-1] == pytest.approx(0.1) if schedule == "constant" else rates[-1] < 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["regression", "masked_lm"])
def test_a_workload_in_bfloat16_rounds_what_it_computes_and_trains(name, precision):
    workload, plain = (dataclasses.replace(workload_of(n), steps=4) for n in (f"{name}/{precision}", name))
    model = peers.build(workload, 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    losses = [peers.evaluate(one, peers.build(one, 0), one.validation()) for one in (workload, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    assert math.isfinite(simulate(workload, workload.tuned, 0, Setting()).loss)


def test_a_workload_with_another_schedule_precision_and_batch_size():
    workload = workload_of("regression/cosine/bf16/batch_8")
    assert (workload.name, workload.schedule, workload.batch_size) == ("regression/cosine/bf16/batch_8", "cosine", 8)


def test_a_peak_between_the_steps_of_the_forecast_is_a_height_of_1():
    """From 1,001 steps on the forecast has not all of them: the schedule was then above 1, which is no height."""
    workload = dataclasses.replace(SHORT, steps=1200)
    assert math.isfinite(simulate(workload, SHORT.tuned, 0, Setting(probe=False)).loss)


def test_a_simulated_round_that_blew_up_is_undone():
    """One of the batches has targets that are no number: with the rollback the run goes on from the round before."""
    drawn = []

    def draw(size, generator):
        batch = SHORT.draw(size, generator)
        drawn.append(1)
        return batch._replace(targets=batch.targets * math.nan) if len(drawn) == 8 else batch

    workload = dataclasses.replace(SHORT, draw=draw)
    found = simulate(workload, SHORT.tuned, 0, Setting(rounds=20))
    assert math.isfinite(found.loss)
    assert found.details["rollbacks"] == 1
    first, second = found.details["gains"][:2]
    assert second == pytest.approx(first / 3, rel=1e-3)
    drawn.clear()
    assert math.isnan(simulate(workload, SHORT.tuned, 0, Setting(rounds=20, rollback=False)).loss)


def test_a_run_that_blows_up_again_and_again_has_diverged():
    def draw(size, generator):
        batch = SHORT.draw(size, generator)
        return batch._replace(targets=batch.targets * math.nan)

    assert math.isnan(simulate(dataclasses.replace(SHORT, draw=draw), SHORT.tuned, 0, Setting()).loss)


def test_a_search_that_takes_the_whole_run_is_a_run_that_failed(monkeypatch):
    monkeypatch.setattr(simulation, "_found", lambda *_: (0.1, SHORT.steps))
    found = simulate(SHORT, SHORT.tuned, 0, Setting(auto=True))
    assert math.isnan(found.loss)
    assert found.details["error"] == f"The search took {SHORT.steps} of the run's {SHORT.steps} steps."


def test_a_search_that_finds_nothing_is_a_run_that_failed():
    """Every loss is the same, whatever the learning rate."""
    workload = dataclasses.replace(SHORT, loss=lambda outputs, targets: 0 * outputs.sum() + 1.0)
    found = simulate(workload, SHORT.tuned, 0, Setting(auto=True))
    assert math.isnan(found.loss)
    assert "lowered the loss" in found.details["error"]


def test_a_replayed_schedule_is_the_one_that_was_found():
    """Replayed on the run in which it was found, a schedule repeats it; as a contender it is from another seed."""
    recorder = Recorder(["group0"])
    setting = Setting(rounds=80, controller=Posterior(bounds=(0.5, 2.0)))  # near enough that no round is undone
    first = simulate(SHORT, SHORT.tuned / 3, 0, setting, recorder)
    assert "rollbacks" not in first.details
    model = peers.build(SHORT, 0)
    optimizer = peers.optimizer_of(SHORT, model, 1.0)
    schedule = recorder.schedule().scheduler(optimizer)
    assert first.gain != 1
    assert peers.train(SHORT, model, optimizer, schedule, 0) == pytest.approx(first.loss, rel=1e-4)
    found = CONTENDERS["replayed"].run(SHORTER, SHORT.tuned / 3, 0)
    assert found.details["first"] != found.loss


def test_a_population_survives_members_that_diverge():
    """With these learning rates three of the four members diverge, and become copies of the one that does not."""
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        value = SHORT.loss(outputs, targets)
        return value * math.nan if len(calls) <= 3 else value

    assert math.isfinite(peers.population(dataclasses.replace(SHORT, loss=loss), 0.02, 0))


def test_a_missing_library_makes_a_contender_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    found = execute(a_run("prodigy", None))
    assert (found.outcome, found.error) == (None, "")
    assert found.unavailable == "prodigyopt is not installed"


# -------------------------------------------------------------------------------------------------------------- runs


def test_the_plan_always_holds_the_sweep_and_a_start_free_contender_once():
    found = plan(["regression"], ["prodigy", "population"], [1.0, 5.0], seeds=2)
    starts = {name: [run.start for run in found if run.contender == name] for name in CONTENDERS}
    assert sorted(starts["one_cycle"]) == sorted([*SWEEP, 5.0] * 2)
    assert starts["prodigy"] == [None, None]
    assert starts["population"] == [1.0, 5.0, 1.0, 5.0]  # seed by seed
    assert len(found) == len(set(found))
    assert {0.5, 2.0, *STARTS} == set(SWEEP)


def test_a_changed_contender_is_run_again(monkeypatch):
    before = plan(["regression"], ["population"], [1.0], seeds=1)
    monkeypatch.setitem(CONTENDERS, "population", dataclasses.replace(CONTENDERS["population"], version=2))
    changed = set(plan(["regression"], ["population"], [1.0], seeds=1)) - set(before)
    assert [(run.contender, run.version) for run in changed] == [("population", f"{runs.VERSION}.2")]


def test_a_run_leaves_threads_and_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    execute(a_run()._replace(steps=5))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_store_forgets_nothing_but_failures_and_a_torn_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    store = Store(path)
    store.add(Result(a_run(start=1 / 3), Outcome(0.5, 2.0, 3.0, {"lrs": (0.1, math.inf)})))
    store.add(Result(a_run("prodigy", None), Outcome(math.nan, 2.0)))
    store.add(Result(a_run(seed=1), error="failed"))
    with path.open("a") as file:
        file.write('{"workload": "regr')

    found = Store(path)
    assert list(found.outcomes) == [a_run(start=1 / 3), a_run("prodigy", None)]
    assert found.outcomes[a_run(start=1 / 3)] == (0.5, 2.0, 3.0, {"lrs": [0.1, None]})
    assert math.isnan(found.outcomes[a_run("prodigy", None)].loss)
    found.add(Result(a_run(seed=1), Outcome(0.25, 1.0)))
    assert len(Store(path).outcomes) == 3


def test_a_line_that_is_not_a_run_is_named(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"workload": 1}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: not a run"):
        Store(tmp_path / "runs.jsonl")


def test_processes_make_the_same_runs():
    todo = [a_run(seed=seed)._replace(steps=10) for seed in range(2)]
    found = {result.run: result.outcome for result in execute_all(todo, workers=2)}
    assert {run: found[run].loss for run in todo} == {run: execute(run).outcome.loss for run in todo}


# ------------------------------------------------------------------------------------------------------------ tables


WHO = {
    "hdet": contender("hdet", ours=True),
    "one_cycle": contender("one_cycle"),
    "prodigy": contender("prodigy", uses_start=False),
}
FOUND = {
    ("a", "one_cycle", 0.1): [4.0, 4.0],
    ("a", "one_cycle", 0.5): [2.0, 1.0],  # the oracle: 1.5
    ("a", "one_cycle", 1.0): [1.5, 1.65],
    ("a", "prodigy", None): [3.0, 2.25],
    ("a", "hdet", 0.1): [1.53, 1.53],
    ("a", "hdet", 1.0): [1.485, 1.5],
    ("b", "one_cycle", 1.0): [1.0, 1.0],
    ("b", "prodigy", None): [1.0, math.inf],
    ("b", "hdet", 1.0): [1.01, 1.018],
}


@pytest.fixture
def regrets():
    return table.regrets_of(losses(FOUND), (0.1, 1.0), WHO)


def test_regret_is_relative_to_the_best_of_the_sweep(regrets):
    assert regrets.oracles == {"a": (1.5, 0.5), "b": (1.0, 1.0)}
    assert regrets.cells["a", "one_cycle", 1.0] == pytest.approx((0.05, 0.0, 0.1, 0, 2))
    assert regrets.cells["a", "hdet", 1.0] == pytest.approx((-0.005, -0.01, 0.0, 0, 2))
    assert (
        regrets.cells["a", "prodigy", 0.1] == regrets.cells["a", "prodigy", 1.0] == pytest.approx((0.75, 0.5, 1, 0, 2))
    )
    assert regrets.worst("hdet") == pytest.approx(("a", 0.1, 0.02))


def test_tables_show_contenders_by_starts(regrets):
    text = table.tables(regrets)
    assert "### a: oracle 1.5, at x0.5" in text
    assert "| regret    | x0.1" in text
    assert "| hdet      | 2.00% (2.00..2.00) | -0.50% (-1.00..0.00) |" in text
    assert "| prodigy   | diverged (1 of 2) | diverged (1 of 2)" in text
    assert "| one_cycle | -                 | 0.00% (0.00..0.00) " in text


def test_the_summary_shows_the_worst_case(regrets):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.summary(regrets, WHO).splitlines()]
    assert rows[2:] == [
        ["hdet", "2.00%", "0.45%", "a, x0.1"],
        ["one_cycle", "167%", "2.50%", "a, x0.1"],
        ["prodigy", "diverged", "diverged", "b"],
    ]


def test_targets_are_judged_by_the_worst_case(regrets):
    found = {target.name: target for target in table.targets(regrets, WHO)}
    near = found["regret from every start in 0.1 to 3"]
    assert (near.measured, near.verdict) == ("2.00% (a, x0.1)", "met")
    assert found["regret at 0.01 and 8"].verdict == "not measured"
    tuned = found["regret at x1, mean over workloads"]
    assert (tuned.measured, tuned.verdict) == ("0.45%", "met")
    against = found["worst case, against every peer on every workload"]
    assert (against.measured, against.verdict) == ("1.40% against 0.00% (one_cycle, b)", "missed")


def test_a_diverged_run_misses_its_targets():
    found = FOUND | {("a", "hdet", 0.1): [1.5, math.nan]}
    regrets = table.regrets_of(losses(found), (0.1, 1.0), WHO)
    near, _, _, against = table.targets(regrets, WHO)
    assert (near.measured, near.verdict) == ("diverged (a, x0.1)", "missed")
    assert against.verdict == "missed"
    assert "diverged against" in against.measured


def test_a_workload_without_an_oracle_is_left_out():
    found = {("a", "one_cycle", 1.0): [math.nan], ("a", "prodigy", None): [1.0]}
    regrets = table.regrets_of(losses(found), (1.0,), WHO)
    assert (regrets.oracles, regrets.cells) == ({}, {})
    assert {target.verdict for target in table.targets(regrets, WHO)} == {"not measured"}
    assert table.tables(regrets) == ""


def test_json_has_null_for_what_diverged(regrets):
    found = json.loads(json.dumps(table.as_json(regrets, WHO), allow_nan=False))
    cell = next(cell for cell in found["regrets"] if (cell["workload"], cell["contender"]) == ("b", "prodigy"))
    assert (cell["mean"], cell["low"], cell["high"], cell["diverged"]) == (None, 0.0, None, 1)


def test_the_plot_draws_whatever_was_measured(regrets, tmp_path):
    pytest.importorskip("matplotlib")
    for i, chosen in enumerate((regrets, table.regrets_of({}, STARTS))):
        plot.draw(chosen, tmp_path / f"{i}.png", WHO)
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------ command line


def test_quick_runs_from_end_to_end_and_not_twice(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    arguments = [*TINY, "--contenders", "one_cycle", "nadamw_cosine", "--output", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "### regression: oracle" in shown.out
    assert "| nadamw_cosine |" in shown.out
    assert "10/10" in shown.err
    assert (tmp_path / "regret.png").exists()
    found = json.loads((tmp_path / "regret.json").read_text())
    assert len(found["runs"]) == len(SWEEP) + 2
    assert written(tmp_path) == sorted(found["runs"], key=written(tmp_path).index)

    monkeypatch.setattr(runs, "execute", lambda run: pytest.fail("runs again"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == shown.out


def test_a_failed_run_is_reported_and_made_again(tmp_path, capsys, monkeypatch):
    def fail(workload, max_lr, seed):
        raise RuntimeError(f"no luck with {max_lr:g}")

    arguments = [*TINY, "--contenders", "unlucky", "--output", str(tmp_path)]
    add(monkeypatch, "unlucky", fail)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "failed: regression unlucky x0.333 seed 0: RuntimeError: no luck with 0.0333333" in shown.err
    assert "2 runs failed" in shown.err
    assert "### regression" in shown.out
    assert len([run for run in written(tmp_path) if "RuntimeError: no luck" in run.get("error", "")]) == 2

    add(monkeypatch, "unlucky", lambda *_: Outcome(1.0, 0.0))
    assert main(arguments) == 0
    assert "| unlucky " in capsys.readouterr().out


def test_an_unavailable_contender_is_skipped(tmp_path, capsys, monkeypatch):
    def run(workload, max_lr, seed):
        raise Unavailable("torch_next is not installed")

    add(monkeypatch, "missing", run)
    assert main([*TINY, "--contenders", "missing", "--output", str(tmp_path)]) == 0
    assert "skipped: missing: torch_next is not installed" in capsys.readouterr().err
    assert all(found["contender"] == "one_cycle" for found in written(tmp_path))


def test_an_interruption_leaves_what_is_finished(tmp_path, capsys, monkeypatch):
    def run(workload, max_lr, seed):
        raise KeyboardInterrupt

    add(monkeypatch, "slow", run)
    assert main([*TINY, "--contenders", "slow", "--output", str(tmp_path)]) == 130
    assert "interrupted with 8 of 10 runs" in capsys.readouterr().err
    assert len(written(tmp_path)) == 8


def test_defaults_run_everything_from_every_start():
    found = plan_of(parser().parse_args([]))
    compared = [contender for contender in CONTENDERS.values() if not contender.reference]
    free = sum(not contender.uses_start for contender in compared)
    bound = len(compared) - free - 1
    assert len(found) == 3 * len(FIRST) * (len(SWEEP) + free + bound * len(STARTS))


def test_the_other_workloads_can_be_named_together():
    found = plan_of(parser().parse_args(["--workloads", "gru", "more", "regression"]))
    assert {run.workload for run in found} == {*MORE, "regression"}
    found = plan_of(parser().parse_args(["--workloads", "longer", "further"]))
    assert {run.workload for run in found} == {*FURTHER, "gpt_1200", "gpt_3000"}


@pytest.mark.parametrize("name", [*MORE, *FURTHER])
def test_the_other_workloads_learn(name):
    """A twentieth of the run lowers the loss, and the same seed gives the same run."""
    workload = dataclasses.replace(WORKLOADS[name], steps=WORKLOADS[name].steps // 20)
    before = peers.evaluate(workload, peers.build(workload, 0), workload.validation())
    after = peers.one_cycle(workload, workload.tuned, 0)
    assert after < before
    if "gpt" not in name:  # which takes a while
        assert peers.one_cycle(workload, workload.tuned, 0) == after


def test_other_schedules_and_longer_runs_are_runs_of_their_own():
    found = plan_of(parser().parse_args(["--workloads", "regression", "--schedule", "wsd", "--length", "10"]))
    assert {run.workload for run in found} == {"regression/wsd"}
    assert {run.steps for run in found} == {10 * WORKLOADS["regression"].steps}
    short = execute(a_run(workload="regression/constant")._replace(steps=20)).outcome
    assert short.loss != execute(a_run()._replace(steps=20)).outcome.loss


def test_quick_is_small_but_complete():
    found = plan_of(parser().parse_args(["--quick"]))
    assert {run.contender for run in found} == {name for name, who in CONTENDERS.items() if not who.reference}
    assert len({run.workload for run in found}) == 2
    assert all(run.steps == WORKLOADS[run.workload].steps // 10 and run.seed == 0 for run in found)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_can_make_a_quick_run(name):
    for run in plan_of(parser().parse_args(["--quick", "--contenders", name, "--starts", "1"])):
        if run.contender == name and run.start in (1, None):
            found = execute(run)
            assert found.outcome or found.unavailable, found.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["--starts", "1/0"], "must be a positive number, got 1/0"),
        (["--starts", "-1"], "must be a positive number, got -1"),
        (["--starts", "nan"], "must be a positive number, got nan"),
        (["--contenders", "sgd"], "invalid choice: 'sgd'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(arguments)
    assert message in capsys.readouterr().err


def test_a_third_is_the_start_of_that_name():
    assert parser().parse_args(["--starts", "1/3", "0.1"]).starts == [STARTS[2], STARTS[1]]
