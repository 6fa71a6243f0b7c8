"""Optimizer state, health, precision and guards with real processes: what state_worker.py saw."""

import math

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# By optimizer, what auto comes to under shared gradients. Under local ones it is "average", but for LBFGS.
AUTO = {
    "SGD": "verify",
    "SGD, weight decay": "average",
    "Adam": "verify",
    "Adam, weight decay": "average",
    "AdamW": "verify",
    "NAdam": "verify",
    "RAdam": "verify",
    "Adamax": "verify",
    "Adagrad": "verify",
    "Adadelta": "verify",
    "RMSprop": "verify",
    "Adafactor": "verify",
    "Rprop": "average",
    "ASGD": "average",
    "LBFGS": "reset",
    "Muon": "verify",
    "Schedule-Free": "average",
    "8-bit": "average",
}


@pytest.fixture(scope="module")
def results(launch_state):
    """What every rank returned from a scenario, by rank."""
    return lambda scenario: launch_state.results(3, scenario)


@pytest.mark.parametrize("gradients", ["shared", "local"])
@pytest.mark.parametrize("name", AUTO)
def test_auto_is_right_for_every_optimizer(results, name, gradients):
    """The state is equal on all ranks after a converge; under shared gradients it needs no averaging where it is made
    of gradients alone, and verify, which would fail otherwise, passes."""
    ranks = [result[name, gradients] for result in results("every_optimizer")]
    expected = AUTO[name] if gradients == "shared" or name == "LBFGS" else "average"
    quantised = name == "8-bit"
    for rank, result in enumerate(ranks):
        assert result["resolved"] == expected
        assert result["keys"]
        assert result["empty"] == (name == "LBFGS")
        assert result["unequal"] == (["codes", "scale"] if quantised and gradients == "local" else [])
        assert len(result["lines"]) == (1 if quantised and rank == 0 else 0)


@pytest.mark.parametrize(("dtype", "unit"), [("torch.float32", 2**-22), ("torch.bfloat16", 2**-8)])
def test_average_is_the_mean_in_fp32_and_in_place(results, dtype, unit):
    """v <- (1/N) sum_r v_r, rounded once to the state's dtype; counters: the maximum."""
    for result in results("averaged_state"):
        assert result[dtype]["error"] <= unit
        assert result[dtype]["equal"]
        assert result[dtype]["in_place"]


def test_verify_raises_on_every_rank_and_says_where(results):
    errors = [result["verify"]["error"] for result in results("policies")]
    assert len(set(errors)) == 1
    for part in ("'exp_avg' of parameter 0", "replica 1 against replica 0", 'optimizer_state="average"'):
        assert part in errors[0]


def test_auto_goes_over_to_averaging_when_states_differ(results):
    for rank, result in enumerate(results("policies")):
        assert result["auto"]["error"] is None
        assert result["auto"]["resolved"] == "average"
        assert result["auto"]["equal"]
        assert result["auto"]["finite"]
        assert len(result["auto"]["lines"]) == (rank == 0)


def test_keep_reset_and_average_do_what_they_say(results):
    for result in results("policies"):
        assert not result["keep"]["equal"]
        assert result["reset"]["empty"]
        assert result["average"]["equal"]
        assert all(result[policy]["finite"] for policy in ("keep", "reset", "average"))


def test_state_that_some_replicas_lack_is_made_there(results):
    """Adam's exp_avg of a parameter that only replica 1 had gradients for, 2.0 in both steps: 2 (1 - 0.9**2)."""
    for result in results("missing_state"):
        assert result["equal"]
        assert result["parameters"] == [0, 1, 2, 3]
        assert result["steps"] == [2.0] * 4
        assert result["from_one"] == pytest.approx(result["expected"])
        assert "different shapes" in result["error"]


@pytest.mark.parametrize(
    ("name", "poison"),
    [
        ("local", "parameters"),
        ("local", "state"),
        ("verify", "parameters"),
        ("verify", "state"),
        ("keep", "parameters"),
        ("overlap", "parameters"),
        ("8-bit", "parameters"),
    ],
)
def test_a_replica_that_is_not_finite_is_healed_with_its_optimizer_state(results, name, poison):
    ranks = [result[name, poison] for result in results("health")]
    for rank, result in enumerate(ranks):
        assert result["excluded"] == (2,)  # and so in TensorBoard
        assert result["finite"]
        assert result["models_finite"]
        assert result["equal"] == (name in ("local", "verify"))
        assert [math.isnan(loss) for loss in result["losses"]] == [False, False, True]
        told = [line for line in result["lines"] if "not finite on replica 2" in line]
        assert len(told) == (rank == 0)
        if name != "overlap":  # where a step follows
            assert result["error"] < 1e-7


def test_a_round_is_undone_right_after_a_resume(results):
    """The copy to go back to used to be taken at the first converge, and a run that blew up before that was lost."""
    for rank, result in enumerate(results("rollbacks")):
        assert result["rolled_back"]
        assert result["gain"] == pytest.approx(result["saved_gain"] / 3)
        assert result["model"]
        assert result["state"]
        assert len(result["lines"]) == (rank == 0)


def test_rollbacks_are_bounded_and_end_in_an_error_everywhere(results):
    for result in results("rollbacks"):
        assert result["count"] == 8
        assert "after 8 rollbacks" in result["error"]


@pytest.mark.parametrize("at", [16, 18])
@pytest.mark.parametrize("name", ["posterior", "evidence", "hyperparameters", "local", "outer momentum", "reset"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, name, at):
    """From rank 0's checkpoint, at a round's end and, after a converge(), inside a round."""
    for result in results("resume"):
        if (name, at) not in result:
            pytest.skip("inside a round movement counts from the resume on, and each replica's state is its own")
        found = result[name, at]
        assert found["same"]  # the checkpoint, on every rank
        assert found["model"]
        assert found["state"]
        assert found["gain"][0] == found["gain"][1]
        assert found["centres"][0] == found["centres"][1]


def test_whatever_the_precision_rounds_stay_in_step(results):
    for result in results("precision"):
        for name, found in result.items():
            assert found["equal"], name
            assert found["finite"], name
        steps = {name: found["steps"] for name, found in result.items()}
        assert steps == {
            "autocast": 10, "skipped": 10, "bfloat16": 0, "accumulation": 7, "two optimizers": 9, "rivals": 9
        }  # fmt: skip
        assert result["autocast"]["policy"] == "verify"  # and it passed
        assert result["skipped"]["scales"] == [1024.0, 1024.0, 256.0]  # two steps skipped, on one rank
        assert result["skipped"]["counts"] == [10.0, 10.0, 10.0]  # the largest
        assert result["bfloat16"]["error"] == 0


def test_two_schedulers_that_average_the_same_model_are_told(results):
    for rank, result in enumerate(results("precision")):
        assert result["two optimizers"]["lines"] == []
        assert all("submodule" in line for line in result["rivals"]["lines"])
        assert len(result["rivals"]["lines"]) == (2 if rank == 0 else 0)


def test_batch_norm_whose_statistics_are_not_the_replicas_own_is_warned_of(results):
    writer, *others = results("surroundings")
    (broadcast,) = writer["broadcast"]
    assert "broadcast_buffers=False" in broadcast
    (synced,) = writer["sync"]
    assert "SyncBatchNorm" in synced
    for name in ("no broadcast", "local", "layer norm"):
        assert writer[name] == []
    assert all(other["broadcast"] == other["sync"] == [] for other in others)


def test_accelerates_stepping_once_per_process_is_refused(results):
    """AcceleratedScheduler.step() steps three times for one optimizer step of three processes."""
    for result in results("surroundings"):
        assert "3 times for one step" in result["accelerate"]
        assert "step_scheduler_with_optimizer=False" in result["accelerate"]
        assert result["steps"] == 1
