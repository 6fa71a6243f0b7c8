"""Sharded models: torch.distributed.checkpoint, accelerate and the Trainer, 4 processes: read from the scenarios of
dcp_worker.py."""

import re

import pytest
import torch

import hdet
from hdet.integrations.dcp import Checkpointed
from hdet.model.weights import Weights, register_weights

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(launch_worker):
    return lambda scenario: launch_worker("dcp_worker.py").results(4, scenario)


@pytest.mark.parametrize("kind", ["one cycle", "ensemble", "outer"])
def test_a_run_loaded_by_dcp_is_the_uninterrupted_one(results, kind):
    for found in (result[kind] for result in results("saves_and_loads")):
        assert found["equal"]
        assert found["reports"]
        assert found["averages"]
        assert found["not zero"]


@pytest.mark.parametrize("kind", ["one cycle", "ensemble", "outer"])
def test_the_state_has_one_structure_on_every_rank_and_at_every_time(results, kind):
    """Before the first round, and in the third: tensors that are placed as the parameters are, and one leaf more, which
    is the same on every rank."""
    for found in (result[kind] for result in results("saves_and_loads")):
        assert found["structure"]
        assert found["structures"] == 1
        assert found["plain"] == 1
        assert found["kinds"] == ["DTensor", "b"]


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_it_loads_onto_another_number_of_shards(results, shape):
    for found in (result[shape] for result in results("another_number_of_shards")):
        assert found["averages"]
        assert found["weights"]
        assert found["gains"]
        assert (found["step"], found["end"]) == (10, 16)
        assert found["equal"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kind", "Invalid scheduler=.*LambdaLR.* Must be an hdet.OneCycleLR or hdet.Ensemble"),
        ("no probe", "has slow_average, which this run has not. Build the scheduler with the probe="),
        ("wider", r"Invalid slow_average\['0.weight'\] of shape \(9, 6\). Must have the parameter's shape, \(8, 6\)"),
        ("lost", "2.bias"),
        ("plain", "Invalid plain=1. Must be bytes"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_on_every_rank(results, what, said):
    for result in results("refusals"):
        assert result[what] is not None
        assert re.search(said, result[what]), result[what]
        assert result["unchanged"] == (0, 0)


def test_a_deepspeed_engine_is_refused():
    """Its weights are not the modules' own."""

    class Elsewhere(Weights):
        pass

    model = torch.nn.Linear(2, 2)
    weights = Elsewhere([model])
    weights.whole = True
    register_weights(model, weights)
    ensemble = hdet.Ensemble(torch.optim.SGD(model.parameters(), lr=0.1), model=model, spread=0.1, converge_every=2)
    with pytest.raises(ValueError, match=r"Use hdet\.integrations\.deepspeed\.save_checkpoint"):
        Checkpointed(ensemble)


def test_a_head_of_fewer_rows_than_members_is_measured_and_saved(results):
    """The members measured different numbers of matrices, since two empty shards have one address, and sent messages of
    different lengths: gloo ended the processes."""
    by_rank = results("a_head_that_only_one_member_holds")
    assert [result["empty"] for result in by_rank] == [False, True, False, True]
    for result in by_rank:
        assert result["movement"] == by_rank[0]["movement"]
        assert all(movement > 0 for (movement,) in result["movement"])
        assert result["kept"]
        assert result["shapes"] == {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,)}


def test_fsdp2_through_accelerate_resumes_with_its_probe(results):
    for result in results("through_accelerate"):
        assert result["equal"]
        assert result["same on all"]
        assert result["sharded"]
        assert result["kept"] == 4


def test_fsdp2_through_the_trainer_resumes_with_its_probe(results):
    for result in results("through_the_trainer"):
        assert result["equal"]
        assert result["same on all"]
        assert result["sharded"]
        assert result["steps"] == (12, 12)
