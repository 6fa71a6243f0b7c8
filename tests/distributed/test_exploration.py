"""Virtual replicas and hyperparameters with real processes, read from the scenarios of worker.py."""

import math

import pytest
import torch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize("processes", [2, 4])
def test_virtual_replicas_do_what_real_ones_do(launch, processes):
    """Four replicas, 100 steps of Adam with a controller: four in one process, two in each of two, four processes."""
    for runs in launch.results(processes, "virtual"):
        assert set(runs) == {"virtual", "pairs"} | ({"real"} if processes == 4 else set())
        one = runs["virtual"]
        assert len(set(one["gains"])) > 3  # the controller was at work
        for other in runs.values():
            assert other["size"] == 4
            assert torch.allclose(other["parameters"], one["parameters"], rtol=1e-10, atol=1e-12)
            assert other["gains"] == pytest.approx(one["gains"], rel=1e-9)
            for mine, theirs in zip(one["losses"], other["losses"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-9)
            for mine, theirs in zip(one["slopes"], other["slopes"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_replicas_hold_different_values_around_one_centre(launch, processes):
    results = launch.results(processes, "hyperparameters")
    for round in range(20):
        reports = [result["reports"][3 * round : 3 * round + 3] for result in results]
        # On every rank alike; != for NaN, the effect of a factor that was not explored in this round.
        assert all(str(report) == str(reports[0]) for report in reports)
        for place, report in enumerate(reports[0]):
            held = tuple(result["held"][round][1 + place] for result in results)
            assert held == pytest.approx(report["values"])
            explored = len(set(held)) > 1
            assert math.isfinite(report["effect"]) == explored
            if report["name"] == "weight_decay":
                assert math.fsum(map(math.log, held)) / len(held) == pytest.approx(math.log(report["centre"]))
            else:
                assert math.fsum(held) / len(held) == pytest.approx(report["centre"])
    explored = [sum(math.isfinite(h["effect"]) for h in results[0]["reports"][i : i + 3]) for i in range(0, 60, 3)]
    # One learning rate and three others take turns on the N - 1 columns.
    assert sum(explored) == pytest.approx(20 * 3 * (processes - 1) / 4, abs=1)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_probe_compares_replicas_under_common_settings(launch, processes):
    for result in launch.results(processes, "hyperparameters"):
        smoothing, training, _ = zip(*result["probed"], strict=True)
        assert set(smoothing) == {0.0}  # neutral
        assert not any(training)  # and so no dropout


@pytest.mark.parametrize("processes", [2, 4])
def test_saved_state_holds_centres_and_loads_into_this_replicas_values(launch, processes):
    for result in launch.results(processes, "hyperparameters"):
        assert result["saved_weight_decay"] == pytest.approx(result["centres"]["weight_decay"])
        assert result["resumed_centres"] == pytest.approx(result["centres"])
        assert result["resumed_values"] == pytest.approx(result["values"])
        assert result["after"] != result["centres"]
