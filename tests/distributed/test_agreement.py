"""What replicas must have in common, and what happens where they do not: the scenarios of agreement_worker.py."""

import pytest

from hdet.bench.faults import disagreements

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_an_ensemble_built_before_the_process_group_is_noticed_at_the_first_step(launch_agreement):
    for error in launch_agreement.results(2, "built_before_init"):
        assert error.startswith("HdetError: The scheduler was built before torch.distributed.init_process_group()")
        assert "Build it after init_process_group()" in error


@pytest.mark.parametrize("wrapper", ["plain", "static", "compiled", "inside", "nested", "deep"])
def test_find_lr_leaves_ddp_as_it_was_however_it_is_wrapped(launch_agreement, wrapper):
    """Candidates on the ranks end at different times: what shares gradients would wait for ever."""
    results = [of[wrapper] for of in launch_agreement.results(2, "find_lr_of_wrapped_models")]
    assert results[0]["found"] == results[1]["found"]
    assert len(results[0]["found"]) >= 3
    assert all(result["equal"] for result in results)
    assert results[0]["gradients"] == results[1]["gradients"]


def test_find_lr_normalises_each_candidate_by_itself(launch_agreement):
    results = launch_agreement.results(2, "find_lr_of_sync_batch_norm")
    assert results[0] == results[1]
    assert results[0][1] == "SyncBatchNorm"


def test_find_lr_that_fails_on_one_rank_fails_on_all(launch_agreement):
    first, second = launch_agreement.results(2, "find_lr_fails_on_one_rank")
    assert first == "HdetError: find_lr failed on replica 1: see there."
    assert second == "KeyError: 'out of luck'"


def test_find_lr_refuses_a_loss_function_that_calls_the_ddp_module(launch_agreement):
    for error in launch_agreement.results(2, "find_lr_by_way_of_the_ddp_module"):
        assert "Call the model that loss_fn is given" in error


@pytest.mark.parametrize("way", ["patterns", "prefixed", "module", "tensors", "ignored by DDP", "outside"])
def test_what_is_each_ranks_own_is_neither_averaged_nor_compared(launch_agreement, way):
    first, second = (of[way] for of in launch_agreement.results(2, "what_is_each_ranks_own"))
    assert first["expert"][0][0] == pytest.approx(10, abs=0.1)
    assert second["expert"][0][0] == pytest.approx(11, abs=0.1)
    assert (first["queue"], second["queue"]) == ([0.0, 0.0], [1.0, 1.0])
    assert first["momentum"] != second["momentum"]
    assert first["dense"] == second["dense"]
    told = [text for text in first["warnings"] if "not in model=" in text]
    assert len(told) == (way == "outside")
    assert not any("not in model=" in text for text in second["warnings"])


def test_unequal_starts_are_an_error_that_names_the_tensor_and_the_ranks(launch_agreement):
    for result in launch_agreement.results(2, "unequal_starts"):
        assert "weight: other values on replica 1 than on replica 0" in result["error"]
        assert "mask: other values on replica 1 than on replica 0" in result["buffer"]
        for way_out in ("broadcast=True", "exclude=", "same seed"):
            assert way_out in result["error"]


def test_unequal_starts_that_were_asked_for(launch_agreement):
    first, second = launch_agreement.results(2, "unequal_starts")
    assert first["broadcast"] == second["broadcast"]
    assert first["noisy"][0] != second["noisy"][0]
    assert first["noisy"][1] == second["noisy"][1] == ""
    assert first["noisy"][2] == second["noisy"][2]


def test_what_is_loaded_late_is_what_is_compared(launch_agreement):
    for built, resumed, other in launch_agreement.results(2, "loaded_after_it_was_built"):
        assert built == ""
        assert resumed == ""
        assert "start from different weights: weight" in other


def test_different_gradients_under_shared_are_an_error_that_names_one(launch_agreement):
    for error in launch_agreement.results(2, "gradients_that_do_not_fit"):
        assert 'different gradients under gradients="shared": the gradient of weight' in error
        assert 'gradients="local"' in error


def test_parameters_that_share_memory_are_named(launch_agreement):
    for error in launch_agreement.results(2, "a_view_of_a_weight"):
        assert error.startswith("ValueError: The parameters ")
        assert "tied" in error
        assert "weight" in error
        assert "exclude=" in error


def test_a_parameter_frozen_on_one_rank_is_named(launch_agreement):
    for error in launch_agreement.results(2, "frozen_on_one_rank_later"):
        assert "bias: requires_grad True on replica 0; False on replica 1" in error


def test_disagreements_are_named_on_every_rank():
    """A tenth of ``python -m hdet.bench.faults --sections disagreements``."""
    outcome = disagreements.run(0.1, seed=0)
    assert outcome.tried == 7
    assert not outcome.failures
