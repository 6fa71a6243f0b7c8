"""hdet.OneCycleLR with spread 0 is torch's OneCycleLR, to the last bit: the drop-in promise."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.optim.lr_scheduler import OneCycleLR as TorchOneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

import hdet

positive = st.floats(1e-6, 10.0)
momenta = st.floats(0.05, 0.99)


@st.composite
def cases(draw):
    """(optimizer factory, positional and keyword arguments of OneCycleLR, steps to take)."""
    groups = draw(st.integers(1, 3))

    def per_group(values):
        return draw(st.one_of(values, st.lists(values, min_size=groups, max_size=groups)))

    steps = draw(st.integers(2, 40))
    if draw(st.booleans()):
        length = {"total_steps": steps}
    else:
        epochs = draw(st.integers(1, 5))
        length = {"epochs": epochs, "steps_per_epoch": draw(st.integers(2, 8))}
        steps = epochs * length["steps_per_epoch"]
    arguments = length | {
        "max_lr": per_group(positive),
        "pct_start": draw(st.floats(0.01, 0.99)),
        "anneal_strategy": draw(st.sampled_from(["cos", "linear"])),
        "cycle_momentum": draw(st.booleans()),
        "base_momentum": per_group(momenta),
        "max_momentum": per_group(momenta),
        "div_factor": draw(st.floats(1.0, 100.0)),
        "final_div_factor": draw(st.floats(1.0, 1e5)),
        "three_phase": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["sgd", "adam"]))
    tensor_lr = draw(st.booleans())
    # An engine that averages one replica and never moves the gain must not change a bit either.
    extra = draw(st.sampled_from([{}, {"spread": 0.0}, {"converge_every": 3}, {"monitor": lambda report: None}]))

    def optimizer():
        parameters = [
            {"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(0.1) if tensor_lr else 0.1}
            for _ in range(groups)
        ]
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        return torch.optim.Adam(parameters, lr=0.1, foreach=False)

    return optimizer, arguments, steps, extra


def seen(optimizer, scheduler):
    """Everything a user can observe, with tensors as exact floats."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {k: v for k, v in scheduler.state_dict().items() if k != "hdet"}
    return plain((groups, scheduler.get_last_lr(), scheduler.last_epoch, state))


def plain(value):
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.tolist())
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def advance(optimizer, scheduler):
    optimizer.step()
    scheduler.step()


def outcome(optimizer, scheduler):
    try:
        advance(optimizer, scheduler)
    except (ValueError, ZeroDivisionError) as error:  # past the end
        return type(error), str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(cases())
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_equals_torch_exactly(case):
    build, arguments, steps, extra = case
    mine, theirs = build(), build()
    try:
        b = TorchOneCycleLR(theirs, **arguments)
    except ZeroDivisionError:  # torch divides by a phase of no length; so must we
        with pytest.raises(ZeroDivisionError):
            hdet.OneCycleLR(mine, **arguments, **extra)
        return
    a = hdet.OneCycleLR(mine, **arguments, **extra)
    assert seen(mine, a) == seen(theirs, b)
    for step in range(steps + 2):
        outcomes = [outcome(mine, a), outcome(theirs, b)]
        assert outcomes[0] == outcomes[1], step
        assert seen(mine, a) == seen(theirs, b), step
        if outcomes[0]:
            break


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_checkpoints_go_both_ways(case, data):
    """torch's checkpoint loads into hdet and hdet's into torch, and both continue as if nothing had happened."""
    build, arguments, steps, extra = case
    at = data.draw(st.integers(0, steps - 1))
    alone = build()
    try:
        scheduler = TorchOneCycleLR(alone, **arguments)
        for _ in range(steps):
            advance(alone, scheduler)
    except ZeroDivisionError:  # torch divides by a phase of no length
        return
    for first, second in ((TorchOneCycleLR, hdet.OneCycleLR), (hdet.OneCycleLR, TorchOneCycleLR)):
        kwargs = [arguments | (extra if cls is hdet.OneCycleLR else {}) for cls in (first, second)]
        old = build()
        scheduler = first(old, **kwargs[0])
        for _ in range(at):
            advance(old, scheduler)
        saved = copy.deepcopy((old.state_dict(), scheduler.state_dict()))
        new = build()
        resumed = second(new, **kwargs[1])
        new.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        # last_epoch= resumes from the optimizer's state alone, as torch's does
        third = build()
        third.load_state_dict(saved[0])
        by_epoch = second(third, **kwargs[1], last_epoch=scheduler.last_epoch - 1) if at else None
        for _ in range(steps - at):
            advance(old, scheduler)
            advance(new, resumed)
            assert plain(new.state_dict()["param_groups"]) == plain(old.state_dict()["param_groups"])
            assert plain(resumed.get_last_lr()) == plain(scheduler.get_last_lr())
            if by_epoch is not None:
                advance(third, by_epoch)
                assert plain(by_epoch.get_last_lr()) == plain(scheduler.get_last_lr())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"total_steps": 0},
        {"total_steps": 1.5},
        {"total_steps": -3},
        {"epochs": 0, "steps_per_epoch": 3},
        {"epochs": 2},
        {"epochs": 2, "steps_per_epoch": 1.5},
        {"total_steps": 10, "pct_start": 1.5},
        {"total_steps": 10, "pct_start": 1},
        {"total_steps": 10, "anneal_strategy": "exp"},
        {"total_steps": 10, "max_lr": [0.1, 0.2]},
        {"total_steps": 10, "base_momentum": [0.1, 0.2]},
        {"total_steps": 10, "last_epoch": 4},
    ],
)
@pytest.mark.parametrize("extra", [{}, {"spread": 0.1, "model": torch.nn.Linear(2, 2)}])
def test_torchs_errors_are_ours(arguments, extra):
    def error(cls, **more):
        with pytest.raises(Exception) as caught:  # noqa: PT011 the comparison is the assertion
            cls(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9), **(full | more))
        return type(caught.value), str(caught.value)

    full = {"max_lr": 0.1} | arguments
    (ours, message), (torchs, expected) = error(hdet.OneCycleLR, **extra), error(TorchOneCycleLR)
    assert ours is torchs
    # With replicas NaN is refused too, and numbers out of range in the same words.
    assert message == expected or (extra and message == "Invalid pct_start=1.5. Must be a float in [0, 1].")


def test_not_an_optimizer_and_no_momentum():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        hdet.OneCycleLR(None, 0.1, total_steps=3)
    with pytest.raises(ValueError, match="must support momentum"):
        hdet.OneCycleLR(torch.optim.Adagrad([torch.ones(1, requires_grad=True)]), 0.1, total_steps=3)


def test_positional_arguments_are_torchs():
    def build(cls):
        optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9)
        scheduler = cls(optimizer, 0.3, None, 4, 5, 0.4, "linear", True, 0.7, 0.9, 10.0, 100.0, True, -1)
        for _ in range(20):
            advance(optimizer, scheduler)
        return seen(optimizer, scheduler)

    assert build(hdet.OneCycleLR) == build(TorchOneCycleLR)


def test_is_a_torch_scheduler_and_warns_like_one():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = hdet.OneCycleLR(optimizer, 0.3, total_steps=4)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step(epoch=2)
    assert "epoch parameter" in str(caught[0].message)
    assert scheduler.last_epoch == 2


def test_a_subclass_computes_its_own_rates():
    class Floored(hdet.OneCycleLR):
        def get_lr(self):
            return [max(lr, 0.05) for lr in super().get_lr()]

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = Floored(optimizer, 0.1, total_steps=8, model=model, converge_every=3)
    rates = []
    for _ in range(7):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert min(rates) == 0.05 < max(rates)


class Calls(TorchDispatchMode):
    """What is run on tensors: on a GPU each is a launch, and reading a number waits for the device."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.made.append((function, arguments))
        return function(*arguments, **(keywords or {}))


def with_tensor_rates(groups, *, shared=False, dtype=torch.float32, **settings):
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(groups))
    rate = torch.tensor(0.1, dtype=dtype)
    optimizer = torch.optim.SGD(
        [{"params": list(m.parameters()), "lr": rate if shared else rate.clone()} for m in model], momentum=0.9
    )
    scheduler = hdet.OneCycleLR(optimizer, 0.1, total_steps=100, model=model, **settings)
    return optimizer, scheduler


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 16])
def test_all_rates_that_are_tensors_are_written_by_one_launch_and_nothing_is_waited_for(groups, shared):
    optimizer, scheduler = with_tensor_rates(groups, shared=shared, spread=0.1, converge_every=50)
    optimizer.step()
    scheduler.step(0.5)
    optimizer.step()
    with Calls() as calls:
        scheduler.step(0.5)
    assert [function for function, _ in calls.made] == [torch.ops.hdet.scale_rates.default]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_rates_that_are_tensors_are_torchs(dtype, shared):
    optimizer, scheduler = with_tensor_rates(
        3, shared=shared, dtype=dtype, virtual_replicas=2, spread=0.1, converge_every=7
    )
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.1, dtype=dtype), momentum=0.9)
    expected = TorchOneCycleLR(theirs, 0.1, total_steps=100)
    for _ in range(40):
        advance(theirs, expected)
        advance(optimizer, scheduler)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [lr.dtype for lr in rates] == [dtype] * 3
        assert rates == [theirs.param_groups[0]["lr"]] * 3
        assert plain(scheduler.state_dict()["_last_lr"]) == plain([theirs.param_groups[0]["lr"]] * 3)


def test_rates_that_are_tensors_follow_the_gain():
    optimizer, scheduler = with_tensor_rates(2, virtual_replicas=2, spread=0.1, converge_every=2, auto_lr=True)
    gains = set()
    for step in range(1, 31):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step(1 / step)
        (gain, _), (base, _) = scheduler.ensemble.gains, scheduler.ensemble.get_base_lr()
        gains.add(gain)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(base.item() * gain, rel=1e-6)
    assert len(gains) > 3


def test_base_rates_are_tensors_where_the_optimizers_are():
    optimizer, scheduler = with_tensor_rates(2, spread=0.1, converge_every=2)
    for step in range(4):
        base, saved = scheduler.ensemble.get_base_lr(), scheduler.state_dict()
        assert [type(lr) for lr in (*base, *saved["hdet"]["base_lr"], *saved["_last_lr"])] == [torch.Tensor] * 6, step
        advance(optimizer, scheduler)


@pytest.mark.parametrize("steps", range(4))
def test_rates_of_one_element_in_one_dimension(steps):
    """torch's fill_() refuses these as values."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor([0.1]), momentum=0.9)
    scheduler = hdet.OneCycleLR(optimizer, 0.1, total_steps=9, model=model, spread=0.1, converge_every=2)
    for _ in range(steps):
        advance(optimizer, scheduler)
    scheduler.converge()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    advance(optimizer, scheduler)
    after = optimizer.param_groups[0]["lr"].clone()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    advance(optimizer, scheduler)
    assert torch.equal(optimizer.param_groups[0]["lr"], after)
    scheduler.close()
    assert optimizer.param_groups[0]["lr"].shape == (1,)


def test_a_group_may_leave_a_tensor_that_groups_share():
    optimizer, scheduler = with_tensor_rates(2, shared=True, spread=0.1, converge_every=5)
    for _ in range(2):
        advance(optimizer, scheduler)
    optimizer.param_groups[0]["lr"] = 0.05
    advance(optimizer, scheduler)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first == pytest.approx(second.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_compiled_step_is_compiled_as_often_with_many_groups_and_converges_between():
    """Putting the rates aside, and back before the optimizer's step, reads no number that differs each time."""
    compiled = []
    for groups in (1, 9):
        torch._dynamo.reset()
        optimizer, scheduler = with_tensor_rates(groups, spread=0.1, converge_every=3, cycle_momentum=False)
        counter = CompileCounter()
        step = torch.compile(optimizer.step, backend=counter)
        for _ in range(8):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            step()
            scheduler.step(1.0)
            scheduler.converge()
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1] < 6


def run_with_a_busy_monitor(lr):
    """Rates after each step, and what the monitor saw, which converges and writes into the optimizer."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rates, seen = [], []

    def monitor(report):
        seen.append((report.step, float(scheduler.get_last_lr()[0]), report.schedule_lr[0]))
        scheduler.converge()
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(0.0077) if isinstance(lr, torch.Tensor) else 0.0077
        if report.step == 8:
            group["max_lr"] = 0.5

    scheduler = hdet.OneCycleLR(
        optimizer, 0.1, 20, cycle_momentum=False, model=model, spread=0.1, converge_every=4, monitor=monitor
    )
    for _ in range(10):
        advance(optimizer, scheduler)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return np.array(rates), np.array(seen)


def test_a_monitor_sees_the_rounds_rates_and_the_next_rounds_are_written_whatever_it_has_written():
    rates, seen = run_with_a_busy_monitor(torch.tensor(0.1))
    expected_rates, expected = run_with_a_busy_monitor(0.1)
    assert rates == pytest.approx(expected_rates, rel=1e-6)
    assert seen == pytest.approx(expected, rel=1e-6)
    assert rates[8] > 0.1
    assert 0.0077 not in expected_rates
