"""The model of a round's costs: against rings counted message by message, and against hdet's own messages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hdet
from hdet.bench.scaling import __main__ as program
from hdet.bench.scaling import costs, fit, fleet
from hdet.bench.scaling.network import PUBLISHED, Cluster, Link, all_gather, hierarchical, ring, tree

LINK = Link(1e-5, 1e9, "a test")
SHARED = Link(1e-5, 1e9, "a test", is_shared=True)


def ring_by_messages(link, ranks, nbytes):
    """The slow twin: every message of a ring all-reduce, reduce-scatter and all-gather, all ranks at once."""
    seconds, sent, chunk = 0.0, 0.0, nbytes / ranks
    for _ in ("reduce-scatter", "all-gather"):
        for _ in range(ranks - 1):
            on_the_link = ranks * chunk if link.is_shared else chunk
            seconds += link.alpha + on_the_link / link.bandwidth
            sent += chunk
    return seconds, sent


@pytest.mark.parametrize("link", [LINK, SHARED])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("nbytes", [0, 1e3, 1e9])
def test_a_ring_costs_what_its_messages_cost(link, ranks, nbytes):
    assert ring(link, ranks, nbytes) == pytest.approx(ring_by_messages(link, ranks, nbytes))


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_a_tree_has_fewer_messages_and_as_many_bytes(ranks):
    """Of nothing but latency a tree costs 2 log2(N) alpha, a ring 2 (N - 1) alpha; of large buffers both 2 n / B."""
    assert tree(LINK, ranks, 0).seconds == pytest.approx(2 * math.log2(ranks) * LINK.alpha)
    assert ring(LINK, ranks, 0).seconds == pytest.approx(2 * (ranks - 1) * LINK.alpha)
    large = 1e15
    assert tree(LINK, ranks, large).seconds == pytest.approx(2 * large / LINK.bandwidth, rel=1e-3)
    assert ring(LINK, ranks, large).seconds == pytest.approx(2 * large / LINK.bandwidth * (1 - 1 / ranks), rel=1e-3)


def test_an_all_gather_is_half_an_all_reduce_of_all_that_is_gathered():
    for link in (LINK, SHARED):
        assert all_gather(link, 8, 1e6).seconds == pytest.approx(ring(link, 8, 8e6).seconds / 2)


def test_nodes_of_one_rank_or_of_all_are_the_flat_all_reduce():
    alone, together = Cluster(SHARED, LINK, 1), Cluster(LINK, SHARED, 16)
    for nbytes in (1e3, 1e9):
        flat = min(ring(LINK, 16, nbytes), tree(LINK, 16, nbytes))
        assert hierarchical(alone, 16, nbytes) == pytest.approx(flat)
        assert hierarchical(together, 16, nbytes) == pytest.approx(ring(LINK, 16, nbytes))


def test_fast_links_inside_nodes_spare_the_slow_ones():
    whole = hierarchical(PUBLISHED, 64, 4e9)
    assert whole.seconds < min(ring(PUBLISHED.between, 64, 4e9), tree(PUBLISHED.between, 64, 4e9)).seconds / 3
    with pytest.raises(ValueError, match="Invalid ranks=65"):
        hierarchical(PUBLISHED, 65, 1e9)


# ------------------------------------------------------------------------------------------------------ a round


def of_round(parameters=1e9, replicas=64, strategy=costs.DDP, work=None):
    return costs.of_round(parameters, replicas, strategy, PUBLISHED, work or costs.Work(), costs.Machine())


def test_one_replica_sends_nothing():
    alone = of_round(replicas=1)
    assert alone.converge == alone.agreement == (0, 0)
    assert alone.probe.sent == 0
    assert alone.added_memory == 28e9  # weights and moments once more, and the probe's four copies


def test_converging_once_a_round_sends_a_share_of_the_gradients():
    for strategy in (costs.DDP, costs.HSDP, costs.ZERO3):
        found = of_round(strategy=strategy, work=costs.Work(steps=50))
        assert found.converge.sent == pytest.approx(found.gradient_bytes / 50)


def test_shards_divide_bytes_and_memory():
    whole, part = of_round(70e9, strategy=costs.DDP), of_round(70e9, strategy=costs.ZERO3)
    assert part.memory == pytest.approx(whole.memory / 64)
    buckets = 2 * 64 * 2**20
    assert part.added_memory - buckets == pytest.approx((whole.added_memory - buckets) / 64)
    assert part.converge.sent <= 2 * 4 * 70e9 / 64


def test_the_probe_costs_five_forward_passes_of_the_rounds_training_steps():
    """Five passes of 2 P operations per token, of T steps of 6 P: 1.7% of 100 steps."""
    one = of_round(replicas=1)
    assert one.probe.seconds / one.compute == pytest.approx(5 * 2 / (100 * 6))


# -------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("link", [LINK, SHARED])
def test_the_fit_finds_what_made_the_times(link):
    timed = [fit.Timed(n, size, ring(link, n, size).seconds) for n in (2, 3, 4) for size in fit.SIZES]
    found = fit.fit(timed)
    assert (found.link.alpha, found.link.bandwidth) == (pytest.approx(link.alpha), pytest.approx(link.bandwidth))
    assert found.link.is_shared == link.is_shared
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.held_out_error == pytest.approx(0, abs=1e-9)


def test_the_error_is_that_of_the_processes_that_were_left_out():
    timed = [fit.Timed(n, size, ring(LINK, n, size).seconds) for n in (2, 4) for size in fit.SIZES]
    timed += [fit.Timed(3, size, 2 * ring(LINK, 3, size).seconds) for size in fit.SIZES]
    found = fit.fit(timed)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.held_out_error == pytest.approx(0.5)


def test_times_without_a_bandwidth_are_refused():
    with pytest.raises(ValueError, match="with a positive bandwidth fits these 2 all-reduces"):
        fit.fit([fit.Timed(2, 0, 1.0), fit.Timed(4, 0, 3.0)])


# ------------------------------------------------------------------------------------------------------ the fleet


@pytest.fixture(scope="module")
def fleets():
    return fleet.simulate([fleet.Case(4), fleet.Case(16), fleet.Case(16, probe=True), fleet.Case(16, stray=11)])


def test_the_model_counts_the_bytes_that_hdet_sends(fleets):
    """A rank tells as many numbers whatever the size of the fleet; the message has a slot for each rank."""
    for one in fleets[:3]:
        assert one.numbers == fleets[0].numbers >= 10
        assert one.message == 32 * one.numbers * one.ranks
    four, sixteen, probed, _ = fleets
    work = costs.Work(numbers=four.numbers)
    for one in (four, sixteen):
        cluster = Cluster(Link(0.0, 1e9, "a ring is the fastest"), LINK, 64)
        model = costs.of_round(one.weights / 4, one.ranks, costs.DDP, cluster, work, costs.Machine())
        assert model.agreement.sent == pytest.approx(2 * (one.ranks - 1) / one.ranks * one.message)
    assert probed.gathered - sixteen.gathered == 8 * 6  # the probe's losses, as the model has it
    assert [call.received for call in sixteen.collectives if call.name == "allgather"] == [16 * sixteen.gathered]


def test_what_a_rank_does_is_measured(fleets):
    for one in fleets[:3]:
        assert 0 < one.between < one.seconds < 60


def test_a_stray_rank_is_found_by_all(fleets):
    assert fleets[3].collectives == []
    others = ", ".join(str(rank) for rank in range(16) if rank != 11)
    assert f"spread: 0.1 on replica {others}; 0.2 on replica 11" in fleets[3].error


def test_a_rank_that_fails_ends_the_fleet_though_the_others_wait():
    """In a process of its own: the threads that wait stay behind."""
    program = """
from hdet.bench.scaling import fleet

train = fleet._Rank._train

def fails_on_two(self):
    if self.rank == 2:
        raise ArithmeticError("a mistake")
    train(self)

fleet._Rank._train = fails_on_two
fleet._simulate(fleet.Case(4))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(hdet.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 1
    assert "RuntimeError: rank 2 of the fleet has failed: ArithmeticError('a mistake')" in done.stderr


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_says_what_is_a_model_and_what_was_given(tmp_path, capsys):
    file = tmp_path / "new" / "scaling.json"
    assert program.main(["--sections", "costs", "--between", "25", "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Model, inputs: inside a node 3.4 µs and 360 GB/s (NCCL's own cost model")
    assert "25 GB/s (given: --between)" in said
    assert "| 400B | ZeRO-3, 256 GPUs |" in said
    assert "| 400B | DDP" not in said  # it does not fit
    rows = json.loads(file.read_text())["costs"]
    assert {row["replicas"] for row in rows} == set(program.REPLICAS)
    assert all(row["memory"] < 80e9 for row in rows)
    assert all(row["share"] > 0 for row in rows)
    shares = [row["share"] for row in rows if row["replicas"] == 1 and row["strategy"]["name"] == "DDP"]
    assert shares == [pytest.approx(5 * 2 / 600)] * 2  # of the probe alone, in a round of 100 steps
