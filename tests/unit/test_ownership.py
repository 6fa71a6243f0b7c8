"""One process: who owns the optimizer and the model. With several processes: tests/distributed/test_ownership.py."""

import copy
import io
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_lr

import hdet
from hdet.model.optimizers import group_state, inside
from hdet.model.snapshot import Snapshot

SPREAD = {"spread": 0.3, "converge_every": 4}
SCHEDULES = {
    "StepLR": lambda o: torch_lr.StepLR(o, 3, 0.5),
    "ExponentialLR": lambda o: torch_lr.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: torch_lr.CosineAnnealingLR(o, 20, 0.01),
    "LinearLR": lambda o: torch_lr.LinearLR(o, 0.1, 1, 5),
    "LambdaLR": lambda o: torch_lr.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: torch_lr.MultiplicativeLR(o, lambda t: 0.9),
    "CosineAnnealingWarmRestarts": lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 5),
    "PolynomialLR": lambda o: torch_lr.PolynomialLR(o, 20),
    "CyclicLR": lambda o: torch_lr.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "SequentialLR": lambda o: torch_lr.SequentialLR(
        o, [torch_lr.LinearLR(o, 0.1, 1, 5), torch_lr.CosineAnnealingLR(o, 15)], [5]
    ),
    "ChainedScheduler": lambda o: torch_lr.ChainedScheduler(
        [torch_lr.LinearLR(o, 0.1, 1, 5), torch_lr.ExponentialLR(o, 0.9)]
    ),
    "none": lambda o: None,
}


def build(lr=0.1, kind=torch.optim.SGD, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return model, kind([{"params": layer.parameters()} for layer in model], lr=lr, **more)


def with_gain(gain, optimizer, schedule, model):
    """An ensemble whose controller has arrived at ``gain``."""
    ensemble = hdet.Ensemble(optimizer, schedule, model=model, **SPREAD)
    state = copy.deepcopy(ensemble.state_dict())
    state["controller"][0][0] = gain
    ensemble.load_state_dict(state)
    return ensemble


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def step(optimizer, scheduler):
    optimizer.step()
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()


@pytest.mark.parametrize("write", ["nothing", "base", "factor"])
@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_torchs_times_the_gain(name, is_tensor, write):
    """With one tensor for both groups, and with learning rates written by hand."""
    lr = torch.tensor(0.1) if is_tensor else 0.1
    (model, ours), (_, theirs) = build(copy.deepcopy(lr)), build(copy.deepcopy(lr))
    schedule = SCHEDULES[name](theirs)
    ensemble = with_gain(2.0, ours, SCHEDULES[name](ours), model)
    for i in range(12):
        assert rates(ours) == pytest.approx([2 * lr for lr in rates(theirs)], rel=1e-5)
        if write != "nothing" and i in (3, 4):
            for optimizer, new in ((ours, 2e-3), (theirs, 1e-3)):
                for group in optimizer.param_groups[: 1 if is_tensor else 2]:
                    if is_tensor:
                        group["lr"].fill_(new) if write == "base" else group["lr"].mul_(0.5)
                    else:
                        group["lr"] = new if write == "base" else group["lr"] * 0.5
        if i == 6:
            ensemble.converge()
            assert rates(ours) == pytest.approx(rates(theirs), rel=1e-5)
            assert [float(lr) for lr in ensemble.get_last_lr()] == pytest.approx([2 * lr for lr in rates(theirs)])
        step(ours, ensemble)
        step(theirs, schedule)


def test_what_a_closed_form_overwrites_is_said_once(caplog):
    model, optimizer = build()
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, model=model, cycle_momentum=False, **SPREAD)
    with caplog.at_level(logging.WARNING, "hdet"):
        for _ in range(3):
            step(optimizer, scheduler)
            optimizer.param_groups[1]["lr"] = 1e-3
    assert [record.getMessage().partition(". OneCycleLR")[0] for record in caplog.records] == [
        "The learning rate of parameter group 1 was written by hand"
    ]
    expected = torch_lr.OneCycleLR(build()[1], 0.1, 20, cycle_momentum=False)
    for _ in range(4):
        step(expected.optimizer, expected)
    step(optimizer, scheduler)
    assert rates(optimizer) == rates(expected.optimizer)


def test_the_saved_learning_rate_is_the_base_or_what_another_has_written():
    model, optimizer = build(torch.tensor(0.1))
    optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"]  # its memory, too
    ensemble = with_gain(2.0, optimizer, None, model)
    saved = optimizer.state_dict()["param_groups"]
    assert [float(group["lr"]) for group in saved] == pytest.approx([0.1, 0.1])
    assert float(saved[0]["initial_lr"]) == pytest.approx(0.1)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(optimizer.state_dict()["param_groups"][0]["lr"]) == 0.5
    ensemble.close()
    optimizer.param_groups[0]["lr"].fill_(0.3)
    assert float(optimizer.state_dict()["param_groups"][1]["lr"]) == pytest.approx(0.3)


def test_groups_that_share_a_tensor_have_one_multiplier():
    model, optimizer = build(torch.tensor(0.1))
    with pytest.raises(ValueError, match="groups 0 and 1 share one tensor"):
        hdet.Ensemble(optimizer, None, model=model, per_group=True, **SPREAD)
    assert rates(optimizer) == pytest.approx([0.1, 0.1])
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"].clone()
    hdet.Ensemble(optimizer, None, model=model, per_group=True, **SPREAD)


@pytest.mark.parametrize("settings", [{}, {"model": True, **SPREAD}])
def test_a_closed_scheduler_says_so(settings):
    model, optimizer = build()
    settings = settings | ({"model": model} if settings else {})
    with hdet.OneCycleLR(optimizer, 0.1, 20, cycle_momentum=False, **settings) as scheduler:
        step(optimizer, scheduler)
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.step()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.__enter__()
    assert "_is_closed" not in scheduler.state_dict()
    later = torch_lr.ExponentialLR(optimizer, 0.5)
    before = rates(optimizer)
    step(optimizer, later)
    assert rates(optimizer) == [lr * 0.5 for lr in before]


def test_it_is_no_part_of_another_scheduler():
    model, optimizer = build()
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, model=model, cycle_momentum=False, **SPREAD)
    with pytest.raises(TypeError, match=r"hdet.Ensemble\(optimizer, SequentialLR"):
        torch_lr.SequentialLR(optimizer, [scheduler, torch_lr.LinearLR(optimizer)], [5])


def test_a_compiled_step_brings_the_learning_rates_back():
    ends = []
    for evaluates in (False, True):
        model, optimizer = build(torch.tensor(0.1), weight_decay=0.1)
        ensemble = with_gain(2.0, optimizer, torch_lr.ExponentialLR(optimizer, 0.9), model)
        compiled = torch.compile(lambda: optimizer.step(), backend="eager")  # noqa: B023
        for _ in range(6):
            model(torch.ones(2, 3)).square().mean().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled()
                ensemble.step()
            optimizer.zero_grad()
            if evaluates:
                ensemble.converge()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_copies_of_a_watched_model_need_no_hdet():
    model, optimizer = build()
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, model=model, virtual_replicas=2, cycle_momentum=False, **SPREAD)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"hdet" not in file.getvalue()
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        other.load_state_dict(model.state_dict())
    scheduler.close()
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


class Keeping(torch.optim.SGD):
    """Keeps a number in its groups, as Prodigy does."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["d"] = 1.0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["d"] += 1.0


def test_state_in_groups_is_known_and_restored():
    _, optimizer = build(kind=Keeping)
    assert group_state(optimizer) == [["d"], ["d"]]
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Muon, torch.optim.RMSprop):
        plain = kind([nn.Parameter(torch.ones(2, 2))], lr=0.1)
        torch_lr.OneCycleLR(plain, 0.1, 20, cycle_momentum=False)
        assert group_state(plain) == [[]], kind
    snapshot = Snapshot([], optimizer)
    snapshot.take()
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 2.0
    snapshot.restore()
    assert [group["d"] for group in optimizer.param_groups] == [1.0, 1.0]


class Wrapper(torch.optim.Optimizer):
    """Never calls Optimizer.__init__()."""

    def __init__(self, within):
        self.optimizer = within

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Other:
    def __init__(self, within):
        self.base, self.param_groups = within, within.param_groups


def test_the_optimizer_inside_a_wrapper():
    model, optimizer = build()
    assert inside(Wrapper(Wrapper(optimizer))) is optimizer
    for wrapped, message in (
        (Wrapper(None), "never called Optimizer.__init__"),
        (Other(optimizer), "Other is not an Optimizer. Pass the one that it wraps, optimizer.base"),
        (3, "int is not an Optimizer"),
    ):
        with pytest.raises(TypeError, match=message):
            hdet.Ensemble(wrapped, None, model=model, **SPREAD)
    assert rates(optimizer) == [0.1, 0.1]


@pytest.mark.parametrize("how", ["load_state_dict", "in place"])
def test_a_rollback_goes_back_to_weights_that_were_loaded_since(how):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    ensemble = hdet.Ensemble(optimizer, None, model=model, auto_lr=True, total_steps=100, **SPREAD)

    def train(steps, *, blows_up=False):
        for _ in range(steps):
            loss = model(torch.ones(2, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if blows_up:
                nn.init.constant_(model.weight, float("nan"))
            ensemble.step(loss)

    train(8)
    new = torch.full((1, 3), 9.0)
    if how == "load_state_dict":
        model.load_state_dict({"weight": new, "bias": torch.zeros(1)})
    else:
        with torch.no_grad():
            model.weight.copy_(new)
    train(4, blows_up=True)
    assert ensemble.last_report.rolled_back
    assert torch.equal(model.weight, new)
