"""exclude=: names, tensors and modules."""

import pytest
import torch
from torch import nn

import hdet
from hdet.model import Exclusion, weights_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.expert = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.tied = self.expert[0].weight
        self.register_buffer("queue", torch.zeros(2))


def names(given, model=None):
    model = model or Net()
    given = given(model) if callable(given) else given
    return {slot.name for slot in weights_of((model,), Exclusion((model,), given)).slots()}


DENSE = {"dense.weight", "dense.bias"}


@pytest.mark.parametrize(
    "given",
    [
        ["expert.*", "queue"],
        "[eq]*",
        ["module.expert.*", "module.queue"],
        lambda model: [model.expert, model.queue],
        lambda model: (model.expert, "queue"),
    ],
)
def test_names_tensors_and_modules(given):
    assert names(given) == DENSE  # and not the tied weight, wherever it stands


def test_what_wraps_the_model_does_not_matter():
    model = Net()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        for given in ("expert.*", "module.expert.*"):
            kept = {slot.name for slot in weights_of((wrapped,), Exclusion((wrapped,), given)).slots()}
            assert kept == {*DENSE, "queue"}


def test_a_tensor_that_is_replaced_stays_excluded():
    model = Net()
    weights = weights_of((model,), Exclusion((model,), ["expert.*", "queue"]))
    model.queue = torch.ones(5)
    model.expert[0].bias = nn.Parameter(torch.ones(3))
    assert {slot.name for slot in weights.slots() if slot.name != "tied"} == DENSE
    assert len(list(weights.tensors())) == 2


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("expertt.*", "Did you mean 'expert."),
        ("expert", "pass 'expert.*'"),
        ("dense.weigth", "Did you mean 'dense.weight'"),
        (torch.ones(3), "no parameter or buffer"),
        (nn.Linear(2, 2), "Linear that has no parameter"),
    ],
)
def test_what_matches_nothing_is_an_error(given, hint):
    with pytest.raises(ValueError, match=hint.replace("*", r"\*")):
        names([given])


@pytest.mark.parametrize("given", [1, None, [1], {"a": 1}])
def test_what_is_no_pattern_is_an_error(given):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="exclude="):
        hdet.Ensemble(optimizer, model=model, exclude=given)


def test_something_must_be_left():
    model = Net()
    with pytest.raises(ValueError, match="leaves nothing"):
        hdet.Ensemble(torch.optim.SGD(model.parameters(), lr=0.1), model=model, exclude="*")


def test_what_ddp_was_told_to_ignore():
    model = Net()
    model._ddp_params_and_buffers_to_ignore = ["queue", "expert.0.bias"]
    assert names((), model) >= DENSE
    assert not names((), model) & {"queue", "expert.0.bias"}
    outer = nn.ModuleDict({"net": model})
    assert not names((), outer) & {"net.queue", "net.expert.0.bias"}


def test_parameters_of_the_optimizer_outside_the_model_may_be_named():
    model, outside = Net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    hdet.Ensemble(optimizer, model=model, exclude=[outside])
    hdet.Ensemble(optimizer, model=model, exclude=nn.ParameterList([outside]))
