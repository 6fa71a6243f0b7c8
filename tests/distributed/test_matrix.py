"""Features under strategies, as docs/strategies.md lists them: read from the scenarios of matrix_worker.py.

Four processes. Grouped and under HSDP ranks 0 and 1 are replica 0, ranks 2 and 3 replica 1; with two virtual replicas
to a process there are eight.
"""

import math

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_matrix):
    return lambda scenario: launch_matrix.results(4, scenario)


def check_end(result, apart=True):
    """After a last converge inside a round: replicas that differed are bitwise equal, shard by shard."""
    assert result["apart"] == apart
    assert result["equal"]
    assert result["finite"]


@pytest.mark.parametrize(("strategy", "names"), [("ddp", 1), ("grouped", 2), ("hsdp", 1)])
def test_hyperparameters_differ_between_replicas_and_agree_inside(results, strategy, names):
    """Every rank holds what the reports say of its replica; the mean, in the hyperparameter's space, is the centre.
    With two replicas one factor is explored in a round, in rotation: the others are at their centres."""
    by_rank = [result[strategy] for result in results("hyperparameters")]
    explored = [0] * names
    for rank, result in enumerate(by_rank):
        check_end(result)
        assert repr(result["rounds"]) == repr(by_rank[0]["rounds"])
        assert len(result["rounds"]) == len(result["held"]) == 9
        for held, reported in zip(result["held"], result["rounds"], strict=True):
            assert len(reported) == names
            for i, one in enumerate(reported):
                assert held[i] == one["values"][result["replica"]]
                assert all(math.isfinite(one[key]) for key in ("centre", "next_centre"))
                values, centre = one["values"], one["centre"]
                if i == 0:  # weight decay, in the log
                    values, centre = [math.log(value) for value in values], math.log(centre)
                assert math.fsum(values) / len(values) == pytest.approx(centre, abs=1e-12)
                if len(set(values)) == 1:
                    assert math.isnan(one["effect"])
                    assert strategy != "ddp"  # four replicas carry both factors in every round
                else:
                    assert math.isfinite(one["effect"])
                    assert math.isfinite(one["error"])
                    explored[i] += rank == 0
        assert [h["next_centre"] for h in result["rounds"][-1]] == result["centres"]
    assert min(explored) >= 3
    assert any(h["next_centre"] != h["centre"] for reported in by_rank[0]["rounds"] for h in reported)


def test_probe_and_auto_lr_of_grouped_replicas(results):
    by_rank = results("probe")
    for result in by_rank:
        check_end(result)
        assert repr((result["gains"], result["slopes"])) == repr((by_rank[0]["gains"], by_rank[0]["slopes"]))
        assert sum(math.isfinite(raw) for raw, *_ in result["slopes"]) >= 3
        assert result["gains"][-1] != 1
        assert all(0 < gain < math.inf for gain in result["gains"])


@pytest.mark.parametrize("strategy", ["local", "grouped", "virtual"])
def test_a_round_that_blew_up_is_undone(results, strategy):
    """One rank's loss at 1000 times its value: parameters and optimizer state of the last converge, a third of the
    gain; then on, without another."""
    by_rank = [result[strategy] for result in results("rollback")]
    for result in by_rank:
        assert result["rolled_back"] == [False, False, False, True]
        assert result["left"]
        assert result["parameters"]
        assert result["optimizer_state"]
        before, reported, after = result["gains"]
        assert reported == after == pytest.approx(before / 3)
        assert result["gains"] == by_rank[0]["gains"]
        assert not any(result["again"])
        check_end(result, apart=strategy != "virtual")  # whose processes all stand at the mean between visits


def test_overlap_of_grouped_replicas(results):
    """The mean of the snapshots less the own snapshot is added two steps late. The average that is under way at the
    last converge lands in it, neither lost nor repeated: the mean is that of the replicas before."""
    for result in results("overlap"):
        check_end(result)
        assert result["late"] < 1e-6 < 1e-3 < result["correction"]
        assert (result["landed"], result["in_all"]) == (1, 3)
        assert result["error"] < 1e-6


def test_optimizer_state_of_grouped_replicas_is_averaged(results):
    for result in (result["grouped"] for result in results("optimizer_state")):
        assert result["policy"] == "average"
        assert result["members_equal"]
        assert result["error"] < 1e-7 < 1e-4 < result["apart"]
        assert result["equal"]


def test_optimizer_state_of_virtual_replicas_is_verified(results):
    """It passes while the states agree, and finds one number that does not, on every rank."""
    by_rank = [result["virtual"] for result in results("optimizer_state")]
    for result in by_rank:
        assert result["equal"]
        assert result["converges"] == 2
        assert "optimizer states differ" in result["error"]
        assert result["error"] == by_rank[0]["error"]


@pytest.mark.parametrize("at", [16, 18])
@pytest.mark.parametrize("strategy", ["grouped", "virtual"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, strategy, at):
    for result in (result[strategy, at] for result in results("resume")):
        assert result["same"]
        assert result["moved"]
        assert result["model"]
        assert result["state"]
        assert result["gains"][0] == result["gains"][1]
        assert result["slopes"][0] == result["slopes"][1]
