"""Who owns the optimizer and the model: learning rates by hand, handing over, loading, freezing, other optimizers."""

import math

import pytest
import torch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_tensor_that_groups_share_is_multiplied_once(launch_ownership):
    for result in launch_ownership.results(2, "shared_tensor"):
        for rates, multiplier in result.values():
            assert rates == pytest.approx([0.1 * multiplier] * 2)


def test_a_learning_rate_written_by_hand_becomes_the_base(launch_ownership):
    written = {"x": lambda base: 1e-4, "y": lambda base: base / 2, "third": lambda base: base / 3}
    written["digits"] = lambda base: 3.14159e-3
    ranks = launch_ownership.results(2, "by_hand")
    for key in ranks[0]:
        _, at, write, schedule = key
        for result in ranks:
            base, soon, later, own = result[key]
            new = written[write](base)
            expected = {"constant": (new, new), "chained": (new * 0.9, new * 0.9**5)}.get(schedule)
            if schedule == "closed":  # the schedule's next step overwrites it, as in torch
                expected = 0.01 * 0.9 ** (at + 1), 0.01 * 0.9 ** (at + 5)
            if write in ("x", "y") or schedule == "closed" or at == 3:
                assert soon == pytest.approx(expected[0], rel=1e-4), key
            assert later == pytest.approx(expected[1], rel=1e-4), key  # after the next converge in any case
            assert own == pytest.approx(later, rel=1e-5), key
        assert len({result[key][2] for result in ranks}) == 1


def test_a_tensor_that_groups_share_may_be_written_by_hand(launch_ownership):
    for found in launch_ownership.results(2, "a_shared_tensor_by_hand"):
        assert found == [None] * 12


def test_learning_rates_written_unlike_are_an_error_on_every_rank(launch_ownership):
    for one, unlike in launch_ownership.results(2, "by_hand_unlike"):
        assert one[0] == unlike[0] == "ReplicaMismatchError"
        assert "written by hand: group0 on replica 0; None on replica 1" in one[1]
        assert "group0 was written by hand, and not alike" in unlike[1]
        assert "1, 2" in unlike[1]


def test_after_the_last_converge_the_optimizer_has_the_base_learning_rate(launch_ownership):
    ranks = launch_ownership.results(2, "after_the_last_converge")
    for result in ranks:
        rates, base = result["ended"]
        assert rates == base
        weights, live, saved = result["swa"]
        assert live == [0.02]
        assert saved == 0.02
        assert same(weights, ranks[0]["swa"][0])
        assert same(result["after"], ranks[0]["after"])


def test_converging_puts_learning_rates_aside_for_the_time_between_steps_only(launch_ownership):
    for runs in launch_ownership.results(2, "converge_changes_nothing_else"):
        for plain, evaluated in (runs[:2], runs[2:]):
            assert same(plain[0], evaluated[0])
            assert plain[1:2] == evaluated[1:2]


def test_closing_hands_everything_back(launch_ownership):
    ranks = launch_ownership.results(2, "closing")
    for result in ranks:
        assert not same(ranks[0]["apart"], ranks[1]["apart"])
        assert same(result["together"], ranks[0]["together"])
        assert same(result["synchronised"], ranks[0]["synchronised"])
        assert result["rates"] == [0.01]
        assert result["dropout"] == pytest.approx(0.2)
        assert [error[0] for error in result["errors"]] == ["RuntimeError"] * 3
        assert all("closed" in error[1] for error in result["errors"])
        assert result["converge"] is None
        assert result["hooks"] == 0
        assert "closed" in result["written"][1]
        assert result["second"] == (False, pytest.approx(0.01))
        assert result["both"] is True
        weights, rates, error = result["with"]
        assert same(weights, ranks[0]["with"][0])
        assert rates == ranks[0]["with"][1]
        assert "closed" in error[1]
    rates, error = ranks[0]["failed"]
    assert rates == [0.01]
    assert "closed" in error[1]


def test_the_next_ensemble_begins_from_base_and_centres(launch_ownership):
    for base, own, centres in launch_ownership.results(2, "next_ensemble"):
        assert base == [0.01 * 0.5**4]
        assert own == pytest.approx(base[0])
        assert centres == {"weight_decay": pytest.approx(0.1)}


def test_a_warm_up_resumes_exactly(launch_ownership):
    for result in launch_ownership.results(2, "resumed_warm_up"):
        for key, (uninterrupted, resumed) in result.items():
            assert uninterrupted == resumed, key


def test_converging_in_inference_mode_is_converging(launch_ownership):
    for plain, evaluated in launch_ownership.results(2, "inference"):
        assert same(plain, evaluated)


def test_weights_loaded_in_a_run_are_what_it_goes_on_from(launch_ownership):
    for result in launch_ownership.results(2, "loaded"):
        for key, (late, fresh) in result.items():
            assert same(late, fresh), key


def test_other_parameters_of_the_same_size_are_not_taken_for_the_old_ones(launch_ownership):
    ranks = launch_ownership.results(2, "frozen")
    for result in ranks:
        for name, (moved, weights) in result.items():
            assert max(moved) < 1e-2, name
            assert moved[:2] == [0, 0]
            assert max(moved[2:]) > 0
            assert same(weights, ranks[0][name][1])


def test_virtual_replicas_follow_what_is_loaded_and_released(launch_ownership):
    for result in launch_ownership.results(2, "virtual"):
        for key, points in result.items():
            if key[0] == "load":
                for weight, bias in points:
                    assert torch.equal(weight, torch.full((1, 3), 9.0)), key
                    assert bias.item() == 0
        for step in range(7):
            first, second = result["release", step]
            # At the first step of each round, of 4 steps, all are at one point.
            assert torch.equal(first[0], second[0]) == (step % 4 == 0)
            assert torch.equal(first[1], second[1]) == (step < 3 or step == 4), step


def test_state_in_parameter_groups_converges_like_state(launch_ownership):
    ranks = launch_ownership.results(2, "state_in_groups")
    for key in ranks[0]:
        (inside, after, groups, weights), (inside1, after1, groups1, weights1) = (result[key] for result in ranks)
        assert same(weights, weights1), key
        assert inside != inside1, key
        if key[1] == "keep":
            assert after != after1, key
            continue
        assert after == after1, key
        assert math.isfinite(after)
        assert {k for k in groups[0] if groups[0][k] != groups1[0][k]} <= {"lr", "d_hat", "d_denom", "scheduled_lr"}, (
            key
        )


def test_optimizers_that_cannot_work_are_refused_before_anything_changes(launch_ownership):
    for result in launch_ownership.results(2, "refused"):
        for (kind, message), rates in result["zero"]:
            assert kind == "ValueError"
            assert "ZeroRedundancyOptimizer" in message
            assert 'replicas=mesh["replicate"]' in message
            assert rates == [0.1]
        (kind, message), rates = result["post"]
        assert "PostLocalSGDOptimizer" in message
        assert rates == [0.01]
        assert result["join"][0] == "ValueError"
        assert "join()" in result["join"][1]
        assert "drop_last" in result["join"][1]
        own, multiplier = result["accelerate"]
        assert own == pytest.approx(multiplier)
        assert result["accelerate schedule"] is None


def test_saving_between_converges_says_what_differs(launch_ownership):
    for rank, result in enumerate(launch_ownership.results(2, "saving_apart")):
        for name, (messages, files, logged) in result.items():
            if name == "nothing":
                assert messages == logged == []
                continue
            (message,), (file,) = messages, files
            assert name in message
            assert "2 steps" in message
            assert "hdet/ensemble" not in file
            assert logged == ([message] if rank == 0 else [])
