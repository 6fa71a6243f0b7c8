"""find_lr leaves the world as it was, and says what it cannot train."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hdet


def loss_fn(model, x):
    return (model(x) - 1).square().mean()


def data():
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def find(model, optimizer, batches=None, function=loss_fn):
    batches = torch.utils.data.DataLoader(data(), 8, shuffle=True) if batches is None else batches
    return hdet.find_lr(model, optimizer, function, batches, low=1e-3, high=1.0)


def test_random_number_generators_are_as_they_were():
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(data(), 8, shuffle=True, generator=generator)

    def noisy(model, x):
        return loss_fn(model, x) + 1e-3 * (random.random() + np.random.rand() + torch.rand(()))  # noqa: NPY002

    def states():
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), generator.get_state()]  # noqa: NPY002

    for batches in (loader, torch.utils.data.DataLoader(data(), 8, shuffle=True)):
        model = nn.Linear(3, 1)
        before = states()
        find(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, noisy)
        after = states()
        assert before[:2] == after[:2]
        assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))


class Counting(torch.optim.SGD):
    """Keeps state in its parameter groups and in itself, as Prodigy does."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.calls = 0
        for group in self.param_groups:
            group["d"], group["k"] = torch.ones(()), 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["d"].mul_(1.5)
            group["k"] += 1
            group["new"] = 1
        return super().step(closure)


class Moody(nn.Module):
    """Changes itself in every forward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.seen = nn.Linear(3, 1), 0, torch.zeros(2)
        self.register_buffer("last", None)
        self.register_buffer("running", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = x.detach().mean(0)
        self.running = self.running + 1
        self.inner.train(not self.inner.training)
        return self.inner(x)


def test_the_optimizers_groups_and_the_models_attributes_are_as_they_were():
    model = Moody()
    running = model.running
    optimizer = Counting(model.parameters(), lr=0.1)
    d = optimizer.param_groups[0]["d"]
    find(model, optimizer)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["k"], float(group["d"])) == (0.1, 0, 1.0)
    assert group["d"] is d
    assert "new" not in group
    assert optimizer.calls == 0
    assert (model.calls, model.seen.tolist(), model.last) == (0, [0.0, 0.0], None)
    assert model.running is running
    assert running.tolist() == [0.0] * 3
    assert model.inner.training


def test_gradients_and_hooks_are_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    frozen, head = model[0].bias.requires_grad_(False), model[1].bias
    frozen.grad = torch.ones(3)
    model[0].weight.grad = torch.full((3, 3), 2.0)
    optimizer = torch.optim.SGD([model[0].weight, model[1].weight, frozen], lr=0.1)
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("gradient"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    kept = model[0].weight.grad
    find(model, optimizer)
    assert not seen
    assert model[0].weight.grad is kept
    assert kept.tolist() == torch.full((3, 3), 2.0).tolist()
    assert frozen.grad.tolist() == [1.0] * 3
    assert model[1].weight.grad is None
    assert head.grad is None  # trained by another optimizer
    optimizer.step()
    assert seen == ["step"]


def test_a_scheduler_built_later_sees_no_step(recwarn):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    find(model, optimizer)
    assert not getattr(optimizer, "_opt_called", False)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        schedule.step()


@pytest.mark.parametrize("rates", [[0.0], [0.0, 0.0]])
def test_learning_rates_that_are_all_zero_are_refused(rates):
    model = nn.Linear(3, 1)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=False)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"learning rates \[0.0.*not all 0"):
        find(model, optimizer)


def test_one_learning_rate_of_zero_stays_zero():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.0}])
    assert find(model, optimizer).max_lr > 0


def test_an_optimizer_that_needs_a_closure_is_refused_by_name():
    model = nn.Linear(3, 1)
    with pytest.raises((ValueError, TypeError), match=r"LBFGS.*closure"):
        find(model, torch.optim.LBFGS(model.parameters()))


def test_reentrant_checkpoints_are_refused_by_name():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for reentrant in (True, False):

        def run(m, x, reentrant=reentrant):
            x = x.clone().requires_grad_(torch.is_grad_enabled())
            return (checkpoint(m, x, use_reentrant=reentrant) - 1).square().mean()

        if reentrant:
            with (
                pytest.raises(hdet.HdetError, match="use_reentrant=False"),
                pytest.warns(UserWarning, match="None of the inputs have requires_grad"),  # in the evaluation
            ):
                find(model, optimizer, function=run)
        else:
            assert find(model, optimizer, function=run).max_lr > 0


def test_one_replica_is_told_that_it_learns_nothing(caplog):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ensemble = hdet.Ensemble(
        optimizer, model=model, spread=0.1, converge_every=2, auto_lr=True, controller=hdet.controller.Published()
    )
    for _ in range(6):
        optimizer.step()
        ensemble.step(1.0)
    told = [record.message for record in caplog.records if "there is 1 replica" in record.message]
    assert len(told) == 1
    assert "torchrun" in told[0]
