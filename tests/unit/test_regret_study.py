"""The regret benchmark's study of the controller: runs at constant rates, the fit on them, the summary and its null."""

import dataclasses
import json
import math

import numpy as np
import pytest

from hdet.bench.regret import collect, fit, peers, runs, summary
from hdet.bench.regret.contenders import CONTENDERS
from hdet.bench.regret.fit import Fits
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.quasi_static import CAP, GRID, Constants, excesses, gains_of, response
from hdet.bench.regret.runs import Result, Run, Store, version_of
from hdet.bench.regret.watched import Round, rounds_of, watch
from hdet.bench.regret.workloads import STARTS, WORKLOADS
from hdet.schedules.course import Course
from hdet.steer.observation import Observation
from hdet.steer.posterior import Posterior, target

SHORT = dataclasses.replace(WORKLOADS["regression"], name="short", steps=40)
GAINS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


# ------------------------------------------------------------------------------------------------------------ watched


def test_a_watched_run_is_one_cycle_with_its_rounds():
    found = watch(SHORT, 0.05, 3)
    assert found.loss == pytest.approx(peers.one_cycle(SHORT, 0.05, 3), rel=1e-5)
    rounds = rounds_of(found)
    assert [seen.progress for seen in rounds] == pytest.approx([i / 40 for i in range(1, 41)])
    assert max(seen.height for seen in rounds) == pytest.approx(1, abs=0.02)
    assert all(0 < seen.movement < 1 for seen in rounds)
    assert math.isfinite(rounds[10].noise)
    assert math.isnan(rounds[-1].noise)  # the schedule rests: no probe

    faster = rounds_of(watch(SHORT, 0.1, 3))
    assert faster[3].movement > 1.2 * rounds[3].movement


def test_a_watched_run_that_diverges_keeps_its_rounds():
    found = watch(SHORT, 1e30, 0)
    assert math.isnan(found.loss)
    assert 0 < len(rounds_of(found)) < 40


def test_rounds_survive_a_file(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    run = Run("regression", "watched", 1.0, 0, 40, "1.1")
    store.add(Result(run, Outcome(1.0, 0.0, 1.0, {"rounds": [[0.5, 1.0, 0.2, math.nan, math.nan]]})))
    (seen,) = rounds_of(Store(tmp_path / "runs.jsonl").outcomes[run])
    assert seen[:3] == (0.5, 1.0, 0.2)
    assert math.isnan(seen.debiased)


# ------------------------------------------------------------------------------------------------------------ collect


def test_collect_makes_each_run_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WORKLOADS, "short", SHORT)
    cache = tmp_path / "new" / "constant.jsonl"
    arguments = ["--workloads", "short", "--multiples", "0.5", "1", "--workers", "1", "--cache", str(cache)]
    assert collect.main(arguments) == 0
    assert "constant.jsonl: 2 of 2 runs" in capsys.readouterr().out
    kept = Store(cache).outcomes
    assert {(run.contender, run.start, run.seed, run.steps) for run in kept} == {
        ("watched", 0.5, 0, 40),
        ("watched", 1.0, 0, 40),
    }
    made = []
    monkeypatch.setattr(runs, "execute", lambda run: made.append(run) or Result(run, Outcome(1.0, 0.0)))
    assert collect.main([*arguments, "--seeds", "2"]) == 0
    assert [run.seed for run in made] == [1, 1]


def test_collect_says_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "execute", lambda run: Result(run, error="no luck"))
    arguments = ["--workloads", "gru", "--multiples", "1", "--workers", "1", "--cache", str(tmp_path / "c.jsonl")]
    assert collect.main(arguments) == 1
    assert "1 runs failed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- quasi-static


def heights(rounds=100):
    at = np.arange(1, rounds + 1) / rounds
    return np.where(at < 0.3, at / 0.3, np.maximum(1 - at, 0) / 0.7)


def made_up(best=1.0, off=1.0, balance=0.5, seed=0):
    """``{(gain, seed): run}`` whose movement is ``off`` times the target at gain ``best``, where the loss is lowest."""
    height = heights()
    found = {}
    for gain in GAINS:
        rounds = []
        for i, h in enumerate(height):
            moved = off * target(h, 0.01, height.mean(), 0.0, 10) * (gain / best) ** 0.7 * (1 + 0.1 * math.sin(i))
            wanted = min(max(balance - 0.3 * math.log(gain / best) + 0.2 * math.sin(3 * i + seed), -0.9), 0.9)
            rounds.append(list(Round((i + 1) / 100, float(h), moved, 1 + wanted, 5 * (1 - wanted))))
        loss = math.exp(0.05 * math.log(gain / best) ** 2)
        found[gain, 0] = Outcome(loss, 0.0, 1.0, {"rounds": rounds})
    return found


class Told(Posterior):
    """Hears ``q`` itself, in the rounds that have a probe."""

    told = None

    def _balance(self, seen):
        return self.told


@pytest.mark.parametrize("start", [0.1, 1 / 3, 1.0, 3.0])
@pytest.mark.parametrize(
    "constants",
    [
        Constants(),
        Constants(memory=0.8, until=0.25, noise_weight=0.6, movement_error=0.6, evidence_error=0.3),
        Constants(probe_every=0.0),
    ],
    ids=["as it is", "another", "a probe in every round"],
)
def test_it_moves_as_the_controller_does(start, constants):
    """The controller itself is the oracle: it is shown the same movement and the same ``q``."""
    work = response(1000, made_up(off=0.8))
    balance = work.balance(constants.noise_weight)
    own = ("memory", "until", "noise_weight", "movement_error", "evidence_error")
    told = Told(**{name: getattr(constants, name) for name in own})
    belief, every = told.begin(1.0), max(0.01, constants.probe_every)
    gains = []
    rests = max(p for p, h in zip(work.progress, work.height, strict=True) if h >= 0.7)
    for i, (progress, height) in enumerate(zip(work.progress, work.height, strict=True)):
        here = math.log(start * belief.gain)
        gains.append(here)
        if i < len(work.movement):
            is_probed = progress >= 0.1 and Course(10, 1000).passes(every, 10 * (i + 1))
            object.__setattr__(told, "told", float(np.interp(here, GRID, balance[i])) if is_probed else None)
            observation = Observation(
                losses=(1.0, 1.0),
                multipliers=(0.9, 1.1),
                schedule=height,
                progress=progress,
                height=height,
                until=rests,
                movement=math.exp(np.interp(here, GRID, work.movement[i])),
                area=float(work.height.mean()),
                steps=10,
            )
            belief, _ = told.update(belief, observation)
    assert max(gains) - min(gains) > 0.05
    found = gains_of(work, [start], [constants])[:, 0, 0]
    np.testing.assert_allclose(found, gains, atol=1e-6)


def test_probes_are_weighed_as_slopes_are():
    work = response(1000, made_up())
    tiny, large = work.balance(1e-6), work.balance(1e6)
    assert tiny[:40].min() > 0.99
    assert large[:40].max() < -0.99
    at_one = int(np.abs(GRID).argmin())
    wanted = 0.5 + 0.2 * math.sin(3 * 19)
    left = 0.2 * (1 + wanted) / 0.01  # of the twentieth round, at gain 1
    cost = 5 * (1 - wanted) / heights()[19]
    assert work.balance(2.0)[19, at_one] == pytest.approx((left - 2 * cost) / (left + 2 * cost), abs=0.02)


def test_the_loss_is_that_of_the_tuned_rate_or_a_share_more():
    work = response(1000, made_up(best=1.0))
    assert work.excess(np.array(0.0)) == pytest.approx(0, abs=1e-12)
    there = np.log(np.array([0.3, 3.0]))
    assert work.excess(there) == pytest.approx(np.expm1(0.05 * there**2), abs=0.001)
    worst = {key: outcome._replace(loss=outcome.loss**10) for key, outcome in made_up(best=1.0).items()}
    assert response(1000, worst).excess(np.log(10.0)) == CAP


def test_a_controller_that_is_right_goes_to_the_best_rate():
    """From any start, where no rate is given; and less far where one is."""
    work = response(1000, made_up(off=1.0, balance=0.0))
    free, given = Constants(prior=0.0, evidence_error=math.inf), Constants(evidence_error=math.inf)
    final = gains_of(work, STARTS, [free, given])[-1]
    assert np.abs(final[0]).max() < 0.15
    near = STARTS.index(1 / 3)
    assert final[1, near] < final[0, near] - 0.1
    excess = excesses(work, STARTS, [free, Constants(prior=0.999999, movement_error=3.0, evidence_error=math.inf)])
    assert (excess[0, [0, -1]] < excess[1, [0, -1]] - 0.05).all()


def test_too_few_runs_are_no_response():
    found = made_up()
    for gain in GAINS[:2]:
        found[gain, 0] = found[gain, 0]._replace(loss=math.nan)
    assert response(1000, found) is not None
    found[GAINS[2], 0] = found[GAINS[2], 0]._replace(details={"rounds": found[GAINS[2], 0].details["rounds"][:20]})
    assert response(1000, found) is None
    assert response(1000, {}) is None


# ---------------------------------------------------------------------------------------------------------------- fit


def fits(*losses, names=("a", "b", "c")):
    """Of candidates that have the same excess from all starts, from [workload][candidate]."""
    excess = np.array(losses)[:, :, None] * np.ones(len(STARTS))
    return Fits(list(names), [Constants(memory=i / 10) for i in range(excess.shape[1])], excess)


def test_the_tuned_start_counts_by_its_target():
    excess = np.zeros((1, 2, len(STARTS)))
    excess[0, 0, STARTS.index(1.0)] = 0.003
    excess[0, 1, STARTS.index(8.0)] = 0.015
    assert fit.score(excess) == pytest.approx([1 / len(STARTS)] * 2)


def test_the_one_left_out_has_no_say():
    """Each workload's own best candidate is the worst for the two others."""
    found, chosen = fit.leave_one_out(fits([0.0, 0.3, 0.2], [0.25, 0.0, 0.2], [0.4, 0.3, 0.0]))
    assert [constants.memory for constants in chosen] == [0.2, 0.2, 0.0]
    assert found[:, 0] == pytest.approx([0.2, 0.2, 0.4])


def test_halves_are_fitted_apart():
    first, second = (next(n for n in sorted(WORKLOADS) if fit.half(n) == which) for which in ("first", "second"))
    parts = fit.split(fits([0.0, 0.3], [0.3, 0.1], names=(first, second)))
    assert [(excess[0, 0], constants.memory) for _, excess, constants in parts] == [
        (0.0, 0.0),
        (0.3, 0.0),
        (0.1, 0.1),
        (0.3, 0.1),
    ]
    with pytest.raises(ValueError, match="one half"):
        fit.split(fits([0.0], [0.1], names=[name for name in WORKLOADS if fit.half(name) == "first"][:2]))


def test_a_half_is_a_matter_of_the_name():
    names = [name for name, workload in WORKLOADS.items() if workload.say == "constants"]
    assert len(names) == 42
    assert 18 <= sum(fit.half(name) == "first" for name in names) <= 24
    assert fit.half("gpt") == fit.half("gpt")


def test_candidates_are_all_combinations_or_the_same_random_ones():
    assert len(set(fit.candidates())) == math.prod(map(len, fit.SPACE.values()))
    few = fit.candidates({"memory": (0.1, 0.9), "movement_error": (0.5,)}, draws=20)
    assert few == fit.candidates({"memory": (0.1, 0.9), "movement_error": (0.5,)}, draws=20)
    assert {constants.memory for constants in few} == {0.1, 0.9}
    assert {constants.until for constants in few} == {Posterior.until}


def test_each_constant_of_the_controller_is_halved_and_doubled():
    own = [field.name for field in dataclasses.fields(Posterior) if field.name not in ("bounds", "rest_below")]
    assert list(fit.ABLATION["each constant"]) == own
    assert set(own) < set(Constants._fields)
    for name in own:
        low, high = fit.ABLATION["each constant"][name]
        now = getattr(Posterior(), name)
        if name == "memory":  # the time in which it halves
            low, now, high = (math.log(0.5) / math.log(value) for value in (low, now, high))
        assert (low, high) == pytest.approx((now / 2, 2 * now))
    assert Constants() == Constants(**{name: getattr(Posterior(), name) for name in own})


def cached(path, names, version="", steps=0):
    store = Store(path)
    for i, name in enumerate(names):
        for (gain, seed), outcome in made_up(off=0.7 + 0.2 * i, seed=i).items():
            length = steps or WORKLOADS[name].steps
            store.add(Result(Run(name, "watched", gain, seed, length, version or version_of("watched")), outcome))


@pytest.mark.parametrize("what", ["split", "leave-one-out", "ablation"])
def test_a_fit_from_end_to_end(what, tmp_path, capsys):
    names = ["gpt", "gru", "photo", "mixture", "logistic"]
    assert {fit.half(name) for name in names} == {"first", "second"}
    cached(tmp_path / "c.jsonl", [*names, "tumours", "faces"])
    assert fit.main([what, "--draws", "5", "--keep", "until", "--cache", str(tmp_path / "c.jsonl")]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) == {"split": 8, "leave-one-out": 3, "ablation": 28}[what]
    assert all(row.endswith(" 5 |") for row in rows[1:] if ", on the " not in row)
    notes = [line for line in shown.splitlines() if line.startswith("- ")]
    assert bool(notes) == (what != "ablation")
    assert all(", until 0.4, " in note for note in notes)


def test_only_runs_of_this_code_and_length_are_fitted_on(tmp_path, capsys):
    cached(tmp_path / "c.jsonl", ["gpt"])
    cached(tmp_path / "c.jsonl", ["gru"], version="0.9")
    cached(tmp_path / "c.jsonl", ["photo"], steps=7)
    assert fit.main(["ablation", "--cache", str(tmp_path / "c.jsonl")]) == 1
    assert "holds enough runs of 1 workloads" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ summary


def kept(found):
    """Outcomes, from ``{(workload, contender, start): losses by seed}``."""
    return {
        Run(where, who, start, seed, WORKLOADS[where].steps, version_of(who)): Outcome(loss, 0.0)
        for (where, who, start), own in found.items()
        for seed, loss in enumerate(own)
    }


def test_harm_is_clipped_after_the_mean_over_seeds():
    losses = summary.losses_of(
        kept({("gpt", "one_cycle", 1.0): [1.0, 1.0], ("gpt", "posterior", 1.0): [1.2, 0.8]})
        | kept({("gru", "one_cycle", 1.0): [2.0, 2.0], ("gru", "posterior", 1.0): [2.2, 2.0]})
    )
    shown = summary.table(losses, [1.0], [["posterior"]])
    assert "| x1 | posterior | 2 | 4 | +2.50 ± 2.50 | +2.50 ± 2.50 | 2.50 ± 2.50 | gru +5.0 |" in shown


def test_excess_is_over_the_tuned_rate_and_harm_over_the_same_start():
    losses = summary.losses_of(
        kept({("gpt", "one_cycle", 1.0): [1.0], ("gpt", "one_cycle", 3.0): [1.5], ("gpt", "posterior", 3.0): [1.2]})
    )
    cell = summary.cells(losses, 3.0, ["posterior"])["gpt"]["posterior"]
    assert cell == pytest.approx((0.2, -0.2, 1))


def test_only_seeds_that_all_have_are_compared():
    losses = summary.losses_of(
        kept({("gpt", "one_cycle", 1.0): [1.0, 1.0], ("gpt", "posterior", 1.0): [1.1, 1.3, 9.0]})
        | kept({("gpt", "movement", 1.0): [1.2]})
    )
    assert summary.cells(losses, 1.0, ["posterior", "movement"])["gpt"]["posterior"] == pytest.approx((0.1, 0.1, 1))
    assert summary.cells(losses, 1.0, ["posterior"])["gpt"]["posterior"] == pytest.approx((0.2, 0.2, 2))


def test_repeats_make_the_reference_and_none_is_its_own():
    losses = summary.losses_of(
        kept({("gpt", "one_cycle", 1.0): [1.0], ("gpt", "repeat_0.999", 1.0): [1.2], ("gpt", "posterior", 1.0): [1.1]})
    )
    over = {
        name: summary.cells(losses, 1.0, [name])["gpt"][name].over
        for name in ("posterior", "one_cycle", "repeat_0.999")
    }
    assert over == pytest.approx({"posterior": 0.0, "one_cycle": 1 / 1.2 - 1, "repeat_0.999": 0.2})


def test_what_diverged_counts_as_the_cap():
    losses = summary.losses_of(
        kept({("gpt", "one_cycle", 1.0): [1.0], ("gpt", "posterior", 8.0): [1.0], ("gpt", "movement", 8.0): [math.nan]})
        | kept({("gpt", "one_cycle", 8.0): [math.inf]})
    )
    found = summary.cells(losses, 8.0, ["posterior", "movement"])["gpt"]
    assert found["posterior"] == (0.0, -summary.CAP, 1)
    assert found["movement"] == (summary.CAP, 0.0, 1)


def test_other_versions_and_lengths_are_left_out():
    known = kept({("gpt", "one_cycle", 1.0): [1.0]})
    (run,) = known
    other = {run._replace(version="0.1"): Outcome(5.0, 0.0), run._replace(steps=7): Outcome(5.0, 0.0)}
    assert summary.losses_of(known | other) == {("gpt", "one_cycle", 1.0): {0: 1.0}}


def test_a_summary_from_end_to_end(tmp_path, capsys):
    assert summary.main(["--output", str(tmp_path)]) == 1
    assert "is not there" in capsys.readouterr().err
    everyone = {(where, who, 1.0): [1.0] for where in ("gpt", "gru", "tumours") for who in summary.SHOWN}
    store = Store(tmp_path / "runs.jsonl")
    for run, outcome in kept(everyone).items():
        store.add(Result(run, outcome))
    assert summary.main(["--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "No null" in shown
    assert "| x1 | movement | 2 | 2 | +0.00" in shown
    assert "Learned by heart (tumours)" in shown
    assert "By workload" not in shown
    assert summary.main(["--output", str(tmp_path), "--each", "--contenders", "movement"]) == 0
    assert "| gpt | - | - | - | +0.0 / +0.0 | - | - |" in capsys.readouterr().out
    for run, outcome in kept({("gpt", "repeat_1.001", 1.0): [1.1], ("gru", "repeat_1.001", 1.0): [1.1]}).items():
        store.add(Result(run, outcome))
    assert summary.main(["--output", str(tmp_path)]) == 0
    assert "| x1 | repeat_1.001 | 2 | 2 | +10.00 ± 0.00 | +10.00 ± 0.00 | 10.00 ± 0.00 |" in capsys.readouterr().out


def test_references_run_when_asked_for_only():
    assert {name for name, who in CONTENDERS.items() if who.reference} == {*summary.REPEATED[1:], "watched", "forked"}
    repeat = CONTENDERS["repeat_1.001"].run(SHORT, 0.05, 0)
    assert repeat.loss == peers.one_cycle(SHORT, 0.05 * 1.001, 0)
    assert json.dumps(repeat.details) == "{}"
