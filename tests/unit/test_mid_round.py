"""Watching a model costs nothing elsewhere: copies, files and compiled models."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from hdet.model import MidRoundWatch


class Owner:
    steps = 3

    def apart(self):
        return self.steps


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh())


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.WARNING, "hdet")
    return lambda: [record.message for record in caplog.records]


def test_copies_and_files_of_a_watched_model_say_nothing_and_compute_the_same(heard):
    owner, model = Owner(), net().eval()
    watch = MidRoundWatch([model], owner.apart)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.ones(1, 2)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        found = [one(x) for one in copies]
        for one in copies:
            one.state_dict()
        assert heard() == []
        assert all(torch.equal(one, model(x)) for one in found)
    assert len(heard()) == 1
    watch.close()


def test_what_compiles_a_watched_model_finds_nothing_to_do(heard):
    owner, model = Owner(), net().eval()
    watch = MidRoundWatch([model], owner.apart)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.ones(1, 2)
    with torch.no_grad():
        assert torch.equal(compiled(x), model[1](model[0](x)))
    assert len(graphs) == 1
    assert heard() == []  # a documented limit
    wrapped = MidRoundWatch([compiled], owner.apart)
    with torch.no_grad():
        compiled(x)
    assert len(heard()) == 1
    for one in (watch, wrapped):
        one.close()


def test_it_keeps_nobody_alive(heard):
    owner, model = Owner(), net().eval()
    watch = MidRoundWatch([model], owner.apart)
    del owner
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert heard() == []
    del watch
    with torch.no_grad():
        model(torch.ones(1, 2))
    model.state_dict()
    assert heard() == []
