"""The probe, the rollback and find_lr with real processes, read from the scenarios of worker.py."""

import math

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
every_size = pytest.mark.parametrize("processes", [2, 4])


@every_size
def test_real_processes_do_what_the_simulation_does(launch, processes):
    """The regret benchmark simulates replicas on the line through the round's start; these are real ones."""
    results = launch.results(processes, "paired_probe")
    for result in results:
        assert result["gains"] == pytest.approx(result["simulated_gains"], rel=2e-3)
        assert result["loss"] == pytest.approx(result["simulated_loss"], rel=1e-3)
        assert result["gains"] == results[0]["gains"]
    assert len(set(results[0]["gains"])) > 3


@every_size
def test_the_probe_leaves_no_trace(launch, processes):
    for result in launch.results(processes, "paired_probe"):
        assert len({str(digest) for digest in result["digests"]}) == 1  # parameters are the mean again, to the bit
        assert result["generator_untouched"]
        assert result["training"]


@every_size
def test_a_round_has_a_probe_while_the_gain_may_move(launch, processes):
    for result in launch.results(processes, "paired_probe"):
        probed = [all(map(math.isfinite, slopes)) for slopes in result["slopes"]]
        assert probed == [True] * 7 + [False] * 3  # ten rounds: OneCycle falls below 0.2 after 79%


@every_size
def test_the_slow_average_is_saved(launch, processes):
    for result in launch.results(processes, "paired_probe"):
        assert result["resumed_gain"] == pytest.approx(result["gains"][4])
        assert result["resumed_slow"]
        assert result["resumed_rounds"] == 5


@every_size
def test_a_failing_loss_function_fails_everywhere_and_leaves_the_mean(launch, processes):
    results = launch.results(processes, "probe_failure")
    assert results[1]["error"] == "ValueError: out of luck"
    for rank, result in enumerate(results):
        if rank != 1:
            assert "failed on replica 1" in result["error"]
        assert len({str(digest) for digest in result["digests"]}) == 1
        assert result["training"]


@every_size
def test_a_run_that_blew_up_goes_back(launch, processes):
    for result in launch.results(processes, "rollback"):
        assert result["rolled_back"] == [False] * 4 + [True] + [False] * 5
        assert result["gains"][4] == pytest.approx(result["gains"][3] / 3)
        assert result["restored"]
        assert result["finite"]
        assert len({str(digest) for digest in result["digests"]}) == 1


@every_size
def test_find_lr_finds_the_same_everywhere_and_puts_everything_back(launch, processes):
    results = launch.results(processes, "find_lr")
    for result in results:
        assert result["restored"]
        assert (result["found"], result["coarse"]) == (results[0]["found"], results[0]["coarse"])
    found, coarse = results[0]["found"], results[0]["coarse"]
    assert 0.05 < found["max_lr"] < 1  # tuned: 0.2
    assert min(found["losses"]) < found["start_loss"]
    assert found["conclusive"]
    assert coarse["conclusive"]
    assert coarse["lrs"] == pytest.approx([1e-3, 1e-2, 0.1, 1.0, 10.0])
    assert pytest.approx(coarse["max_lr"] / min(2, processes)) in coarse["lrs"]  # it begins above


@every_size
def test_converge_averages_what_was_written_since(launch, processes):
    for result in launch.results(processes, "last_step"):
        assert result["nothing"] is None
        assert result["different"] == 2
        assert result["averaged"]
        assert len({str(digest) for digest in result["digests"]}) == 1
        assert result["again"] is None
