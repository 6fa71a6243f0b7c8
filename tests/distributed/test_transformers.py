"""attach() under Hugging Face's own Trainer, 2 processes: read from the scenarios of transformers_worker.py."""

import re

import pytest

pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_worker):
    return lambda scenario: launch_worker("transformers_worker.py").results(2, scenario)


@pytest.mark.parametrize("variant", ["probe", "no probe"])
def test_it_trains_as_the_plain_loop_does(results, variant):
    """To the bit, with accumulation, clipping, bf16 and the Trainer's own cosine as the base schedule."""
    for found in (result[variant] for result in results("equals_the_plain_loop")):
        assert found["weights"]
        assert found["lrs"]
        assert found["reports"]
        assert found["all lrs"][0] != found["all lrs"][1]
        assert any(slope == slope for slope in found["probed"]) == (variant == "probe")


def test_evaluation_sees_the_mean_and_not_one_replica(results):
    for found in (result["probe"] for result in results("equals_the_plain_loop")):
        assert found["evaluated"] >= 2
        assert found["equal"]


def test_the_run_explains_itself_in_the_output_folder(results):
    for found in (result["no probe"] for result in results("equals_the_plain_loop")):
        assert found["rounds"] == [0, 1, 2]
        assert found["report"] >= 6


def test_gain_and_base_learning_rate_are_logged(results):
    for found in (result["no probe"] for result in results("equals_the_plain_loop")):
        gains, bases, lrs = zip(*found["logged"], strict=True)
        assert len(gains) == 12
        assert len(set(gains)) > 1
        assert lrs[1:] == bases[:-1]  # the Trainer logs the rate before the scheduler's step, hdet the one after


@pytest.mark.parametrize("gradients", ["shared", "local"])
def test_a_resumed_run_is_the_uninterrupted_one(results, gradients):
    for found in (result[gradients] for result in results("resumes")):
        assert found["equal"]
        assert found["same on all"]
        assert found["reports"]
        assert found["losses"]
        assert found["steps"] == (30, 30)
        assert found["ends"] == [6, 18, 30]  # saved in mid-round, and the end


def test_adapters_of_a_language_model_are_averaged_and_saved(results):
    for result in results("language_model_with_lora"):
        assert result["equal"]
        assert result["saved"]
        assert result["moved"]
        assert all(result["apart"])
        assert result["steps"] == 12
        assert result["losses"][-1] < result["losses"][0]
        assert result["kind"]


def test_a_second_run_is_another_and_a_step_skipped_on_one_rank_counts_on_all(results):
    for result in results("trains_again"):
        assert result["steps"] == (6, 6)
        assert result["converges"]  # at the end, which is in the middle of a round
        assert result["others"]
        assert result["equal"]
        assert "trainer.train() builds it" in result["before"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("what", "Invalid trainer=Linear.* Must be a transformers.Trainer"),
        ("model", "Do not pass model= to attach: it is the Trainer's"),
        ("kind", "builds hdet.OneCycleLR or hdet.Ensemble: pass the class"),
        ("deepspeed", "under DeepSpeed.* Use DDP or FSDP2, or hdet.integrations.deepspeed"),
        ("twice", "was called on this Trainer before"),
        ("both", "was given a LambdaLR, and attach\\(\\) a schedule, too. Leave one of them out"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(results, what, said):
    for result in results("refusals"):
        assert result[what] is not None
        assert re.search(said, result[what]), result[what]
