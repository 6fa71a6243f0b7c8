"""Gradient modes, outer momentum and topology where there is one process: what is accepted, and what is refused."""

import pytest
import torch
from torch import nn

import hdet
from hdet.converge.buckets import fill_buckets
from hdet.converge.outer import OuterMomentum


def build(**settings):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return hdet.Ensemble(optimizer, **({"spread": 0.1, "converge_every": 2, "model": model} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"Invalid outer.momentum=1.0. Must be in \[0, 1\)"),
        ({"lr": 0.0}, "Invalid outer.lr=0.0. Must be > 0"),
    ],
)
def test_a_bad_outer_optimizer_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hdet.Outer(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": "lokal"}, "Invalid gradients='lokal'. Must be one of 'shared', 'grouped', 'local'"),
        ({"outer": hdet.Outer(momentum=0.5)}, r'outer=Outer\(momentum=0.5, lr=1.0\) needs gradients="local"'),
        ({"outer": hdet.Outer(lr=0.5), "gradients": "grouped"}, r'lr=0.5\) needs gradients="local"'),
        (
            {"outer": hdet.Outer(momentum=0.5), "gradients": "local", "averaging": hdet.Averaging(overlap_steps=1)},
            "excludes overlap_steps=1",
        ),
        ({"outer": hdet.Outer(momentum=0.5), "gradients": "local", "spread": 0.0, "model": None}, "needs model="),
        ({"replicas": 2}, "Invalid replicas=2. Must divide the number of ranks, 1"),
    ],
)
def test_bad_settings_are_named_with_their_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"spread": 0.1, "converge_every": 2, "model": model} | settings
    with pytest.raises(ValueError, match=message):
        hdet.OneCycleLR(optimizer, 0.1, total_steps=10, **settings)
    assert "initial_lr" not in optimizer.param_groups[0]  # before anything was changed


@pytest.mark.parametrize("settings", [{"gradients": "local"}, {"gradients": "grouped"}, {"replicas": 1}])
def test_one_process_may_have_any_mode(settings):
    ensemble = build(**settings)
    for _ in range(4):
        ensemble.step(1.0)
    assert ensemble.replicas.members == 1


def test_the_outer_step_follows_its_equations():
    parameter = torch.zeros(5, dtype=torch.float64)
    outer = OuterMomentum(0.5, 0.7)
    anchor = velocity = None
    for mean in (1.0, 3.0, 2.0, 2.5):
        parameter.fill_(mean)
        outer.step(fill_buckets([parameter], 16, lambda t: t.device))
        if anchor is None:
            anchor, velocity = mean, 0.0
        else:
            displacement = anchor - mean
            velocity = 0.5 * velocity + displacement
            anchor -= 0.7 * (displacement + 0.5 * velocity)
        assert parameter.tolist() == pytest.approx([anchor] * 5)
    outer.restart()
    parameter.fill_(9.0)
    outer.step(fill_buckets([parameter], 16, lambda t: t.device))
    assert parameter.tolist() == [9.0] * 5


def test_another_size_of_bucket_is_refused_by_a_saved_outer_state():
    parameter = torch.zeros(5)
    outer = OuterMomentum(0.5, 0.7)
    outer.step(fill_buckets([parameter], 16, lambda t: t.device))
    with pytest.raises(RuntimeError, match="bucket_mib"):
        outer.step(fill_buckets([parameter], 1000, lambda t: t.device))
