"""What optimizer_state= comes to, without processes; and what a compiled optimizer sees of a round."""

import copy
import inspect

import pytest
import torch
from torch import nn

import hdet
from hdet.converge.optimizer_policy import policy_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def policy(build, *hyperparameters, gradients="shared", wanted="auto", overlap_steps=0):
    optimizer = build(net().parameters())
    return policy_of(wanted, optimizer, hyperparameters, gradients=gradients, overlap_steps=overlap_steps)


def adam(parameters, **settings):
    return torch.optim.Adam(parameters, lr=0.1, **settings)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, lr=0.1, **settings)


class SOAP(torch.optim.SGD):
    """By name only."""


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (adamw, "verify"),
        (adam, "verify"),
        (
            lambda p: adam(p, weight_decay=0.1),
            "average",
        ),  # it is added to the gradient: parameters differ, so do moments
        pytest.param(
            lambda p: adam(p, weight_decay=0.1, decoupled_weight_decay=True),
            "verify",
            marks=pytest.mark.skipif(
                "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters, reason="an older torch"
            ),
        ),
        (lambda p: sgd(p, momentum=0.9), "verify"),
        (lambda p: sgd(p, momentum=0.9, weight_decay=0.1), "average"),
        (lambda p: sgd(p, weight_decay=0.1), "verify"),  # without momentum there is no state
        (torch.optim.SparseAdam, "verify"),
        (torch.optim.Rprop, "average"),  # its step sizes begin at the learning rate
        (torch.optim.LBFGS, "reset"),
        (lambda p: SOAP(p, lr=0.1), "keep"),
    ],
)
def test_auto_by_optimizer(build, expected):
    assert policy(build) == expected


def test_auto_by_what_is_explored_and_by_gradients():
    assert policy(adamw, hdet.param_group("weight_decay", spread=0.3)) == "verify"
    assert policy(adamw, hdet.param_group("betas[0]", spread=0.3)) == "average"
    assert policy(lambda p: sgd(p, momentum=0.9), hdet.param_group("momentum", spread=0.3)) == "average"
    assert policy(adamw, hdet.scalar("smoothing", 0.1, spread=0.05)) == "verify"  # shared gradients carry it
    assert policy(adamw, gradients="local") == policy(adamw, gradients="grouped") == "average"
    assert policy(adamw, gradients="local", wanted="keep") == "keep"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_state": "mean"}, "Invalid optimizer_state='mean'"),
        ({"optimizer_state": "average", "overlap_steps": 1}, "moments cannot be corrected late"),
    ],
)
def test_bad_values_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hdet.Averaging(**settings)


def test_what_cannot_be_right_is_refused():
    with pytest.raises(ValueError, match="ASGD keeps weights in its state"):
        policy(torch.optim.ASGD, overlap_steps=1)

    class AtOnce(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})
            for p in self.param_groups[0]["params"]:
                self.state[p] = {"step": torch.zeros(()), "sum": torch.zeros_like(p)}

    with pytest.raises(ValueError, match="made in its constructor"):
        policy(AtOnce, wanted="reset")
    assert policy(torch.optim.Adagrad, wanted="reset") == "reset"


@pytest.mark.parametrize("build", [adamw, lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5)])
def test_reset_begins_anew_after_a_round(build):
    """Even with one replica: each round trains as a fresh optimizer would."""
    model, reference = net(), net()
    optimizer = build(model.parameters())
    ensemble = hdet.Ensemble(
        optimizer, model=model, spread=0.1, converge_every=2, averaging=hdet.Averaging(optimizer_state="reset")
    )
    for step in range(6):
        if step % 2 == 0:
            fresh = build(reference.parameters())
        for one, by in ((model, optimizer), (reference, fresh)):
            by.zero_grad()
            one(torch.ones(3, 4) * (1 + step)).square().sum().backward()
            by.step()
        ensemble.step(1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_saved_state_of_more_replicas_keeps_gains_and_velocities():
    model = net()
    optimizer = adamw(model.parameters())

    def build():
        return hdet.OneCycleLR(optimizer, 0.1, 40, model=model, spread=0.2, converge_every=4, cycle_momentum=False)

    state = build().state_dict()
    memory = state["hdet"]["controller"][0]
    state["hdet"]["controller"] = [[2.5, 0.25, 3, *memory[3:]]]
    state["hdet"] |= {"replicas": 8, "steps": 6, "round_losses": [[1.0, 1]] * 8}
    again = build()
    again.load_state_dict(state | {"last_epoch": 6})
    assert again.state_dict()["hdet"]["controller"] == state["hdet"]["controller"]
    assert again.ensemble.steps == 6
    assert again.ensemble.multipliers() == (1.0,)  # of the one replica there is now
    assert again.state_dict()["hdet"]["round_losses"] == [[0.0, 0]]


def test_a_state_of_a_shorter_run_continues_with_this_runs_schedule():
    """With an ensemble the length is the constructor's: the learning rate at step 10 is the longer schedule's."""

    def build(total_steps):
        model = net()
        optimizer = adamw(model.parameters())
        settings = {"model": model, "spread": 0.2, "converge_every": 5, "cycle_momentum": False}
        return optimizer, hdet.OneCycleLR(optimizer, 0.1, total_steps, **settings)

    def advance(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step(1.0)

    short, long, resumed = build(10), build(30), build(30)
    advance(*short, 10)
    state = copy.deepcopy(short[1].state_dict())
    state["hdet"]["controller"][0][0] = 2.0
    resumed[1].load_state_dict(state)
    advance(*long, 10)
    for _ in range(20):
        assert resumed[0].param_groups[0]["lr"] == pytest.approx(2 * long[0].param_groups[0]["lr"])
        advance(*long, 1)
        advance(*resumed, 1)
    too_short = build(8)
    with pytest.raises(ValueError, match="beyond this run's total_steps=8"):
        too_short[1].load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inside torch's compiler
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_rounds_do_not_compile_anew():
    """A tensor learning rate is written in place, so that a compiled model and optimizer step stay as they are."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), capturable=False)
    scheduler = hdet.Ensemble(
        optimizer, hdet.schedules.cosine(total_steps=40), model=model, spread=0.2, converge_every=3, auto_lr=True,
        total_steps=40,
    )  # fmt: skip
    step = torch.compile(optimizer.step, backend="eager", fullgraph=False)
    graphs = []
    for _ in range(15):
        loss = compiled(torch.ones(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        step()
        scheduler.step(loss)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] > 0
    assert graphs[-1] == graphs[3]  # after the second round has begun
