"""What N real processes do, read from the scenarios of worker.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import hdet
from hdet.explore.spread import multipliers

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
every_size = pytest.mark.parametrize("processes", [2, 3, 4])


@every_size
def test_converge_is_the_mean_and_bitwise_equal(launch, processes):
    """theta <- (1/N) sum_r theta_r: to rounding of the stored dtype, for every kind of tensor, at any bucket size."""
    for by_bucket in launch.results(processes, "converge_mean"):
        for result in by_bucket.values():
            assert max(result["errors"].values()) <= 1.0, result["errors"]
            assert result["equal"]
            assert result["in_place"]
            assert result["tied"]
            assert result["versions_bumped"]
            assert result["again"] is None  # converging twice is converging once
            assert result["bytes"] > 0


@every_size
def test_distance_is_each_replicas_distance_from_the_mean(launch, processes):
    results = launch.results(processes, "converge_mean")
    for rank, by_bucket in enumerate(results):
        for result in by_bucket.values():
            assert result["distance"][rank] == pytest.approx(result["expected_distance"], rel=1e-5)
    assert len({str([result["distance"] for result in by_bucket.values()]) for by_bucket in results}) == 1


@every_size
def test_learning_rates_follow_the_spread_from_the_first_step(launch, processes):
    """lr_{g,r} = schedule_g * rho_pi_g(r), mean rho exactly 1, and pi the same on every rank."""
    results = launch.results(processes, "learning_rates")
    rho = multipliers(processes, 0.25)
    permutations = set()
    for steps in zip(*(result["steps"] for result in results), strict=True):
        assert all(step["multipliers"] == steps[0]["multipliers"] for step in steps)
        for group in (0, 1):
            held = steps[0]["multipliers"][group]
            assert tuple(sorted(held)) == rho
            assert math.fsum(held) == processes
            permutations.add((group, held))
            for rank, step in enumerate(steps):
                assert step["lr"][group] == step["last"][group] == step["base"][group] * held[rank]
                assert step["momentum"] == step["twin_momentum"]
    per_group = [{held for g, held in permutations if g == group} for group in (0, 1)]
    assert all(len(held) > 1 for held in per_group)  # drawn anew in each of the 8 rounds
    firsts = [[step["multipliers"][g] for step in results[0]["steps"][::5]] for g in (0, 1)]
    assert firsts[0] != firsts[1]  # and independently for each parameter group


@every_size
def test_no_global_random_generator_is_touched(launch, processes):
    for result in launch.results(processes, "learning_rates"):
        assert all(step["rng_untouched"] for step in result["steps"])


@every_size
def test_reports_are_the_same_on_every_rank(launch, processes):
    results = launch.results(processes, "learning_rates")
    for reports in zip(*(result["reports"] for result in results), strict=True):
        assert [report.writer for report in reports] == [True] + [False] * (processes - 1)
        facts = [{k: v for k, v in vars(r).items() if k not in ("writer", "converge_ms")} for r in reports]
        assert all(repr(fact) == repr(facts[0]) for fact in facts)
    report = results[0]["reports"][3]
    assert (report.step, report.round, report.complete, report.replicas) == (20, 3, True, processes)
    assert report.groups == ("first", "group1")
    last_step = [result["steps"][19] for result in results]
    assert report.replica_lr[1] == tuple(step["lr"][1] for step in last_step)
    assert report.gain == report.next_gain == (1.0, 1.0)


@every_size
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_line_identity(launch, processes, optimizer):
    """theta_r(t) = lerp(theta_start, theta_mean(t), rho_r) under shared gradients without decoupled weight decay: so
    the replicas lie on one line, and their mean is the run at the base learning rate. Holds to float64 rounding."""
    for result in launch.results(processes, "line_identity"):
        assert max(result[optimizer]["line"]) < 1e-12
        assert max(result[optimizer]["mean"]) < 1e-14


@every_size
@pytest.mark.parametrize("gradients", ["shared", "local"])
def test_processes_equal_an_in_process_simulation(launch, processes, gradients):
    for result in launch.results(processes, "simulation"):
        assert result[gradients]["error"] < 2e-6
        assert result[gradients]["gain"] == pytest.approx(result[gradients]["simulated_gain"], rel=1e-5)
        assert result[gradients]["gain"] != 1.0


@every_size
def test_a_non_finite_replica_is_left_out_and_healed(launch, processes):
    for result in launch.results(processes, "excluded"):
        good = range(processes - 1)
        assert result["excluded"] == (processes - 1,)
        assert result["weight"].tolist() == [[sum(good) / len(good)] * 4] * 4
        assert result["bias_error"] < 1e-6
        assert result["losses"][:-1] == tuple(1.0 + r for r in good)
        assert math.isnan(result["losses"][-1])  # one NaN loss: the controller ignores this replica's round
        assert result["mean_loss"] == pytest.approx(1.0 + sum(good) / len(good))
        assert all(map(math.isfinite, result["gain"]))


@every_size
@pytest.mark.parametrize(
    "case", ["one bucket", "two buckets", "probe", "outer momentum", "rollback", "resume", "bad replica"]
)
def test_a_bfloat16_wire_is_off_by_little_and_equal_everywhere(launch, processes, case):
    """By (N + 3) / 2 * 2^-9 of the largest displacement, here below .6; in fp32 where no mean is agreed yet."""
    bound = (processes + 3) / 2 * 2**-9 * 0.6
    exact = {"rollback": [0, 4], "resume": [0, 3]}.get(case, [0])
    for result in launch.results(processes, "bfloat16_wire"):
        rows = result[case]
        for step, row in enumerate(rows):
            assert row["equal"], step
            assert row["rolled_back"] == (case == "rollback" and step == 3)
            assert row["excluded"] == ((processes - 1,) if case == "bad replica" and step == 2 else ())
            if row["rolled_back"]:
                continue
            weight, big, double, _ = row["errors"]
            if case != "outer momentum" or step == 0:  # else it is not the mean at which they go on
                assert max(weight, big) < (1e-6 if step in exact else bound), step
                assert (max(weight, big) > 1e-5) == (step not in exact), step
                assert double < 1e-12
            expected = (processes - 2) / 2 if row["excluded"] else (processes - 1) / 2
            assert row["moving"] == pytest.approx(expected)
        assert rows[5]["bytes"] < 0.6 * rows[0]["bytes"]


@every_size
def test_what_travels_with_the_agreement_is_the_same_mean(launch, processes):
    """The mean of r = 0 .. N-1, without a replica that is not finite, or an error that changes nothing."""
    mean, rest = (processes - 1) / 2, (processes - 2) / 2
    for rank, by_bucket in enumerate(launch.results(processes, "agreed_before")):
        for result in by_bucket.values():
            assert result.pop("all_bad") == ("DivergedError", math.inf)
            assert result.pop("layout") == ("ReplicaMismatchError", rank)
            for case, told in result.items():
                left_out = case in ("bad_parameter", "bad_buffer")
                expected = rest if left_out else mean
                assert told["excluded"] == ((processes - 1,) if left_out else ()), case
                assert told["weight"] == pytest.approx(expected, abs=1e-5), case
                assert told["big"] == pytest.approx((expected, expected)), case
                moving = -math.inf if case == "bad_alike" else 10 + expected
                assert told["moving"] == pytest.approx(moving), case
                assert told["count"] == (processes - 2 if left_out else processes - 1), case
                assert told["equal"], case
                assert told["again"] is None, case


@every_size
def test_all_replicas_non_finite_is_an_error_that_changes_nothing(launch, processes):
    for result in launch.results(processes, "excluded"):
        assert f"All {processes} replicas hold non-finite values" in result["all_bad"]
        assert result["untouched"]


@every_size
def test_what_is_finite_on_no_replica_is_undone(launch, processes):
    for result in launch.results(processes, "blow_ups"):
        for case in ("state", "statistics"):
            assert result[case]["undone"] == [8], case
            assert result[case]["gains"][1] == pytest.approx(result[case]["gains"][0] / 3)
            assert result[case]["finite"]
        first = result["first round"]
        assert first["undone"] == [4]
        assert first["start"]  # BatchNorm's statistics too
        inside = result["inside"]
        assert inside["undone"] == [6]
        assert inside["gains"][1:] == [pytest.approx(inside["gains"][0] / 3)] * 2
        assert inside["lr"][0] == pytest.approx(1e-2 * inside["gains"][1], rel=0.21)  # the rest of the round has it
        assert inside["finite"]
        errors = {case: told["error"] for case, told in result.items() if told["error"]}
        assert errors.keys() == {"statistics, not undone"}
        assert "hold non-finite values" in errors["statistics, not undone"]


@every_size
def test_what_is_not_undone_is_reported(launch, processes):
    for result in launch.results(processes, "blow_ups"):
        assert result["frozen"]["nonfinite"] == [(), ("optimizer state",), ("optimizer state",)]
        kept = result["frozen, kept"]["nonfinite"]  # read in turn
        assert ("optimizer state",) in kept[3:20]
        assert result["statistics, one"]["excluded"] == [(), (0,), ()]
        assert result["statistics, one"]["buffers"]["1.running_mean"].isfinite().all()
        assert result["statistics, one"]["undone"] == []
        for dtype in ("float32", "float16", "bfloat16", "float8_e5m2"):
            told = result[f"alike, torch.{dtype}"]
            assert told["nonfinite"] == [("buffers",)] * 3, dtype
            assert told["excluded"] == [()] * 3
            assert told["finite"]


@every_size
def test_buffers_that_are_infinite_by_design_are_no_blow_up(launch, processes):
    inf = math.inf
    for result in launch.results(processes, "blow_ups"):
        for case in ("by design", "a longer mask"):
            told = result[case]
            assert (told["undone"], told["equal"]) == ([], True), case
            assert told["excluded"] == told["nonfinite"] == [()] * 3
        buffers = result["by design"]["buffers"]
        assert buffers["low"].tolist() == [-2.0, inf]  # the mean over those that have seen any
        assert buffers["high"].tolist() == [3.0, -inf]
        assert buffers["mask"].tolist() == [0.0, -inf]
        told = result["infinite on one"]
        assert (told["undone"], told["equal"], told["excluded"]) == ([], True, [()] * 3)
        assert told["buffers"]["mask"].tolist() == [1.0] * 3
        assert told["buffers"]["other"].tolist() == [(processes - 1) / 2] * 2


@every_size
@pytest.mark.parametrize("case", ["sum", "late sum", "differences"])
def test_a_sum_that_overflows_is_taken_in_a_smaller_scale(launch, processes, case):
    mean = (3e38 + (processes - 1) * 2e38) / processes
    for result in launch.results(processes, "blow_ups"):
        told = result[case]
        assert told["first"].tolist() == [[pytest.approx(mean, rel=1e-6)] * 4] * 4
        assert told["finite"]
        assert told["equal"] or case == "late sum"
        assert told["rescaled"] == [False, True]


@every_size
def test_dtypes_without_addition_are_averaged_late_too(launch, processes):
    for result in launch.results(processes, "blow_ups"):
        buffers = result["late dtypes"]["buffers"]
        assert buffers["flag"].tolist() == [1, 1]
        assert buffers["count"].tolist() == [processes - 1] * 2
        assert buffers["small"].tolist() == [pytest.approx((processes + 1) / 2, rel=0.07)] * 2


@every_size
def test_overlap_applies_the_mean_of_the_snapshot_late(launch, processes):
    """theta(kT + tau) = theta_local(kT + tau) + mean(snapshot) - snapshot, and equal replicas at a forced converge."""
    for result in launch.results(processes, "overlap"):
        for here, expected in result["path"]:
            assert here == pytest.approx(expected, abs=1e-12)
        assert result["final"][0] == pytest.approx(result["final"][1], abs=1e-12)
        assert result["equal"]
        assert result["equal_in_flight"]
        assert result["count"] == 14  # an integer buffer is corrected by the difference too
        assert result["reported"][6] == [5]  # told when it has landed, at step 7, about step 5
        assert result["reported"][5] == []
        assert result["reported"][-1] == [5, 10, 14, 15, 16]
        assert result["reports"][0].distance[0] > 0


@every_size
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("spread", "spread: 0.1 on replica 0"),
        ("no_spread", "spread: 0.1 on replica 0"),
        ("converge_every", "converge_every: 3 on replica 0"),
        ("seed", "seed: 0 on replica 0"),
        ("controller", "controller.momentum: 0.8 on replica 0"),
        ("max_lr", "schedule_lr.group0: 0.004"),
        ("shape", "weight: shape (2, 4) on replica 0"),
    ],
)
def test_ranks_that_differ_get_the_same_error_and_nobody_hangs(launch, processes, case, message):
    errors = [result[case] for result in launch.results(processes, "mismatches")]
    assert errors == errors[:1] * processes
    assert message in errors[0]
    assert f"on replica {processes - 1}" in errors[0]


@every_size
def test_ranks_that_agree_get_no_error(launch, processes):
    assert [result["none"] for result in launch.results(processes, "mismatches")] == [None] * processes


@every_size
@pytest.mark.parametrize("at", [8, 10])
def test_rank_0s_checkpoint_resumes_every_rank_bit_for_bit(launch, processes, at):
    """The published state_dict held the rank, so that rank 0's checkpoint collapsed the ensemble. Ours holds nothing
    that depends on the rank, at a round's end (8) or inside a round (10)."""
    for by_step in launch.results(processes, "resume"):
        result = by_step[at]
        assert result["equal"]
        assert result["gain"][0] == result["gain"][1] != (1.0,)
        assert result["lr_match"]
        assert result["scheduler_equal"]
        assert result["optimizer_lr_equal"]
        assert result["lrs_differ"] == processes


@every_size
def test_another_number_of_replicas_keeps_gain_and_step(launch, processes):
    for result in launch.results(processes, "resume"):
        assert result["resized"]["gain"][0] == result["resized"]["gain"][1]
        assert result["resized"]["steps"] == 10
        assert result["resized"]["lr"]


@every_size
def test_replicas_takes_a_group_or_a_mesh(launch, processes):
    for rank, result in enumerate(launch.results(processes, "groups")):
        half = [r for r in range(processes) if r % 2 == rank % 2]
        assert result["world"] == result["mesh"] == ((processes - 1) / 2, processes, processes)
        assert result["half"] == (sum(half) / len(half), len(half), len(half))
        assert 'replicas=mesh["replicate"]' in result["2d"]
        assert "ProcessGroup" in result["foreign"] or "not a member" in result["foreign"]


@every_size
def test_any_torch_scheduler_is_a_base_schedule(launch, processes):
    """Chainable schedulers compute the next rate from the present one: they must see the base, not the replica's."""
    for result in launch.results(processes, "schedulers"):
        assert len(result) > 15
        for (name, tensor), (error, same_tensor) in result.items():
            assert error <= (1e-7 if tensor else 1e-16), name
            assert same_tensor, name


@every_size
def test_reduce_on_plateau_follows_the_mean_loss(launch, processes):
    results = launch.results(processes, "plateau")
    assert all(result == results[0] for result in results)
    assert results[0]["bases"][1] == 0.5 > results[0]["bases"][-1]


@every_size
def test_bad_input_on_one_rank_raises_there_and_nobody_hangs(launch, processes):
    *good, bad = launch.results(processes, "bad_input")
    messages = ["spread=-0.1", "spread=1.0", "converge_every=0", "total_steps OR", "needs model=", "the int 3",
                "the int True", r"shape (2,)", "torch.int64", "got str"]  # fmt: skip
    for message, error in zip(messages, bad["errors"], strict=True):
        assert message in error
    assert all(result["errors"] == [None] * len(messages) for result in good)
    assert all(result["steps"] == 5 for result in [*good, bad])
    assert math.isnan(bad["losses"][-1])
    assert set(bad["losses"][:-1]) == {0.5}


def curves(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@every_size
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboards_numbers_are_the_callbacks(launch, processes):
    results = launch.results(processes, "monitors")
    directory = Path(results[0]["directory"])
    assert sorted(path.name for path in directory.iterdir()) == ["reports0.jsonl", "tensorboard0"]
    shown = curves(directory / "tensorboard0")
    reports = results[0]["reports"]
    assert [report.step for report in reports] == [5, 10, 15, 20, 23]
    assert [report.complete for report in reports] == [True] * 4 + [False]
    for report in reports:
        at = report.step
        for g in range(2):  # body and head share their curves
            assert shown["hdet/base_lr"][at] == np.float32(report.base_lr[g])
            assert shown["hdet/gain"][at] == np.float32(report.next_gain[g])
            for r in range(processes):
                assert shown[f"hdet_replicas/lr/replica{r}"][at] == np.float32(report.replica_lr[g][r])
            if report.complete:
                assert shown["hdet_evidence/hypergradient"][at] == np.float32(report.hypergradient[g])
                assert shown["hdet_evidence/velocity"][at] == np.float32(report.velocity[g])
        for r in range(processes):
            if report.complete:
                assert shown[f"hdet_replicas/loss/replica{r}"][at] == np.float32(report.losses[r])
            assert shown[f"hdet_replicas/distance/replica{r}"][at] == np.float32(report.distance[r])
        assert shown["hdet_speed/converge_ms"][at] == np.float32(report.converge_ms)
        assert shown["hdet_speed/converge_bytes"][at] == np.float32(report.converge_bytes)
        assert shown["hdet_replicas/excluded"][at] == 0
    assert any(report.next_gain != report.gain for report in reports)


@every_size
def test_json_lines_are_the_callbacks_reports(launch, processes):
    results = launch.results(processes, "monitors")
    lines = (Path(results[0]["directory"]) / "reports0.jsonl").read_text().splitlines()
    config, *records = map(json.loads, lines)
    assert config["config"]["spread"] == 0.2
    for record, report in zip(records, results[0]["reports"], strict=True):
        for name in ("step", "round", "complete", "replicas", "converge_bytes", "converge_ms"):
            assert record[name] == getattr(report, name)
        for name in ("losses", "next_gain", "distance", "base_lr"):
            assert record[name] == list(getattr(report, name))
        assert record["replica_lr"] == [list(rates) for rates in report.replica_lr]


@every_size
def test_a_monitor_on_one_rank_only_does_not_hang(launch, processes):
    results = launch.results(processes, "monitors")
    assert [len(result["lone"]) for result in results] == [0] * (processes - 1) + [2]
    assert all(map(math.isfinite, results[-1]["lone"][0].distance))


def test_version():
    assert hdet.__version__
