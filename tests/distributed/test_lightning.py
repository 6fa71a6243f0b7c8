"""The callback under Lightning's own trainer, 2 processes: read from the scenarios of lightning_worker.py."""

import re

import pytest

pytest.importorskip("lightning")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_worker):
    return lambda scenario: launch_worker("lightning_worker.py").results(2, scenario)


@pytest.mark.parametrize("variant", ["training_step", "method", "bf16", "no probe"])
def test_it_trains_as_the_plain_loop_does(results, variant):
    """To the bit: weights, learning rates, reports with their probes; with validations in the middle of rounds. Under
    bf16 the probe's loss is computed in it, too."""
    for by_variant, lrs in results("equals_the_plain_loop"):
        found = by_variant[variant]
        assert found["weights"]
        assert found["lrs"]
        assert found["reports"]
        assert lrs[0] != lrs[1]
        assert any(slope == slope for slope in found["probed"]) == (variant != "no probe")


def test_validation_sees_the_mean_and_not_one_replica(results):
    for by_variant, _ in results("equals_the_plain_loop"):
        assert by_variant["method"]["seen"] == [5, 10, 15, 20]
        assert by_variant["method"]["equal"]


def test_gain_and_learning_rate_are_logged_and_what_the_probe_logs_is_not(results):
    for by_variant, _ in results("equals_the_plain_loop"):
        for found in by_variant.values():
            assert found["keys"] == ["epoch", "hdet/base_lr", "hdet/gain", "loss"]
        gains = by_variant["no probe"]["gains"]
        assert len(gains) == 24
        assert len(set(gains)) > 1


def test_the_run_explains_itself_where_the_trainer_logs(results):
    for found in results("writes_its_report"):
        assert {"rounds.jsonl", "report.html"} < set(found["logger"])
        assert found["own"] == ["report.html", "rounds.jsonl"]
        assert found["none"] == []


@pytest.mark.parametrize("gradients", ["shared", "local"])
def test_a_run_that_was_resumed_in_the_middle_of_a_round_and_an_epoch_is_the_uninterrupted_one(results, gradients):
    """With accumulation, clipping and bf16; a probe without batches of its own under shared gradients."""
    for found in (result[gradients] for result in results("resumes")):
        assert found["equal"]
        assert found["same on all"]
        assert found["reports"]
        assert found["saved"]
        assert found["key"]
        assert found["steps"] == (24, 24, 24)
        assert found["gains"][0] == found["gains"][1]


def test_with_accumulation_the_loss_is_the_steps(results):
    assert all(result["first round"] for result in results("resumes"))


def test_what_is_saved_is_the_mean_and_an_error_is_no_reason_to_wait_for_other_ranks(results):
    for result in results("saves_one_model"):
        assert result["apart"]
        assert result["equal"]
        assert result["in the file"]
        assert result["error"] == "'the disk is gone'"
        assert result["at the error"] == 10
        assert result["converged"] == [4, 6, 8]  # not at the error
        assert result["put back"]


def test_each_of_several_optimizers_has_its_own_steps_and_losses(results):
    for result in results("several_optimizers"):
        assert result["steps"] == [8, 16]
        for name, losses in result["losses"].items():
            assert losses == pytest.approx(result["told"][name])
        assert result["equal"]
        assert result["keys"] == ["epoch", *(f"hdet/{x}/{i}" for x in ("base_lr", "gain") for i in (0, 1))]


def test_the_modules_own_schedule_becomes_the_base(results):
    for result in results("schedules"):
        assert result["lambda"] == pytest.approx([1e-3 * 0.9**step for step in range(24)])
        assert result["apart"] == pytest.approx([0.3] * 24)


def test_a_loss_scalers_scale_and_the_division_by_accumulation_are_undone(results):
    assert [result["scaled"] for result in results("schedules")] == [[1.5]] * 2


def test_a_second_fit_goes_on_where_the_first_ended(results):
    assert [result["longer"] for result in results("schedules")] == [(12, 12)] * 2


def test_max_lr_auto_searches_first(results):
    for result in results("schedules"):
        assert result["auto"][0] == result["auto"][1] > 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("epoch", 'stepped every 1 epoch. As the replicas\' base schedule .* "interval": "step"'),
        ("both", "returns a LambdaLR, and HDET was given a schedule, too"),
        ("endless", "without max_epochs and max_steps takes. Pass total_steps= to HDET"),
        ("manual", "manual optimization takes. Pass total_steps= to HDET"),
        ("manual probe", "optimizes manually.* Pass a method that returns a loss: probe=Adversaries.probe_loss"),
        ("optimizer", "Invalid optimizer=1. Must be the index of one of the 1 optimizers"),
        ("submodule", "Invalid submodule='nut'. Must be the name of a module in Module, which has net"),
        ("without", "checkpoint of step 2 has no state of HDET. Resume from one that was saved with HDET"),
        ("deepspeed", "DeepSpeedStrategy.* Use DDP or ModelParallelStrategy"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(results, what, said):
    for result in results("schedules"):
        assert result["refused"][what] is not None
        assert re.search(said, result["refused"][what]), result["refused"][what]


def test_a_sharded_model_is_saved_and_resumed_with_its_probe(results):
    for result in results("sharded"):
        assert result["equal"]
        assert result["same on all"]
        assert result["plain"]
