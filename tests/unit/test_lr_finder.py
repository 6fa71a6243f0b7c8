"""find_lr, with one replica."""

import math

import pytest
import torch
from torch import nn

import hdet


def regression():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 1, generator=generator)

    def batches():
        while True:
            x = torch.randn(32, 8, generator=generator)
            yield x, x @ weights

    return model, batches(), lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1])


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e3])
def test_find_lr_finds_the_edge_of_a_quadratic_from_anywhere(start):
    """The inputs' covariance is the identity: gradient descent is fastest at 0.5, diverges from about 1 on."""
    model, batches, loss_fn = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=start)
    before = [p.detach().clone() for p in model.parameters()]
    found = hdet.find_lr(model, optimizer, loss_fn, batches)
    assert 0.1 <= found.max_lr <= 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == start
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert len(found.lrs) == len(found.losses)
    assert list(found.lrs) == sorted(found.lrs)


def test_find_lr_sees_through_noise_that_the_loss_draws():
    found = []
    for noise in (0.0, 1000.0):
        model, batches, loss_fn = regression()

        def noisy(m, batch, loss_fn=loss_fn, noise=noise):
            return loss_fn(m, batch) + noise * torch.rand(())

        found.append(hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), noisy, batches))
    assert found[0].max_lr == found[1].max_lr
    torch.testing.assert_close(found[1].errors[:4], found[0].errors[:4], atol=1e-3, rtol=0)


def test_find_lr_distrusts_what_a_dead_net_gains_by_chance(monkeypatch):
    """It gains most at 10, nothing at the next lower rate: then it was not the learning rate."""
    change = {0.001: -0.1, 0.01: -0.2, 0.1: -0.3, 1.0: -0.1, 10.0: -0.5, 4.64: 0.1, 0.0464: -0.2, 0.215: -0.29}
    monkeypatch.setattr(
        hdet.steer.lr_finder._Search,
        "_try",
        lambda self, lr: hdet.steer.lr_finder._Trial(change[min(change, key=lambda x: abs(math.log(x / lr)))], 0.05),
    )
    model, batches, loss_fn = regression()
    found = hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, batches, low=1e-3, high=10.0)
    assert found.lrs == pytest.approx(sorted(change), rel=0.01)
    assert found.max_lr == pytest.approx(0.215, rel=0.01)  # the largest that gains almost as much as the best


@pytest.mark.parametrize(
    ("error", "lower", "found_lr"),
    [
        (0.05, -0.2, 0.2),  # twice the best one, 0.1
        (0.2, -0.2, 0.1),  # inconclusive
        (0.05, -0.285, 0.02),  # the next lower one is almost as good
    ],
)
def test_find_lr_for_auto_lr_is_coarse_and_begins_above_what_is_conclusive(monkeypatch, error, lower, found_lr):
    change = {0.001: -0.1, 0.01: lower, 0.1: -0.3, 1.0: -0.1, 10.0: 0.1}
    monkeypatch.setattr(
        hdet.steer.lr_finder._Search,
        "_try",
        lambda self, lr: hdet.steer.lr_finder._Trial(change[min(change, key=lambda x: abs(math.log(x / lr)))], error),
    )
    for_replicas = hdet.steer.lr_finder.head_start
    monkeypatch.setattr(
        hdet.steer.lr_finder, "head_start", lambda _, conclusive: for_replicas(4, conclusive=conclusive)
    )
    model, batches, loss_fn = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = hdet.find_lr(model, optimizer, loss_fn, batches, low=1e-3, high=10.0, auto_lr=True)
    assert found.lrs == pytest.approx(sorted(change))
    assert found.max_lr == pytest.approx(found_lr)


def test_find_lr_takes_more_steps_where_what_lies_between_belies_the_best(monkeypatch):
    """Two neighbours lower the loss, and between them nothing does: by chance, and nobody is credible any more."""

    def trial(self, lr):
        helps = round(lr, 5) in (0.01, 0.1) if self._steps == 40 else lr < 0.11
        return hdet.steer.lr_finder._Trial(-lr if helps else 0.1, 0.001)

    monkeypatch.setattr(hdet.steer.lr_finder._Search, "_try", trial)
    model, batches, loss_fn = regression()
    found = hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, batches, low=1e-3, high=10.0)
    assert (found.steps, found.max_lr) == (80, pytest.approx(0.1))


def test_find_lr_says_when_nothing_stands_out_of_the_noise(monkeypatch, caplog):
    """Targets that are noise: whatever a candidate gains on a few batches, it is by chance."""
    model, batches, loss_fn = regression()
    found = hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, batches)
    assert found.conclusive
    assert not caplog.text
    best = found.losses.index(min(found.losses))
    assert 0 < found.errors[best] < (found.start_loss - found.losses[best]) / 3
    assert found.errors[-1] == math.inf  # it diverged

    def noise():
        for x, _ in batches:
            yield x, torch.randn(len(x), 1, generator=torch.Generator().manual_seed(int(1e6 * x[0, 0].abs())))

    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    found = hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, noise())
    assert not found.conclusive
    assert "no learning rate lowered the loss" in caplog.text


def test_find_lr_takes_more_steps_where_a_plateau_hides_the_slope():
    """The loss begins to fall where the parameter passes 1: both candidates are there after forty steps."""
    model = nn.Module()
    model.register_parameter("weight", weight := nn.Parameter(torch.zeros(1)))

    def loss_fn(m, batch):
        slope = m.weight - m.weight.detach()  # 0, with a gradient of 1
        return batch - slope.sum() - (m.weight.detach() - 1).clamp(min=0).sum()

    found = hdet.find_lr(
        model, torch.optim.SGD([weight], lr=1.0), loss_fn, [torch.tensor(1.0)], low=0.05, high=0.1, steps=10
    )
    assert found.steps == 40
    assert found.max_lr == pytest.approx(0.1)
    assert weight.item() == 0


def test_find_lr_plots(tmp_path):
    model, batches, loss_fn = regression()
    found = hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, batches, steps=10)
    found.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_find_lr_puts_everything_back_when_the_loss_function_raises():
    model, batches, loss_fn = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing(m, batch):
        calls.append(1)
        if len(calls) == 30:
            raise KeyError("x")
        return loss_fn(m, batch)

    with pytest.raises(KeyError):
        hdet.find_lr(model, optimizer, failing, batches)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"low": 0}, "low"), ({"low": 2.0, "high": 1.0}, "low"), ({"steps": 3}, "steps"), ({"high": math.inf}, "high")],
)
def test_find_lr_refuses_bad_arguments(arguments, message):
    model, batches, loss_fn = regression()
    with pytest.raises(ValueError, match=message):
        hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_fn, batches, **arguments)


def test_find_lr_says_when_nothing_helps_and_when_there_is_no_data():
    model, batches, _ = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(hdet.HdetError, match="lowered the loss"):
        hdet.find_lr(model, optimizer, lambda m, batch: 0 * m(batch[0]).sum() + 1.0, batches)
    with pytest.raises(ValueError, match="empty"):
        hdet.find_lr(model, optimizer, lambda m, batch: m(batch).sum(), [])


def test_max_lr_auto_is_find_lr():
    model, batches, loss_fn = regression()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}], lr=0.2)
    scheduler = hdet.OneCycleLR(
        optimizer,
        "auto",
        total_steps=100,
        cycle_momentum=False,
        model=model,
        probe=hdet.Probe(loss_fn=loss_fn, batches=batches),
        auto_lr=True,
        spread=0.1,
    )
    weight, bias = (group["max_lr"] for group in optimizer.param_groups)
    assert weight == pytest.approx(0.1) or weight == pytest.approx(1)  # coarse: the controller goes on from there
    assert bias == pytest.approx(weight / 10)
    assert scheduler.ensemble is not None
    with pytest.raises(ValueError, match="needs model"):
        hdet.OneCycleLR(optimizer, "auto", total_steps=100)
