"""attach() with accelerate's own Accelerator, 2 processes: read from the scenarios of accelerate_worker.py."""

import re

import pytest

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_worker):
    return lambda scenario: launch_worker("accelerate_worker.py").results(2, scenario)


def test_it_trains_as_the_plain_loop_does(results):
    """To the bit, with accumulation, clipping, bf16 and a probe."""
    for result in results("equals_the_plain_loop"):
        assert result["weights"]
        assert result["lrs"]
        assert result["reports"]
        assert result["apart"]
        assert result["probed"]
        assert result["metrics"] == ["hdet/base_lr", "hdet/gain"]


@pytest.mark.parametrize("gradients", ["shared", "local"])
def test_a_run_that_load_state_has_resumed_is_the_uninterrupted_one(results, gradients):
    for found in (result[gradients] for result in results("resumes")):
        assert found["equal"]
        assert found["same on all"]
        assert found["apart"] == [True, False]  # save_state() converges
        assert found["gains"][0] == found["gains"][1] != (1.0,)
        assert found["steps"] == 12


@pytest.mark.parametrize("split_batches", [False, True])
def test_a_prepared_schedule_goes_as_fast_as_accelerate_steps_it(results, split_batches):
    """Once for each process, unless batches are split; also after a resume."""
    for result in results("prepared_schedules"):
        without, mean = result[split_batches]
        assert mean == pytest.approx(without)
        assert without[1] == pytest.approx(1e-3 * 0.9 ** (1 if split_batches else 2))


def test_what_a_loop_has_forgotten_is_said_once_on_one_rank_with_the_line_to_add(results):
    """A warning by ``warnings`` alone would be swallowed by a framework's filter."""
    first, second = results("says_what_is_forgotten")
    expected = {
        "no loss": r"without a loss.* scheduler\.step\(loss\)",
        "evaluation": r"evaluated 2 steps after .* Add scheduler\.converge\(\), on every rank, before evaluating",
        "saving": r"state_dict\(\) was taken 2 steps after .* Add scheduler\.converge\(\), .* before saving",
        "scheduler": r"state_dict\(\) was called 2 steps after .* Call scheduler\.converge\(\)",
    }
    for what, said in expected.items():
        assert len(first[what]) == 1, what
        assert re.search(said, first[what][0])
    quiet = {what: told for what, told in first.items() if what not in (*expected, "hooks")}
    assert quiet == {what: [] for what in ("before the first step", "training", "at a round's end", "closed")}
    assert all(told == [] for what, told in second.items() if what != "hooks")
    assert first["hooks"] == second["hooks"] == 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("accelerator", "Invalid accelerator=None. Must be an accelerate.Accelerator"),
        ("kind", "attach builds hdet.OneCycleLR or hdet.Ensemble"),
        ("unprepared", "got a SGD that accelerator.prepare\\(\\) has not returned. Prepare model and optimizer first"),
        ("settings", "Invalid spread=2"),
        ("prepared hdet", "steps this scheduler 2 times .* hdet.integrations.accelerate.attach\\(\\)"),
        ("deepspeed", "under DeepSpeed.* Use DDP or FSDP2"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(results, what, said):
    for result in results("refusals"):
        assert result[what] is not None
        assert re.search(said, result[what]), result[what]
