"""Replicas of several ranks, sharded or not, and gradient modes: read from the scenarios of sharded_worker.py.

Four processes, two replicas of two members each: ranks 0 and 1 are replica 0, ranks 2 and 3 replica 1.
"""

import math

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_sharded):
    return lambda scenario: launch_sharded.results(4, scenario)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_converge_is_the_mean_of_the_replicas(results, precision):
    """Shard by shard, in place, whether the root's parameters are gathered at the moment or not; a converge that wrote
    only what the root had gathered would be lost at the next forward pass."""
    by_rank = [result[precision] for result in results("converged_mean")]
    for result in by_rank:
        assert result["error"] < 2e-7 < 1e-3 < result["apart"]
        assert all(result["equal"])
        assert result["again"] is None
        assert result["in_place"]
        assert result["dtypes"] == {"torch.float32"}  # the shards, under mixed precision too
        assert result["buffers"]
        assert result["distance"] == pytest.approx(result["expected_distance"], rel=1e-4)
    assert [any(result["empty"]) for result in by_rank] == [False, True, False, True]


def test_learning_rates_differ_per_replica_and_not_per_shard(results):
    lrs = [result["fp32"]["lrs"] for result in results("converged_mean")]
    assert lrs[0] == lrs[1]
    assert lrs[2] == lrs[3]
    assert lrs[0][0] != lrs[2][0]
    places = [result["fp32"]["place"] for result in results("converged_mean")]
    assert places == [(2, r // 2, 2, r % 2, r == 0) for r in range(4)]


def test_reports_are_the_same_on_all_members(results):
    reports = [repr(result["fp32"]["reports"]) for result in results("converged_mean")]
    assert reports == reports[:1] * 4


def test_losses_are_averaged_over_the_members(results):
    for result in results("losses_and_health"):
        first, second = result["losses"]
        assert first == (1.0, 3.0)  # ranks 0 and 1 report 0+1 and 1+2 over two steps, ranks 2 and 3 2+3 and 3+4
        assert math.isnan(second[0])  # one member's NaN
        assert second[1] == 3.0


def test_a_member_that_is_not_finite_leaves_out_its_replica_on_every_rank(results):
    for rank, result in enumerate(results("losses_and_health")):
        assert result["excluded"] == (1,)
        assert result["healed"] == pytest.approx((0, 1))  # all of what replica 0 had added to one weight
        assert result["buffer"] == (0,)  # a buffer on rank 1, which ranks 0 and 2 do not see
        assert result["running_mean"] == [2.0 + rank % 2] * 5
        assert "All 2 replicas hold non-finite values" in result["error"]  # a member of each


MODES = ["ddp_shared", "ddp_local", "ddp_grouped", "ddp_pairs_shared", "ddp_of_members_local", "ddp_of_members_grouped",
         "hsdp_shared", "hsdp_local", "hsdp_grouped", "hsdp_int_local", "fsdp_local"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_mode_equals_a_simulation_in_one_process(results, mode):
    for result in (by_mode[mode] for by_mode in results("gradient_modes")):
        assert result["error"] < 1e-6
        assert result["equal"]
        assert result["said"] == []
        assert result["across_equal"] == ("shared" in mode)
        assert result["inside_equal"] == (mode != "ddp_local")


@pytest.mark.parametrize("how", ["ddp", "grouped", "hsdp"])
def test_gradients_stay_apart_under_no_sync_and_come_together_again_under_the_next_ensemble(results, how):
    """FSDP2's set_requires_all_reduce(False) would not do: the gradients then never reach the parameters."""
    assert all(result[how] == [True, False, True, False] for result in results("switches"))


def test_gradients_that_are_not_what_the_mode_says_are_an_error_or_warned_of(results):
    first, *others = results("guards")
    wrong = "shared, no DDP"
    assert 'pass gradients="local"' in first[wrong][0]
    assert "the gradient of 0.weight: other values on replica 1, 2, 3" in first[wrong][0]
    assert all(said[wrong] == first[wrong] for said in others)  # on every rank
    assert "Pass the DistributedDataParallel" in first["local, bare model"][0]
    assert [len(said) for said in first.values()] == [1, 1, 0]  # once
    assert all(said == [] for result in others for name, said in result.items() if name != wrong)


def test_outer_momentum_equals_a_reference_in_one_process_and_resumes_bit_for_bit(results):
    """v <- mu v + (a - m), a <- a - nu (a - m + mu v) from the second round on; mu = 0, nu = 1 is the plain mean."""
    for rank, by_case in enumerate(results("outer")):
        assert len(by_case) == 6
        for (how, momentum, lr), result in by_case.items():
            assert result["error"] < 1e-6
            assert result["equal"]
            assert result["resumed"]
            assert (result["parts"] > 0) == (momentum > 0 or lr != 1)
            assert result["shard"] == ([rank % 2, 2] if how == "hsdp" else [0, 1])


def test_overlap_of_sharded_replicas(results):
    for result in results("overlap"):
        assert result["apart"]
        assert result["equal"]
        assert result["finite"]


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize(("gradients", "policy"), [("shared", "verify"), ("local", "average")])
def test_the_optimizer_state_of_sharded_replicas(results, gradients, policy, poison):
    for result in results("optimizer_state"):
        found = result[gradients, poison]
        assert found["policy"] == policy
        assert found["equal"]  # among the ranks that hold the same shard
        assert found["error"] < 1e-7
        assert found["excluded"] == ((1,) if poison else ())


@pytest.mark.parametrize("gradients", ["shared", "local"])
def test_probe_auto_lr_and_rollback_of_sharded_replicas(results, gradients):
    by_rank = [result[gradients] for result in results("probe")]
    for result in by_rank:
        assert str(result["slopes"]) == str(by_rank[0]["slopes"])
        assert result["gain"] == by_rank[0]["gain"]
        assert result["equal"]
        assert all(map(math.isfinite, result["slopes"][3]))
        assert result["good"] != (1.0,)
        assert result["rollbacks"] == []
        assert result["rolled_back"] == [20]  # one rank's loss, every rank's rollback
        assert result["undone"]
        assert result["state_undone"]
        assert math.isfinite(result["loss"])


def test_a_probe_of_sharded_replicas_sees_what_one_of_whole_models_sees(results):
    """Two replicas of two ranks each under shared gradients: shards, and copies under DDP."""
    for result in results("probe_against_whole_models"):
        (slopes, distance, losses), (reference, reference_distance, reference_losses) = result["hsdp"], result["ddp"]
        assert len(slopes) == len(reference) == 6
        assert all(math.isnan(x) for x in (*slopes[0], *reference[0]))  # there is no probe before a tenth of the run
        for ours, theirs in zip(slopes[1:], reference[1:], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-2, abs=2e-5)
        for ours, theirs in zip(distance + losses, reference_distance + reference_losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_probe_that_fails_on_one_member_raises_on_every_rank(results):
    for rank, result in enumerate(results("probe_failures")):
        late, early = result["after the forward pass"], result["batch"]
        assert late[0] == ("KeyError: 'no such label'" if rank == 3 else
                           "RuntimeError: The probe's loss function failed on rank 3: see there.")  # fmt: skip
        assert early[0] == ("OSError: the disk is gone" if rank == 1 else
                            "RuntimeError: The probe's loss function failed on rank 1: see there.")  # fmt: skip


def test_every_shards_state_resumes_bit_for_bit(results):
    for rank, result in enumerate(results("resume")):
        assert result["equal"]
        assert result["buffers"]
        assert result["gains"][0] == result["gains"][1] != (1.0,)
        for name in ("slopes", "rates"):
            assert result[name][0] == result[name][1]
        assert f"of shard {1 - rank % 2} of 2, and this rank holds shard {rank % 2} of 2" in result["wrong_shard"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("int", "Invalid replicas=3. Must divide the number of ranks, 4"),
        ("zero", "Invalid replicas=0"),
        ("bool", "got bool"),
        ("flattened", 'replicas=mesh["replicate"]'),
        ("fsdp over the world", "over ranks 0, 1, 2, 3, which belong to different replicas"),
        ("fsdp over the world, local", "a learning rate per replica would be one per shard"),
        ("hsdp, replicas forgotten", 'pass replicas=mesh["replicate"]'),
        ("hsdp, group", 'pass replicas=mesh["replicate"]'),
        ("hsdp, wrong axis", 'pass replicas=mesh["replicate"]'),
        ("tensor parallel over the world", "belong to different replicas"),
        ("fsdp1", "fully_shard (FSDP2) instead"),
        ("hook", "has <lambda> already; DDP takes one"),
        ("grouped of one", "every replica is one rank"),
        ("grouped without", "pass the DistributedDataParallel module itself"),
        ("local of several", 'Pass gradients="grouped"'),
        ("find_lr", "Find max_lr with the unsharded model"),
    ],
)
def test_what_cannot_work_is_refused(results, case, message):
    for result in results("refusals"):
        assert message in result[case]


def test_tensor_parallelism_inside_a_replica_is_fine(results):
    assert all(result["tensor parallel inside"] is None for result in results("refusals"))


def test_members_that_disagree_are_named_by_rank(results):
    errors = results("mismatches")
    assert errors == errors[:1] * 4
    assert "spread: 0.1 on rank 0, 1, 2; 0.2 on rank 3" in errors[0]["spread"]
    assert "replicas=: DeviceMesh on rank 0, 1, 2; int on rank 3" in errors[0]["replicas"]
    assert "outer.lr: 1.0 on rank 0, 2, 3; 0.5 on rank 1" in errors[0]["mode"]
    assert errors[0]["none"] is None


def test_the_ranks_of_every_topology(results):
    for rank, result in enumerate(results("topologies")):
        half, parity = rank // 2, rank % 2
        everyone = (0, 1, 2, 3)
        pair = (2 * half, 2 * half + 1)
        across = (parity, parity + 2)
        by_kind = {
            "world": (everyone, (rank,), everyone),
            "int": (everyone, pair, across),
            "one": (everyone, everyone, (rank,)),
            "mesh": (everyone, pair, across),
            "cube": ((0, 2, 1, 3), across, pair),
            "group": (pair, (rank,), pair),
        }
        for kind, (ranks, own, peers) in by_kind.items():
            found = result[kind]
            assert (found["ranks"], found["own"], tuple(found["peers"])) == (ranks, own, peers)
            assert tuple(found["rows"]) == ranks
            assert found["sum"] == sum(peers)
            assert found["writer"] == (rank == ranks[0])
