"""Malformed calls of what is public: refused by name, with nothing changed. A tenth of the bench's runs here."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import hdet
from hdet.bench.faults import _examples, api, ops
from hdet.bench.faults._values import picture, random_state
from hdet.errors import check_flag, check_number, check_whole, shown
from hdet.transaction import AllOrNothing

pytestmark = pytest.mark.timeout(300)


def test_every_public_callable_has_an_example():
    """A new one is tried by itself, as soon as there is a call of it that is as it should be."""
    assert set(_examples.public()) == set(_examples.EXAMPLES)


@pytest.mark.parametrize("name", sorted(_examples.EXAMPLES))
@pytest.mark.filterwarnings("ignore")
def test_the_examples_succeed(name, tmp_path):
    call = _examples.example(name, tmp_path)
    call.function(**call.arguments)
    assert set(call.arguments) <= set(_examples.parameters(_examples.public()[name]))


@pytest.mark.slow
@pytest.mark.parametrize("section", [api, ops])
def test_another_tenth(section):
    outcome = section.run(0.1, 1)
    assert outcome.failures == []


@pytest.mark.parametrize("section", [api, ops])
def test_malformed_calls_are_refused_by_name_and_change_nothing(section):
    outcome = section.run(0.1, 0)
    assert outcome.tried == section.FULL // 10
    assert outcome.failures == []
    assert outcome.refused["TypeError"] > 50


# ---------------------------------------------------------------------------------------------------------- the checks


def test_numbers_flags_and_what_they_are_kept_as():
    assert type(check_number("x", np.float32(0.5))) is float
    assert type(check_whole("x", np.int64(3), ">= 0")) is int
    assert check_flag("x", np.bool_(True)) is True
    for bad in (True, "1", None, 1 + 0j, torch.tensor(1.0), np.bool_(True)):
        with pytest.raises(TypeError, match="Invalid x="):
            check_number("x", bad)
    for bad in (math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=r"Invalid x=.*finite|float can hold"):
            check_number("x", bad)
    for bad in (1.0, math.nan, "1", True):
        with pytest.raises(TypeError, match="whole number"):
            check_whole("x", bad, ">= 0")
    with pytest.raises(TypeError, match="True or False"):
        check_flag("x", 1)
    assert len(shown("x" * 10_000)) < 300


# ----------------------------------------------------------------------------------------------------- all or nothing


def test_what_fails_puts_an_optimizer_back():
    model = _examples.net()
    optimizer = _examples.adamw(model)
    before = picture(optimizer)

    def change():
        optimizer.param_groups[0]["lr"] = 5.0
        optimizer.param_groups[1]["lr"].fill_(5.0)
        optimizer.param_groups[1]["new"] = 1
        optimizer.register_step_pre_hook(lambda *_: None)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

    with pytest.raises(KeyboardInterrupt), AllOrNothing(optimizer):  # noqa: PT012
        change()
        raise KeyboardInterrupt
    assert picture(optimizer) == before
    with AllOrNothing(optimizer):
        change()
    assert picture(optimizer) != before


REFUSED = {
    "a device": {"rollback": "gpu"},
    "a prior of other groups": {"prior": True},
    "a schedule": {"schedule": "cosine"},
    "a schedule that gives NaN": {"schedule": lambda step: math.nan},
    "a schedule that raises": {"schedule": lambda step: 1 / 0},
    "a hyperparameter that is not there": {
        "hyperparameters": [
            hdet.param_group("weight_decay", spread=0.5, move=False),
            hdet.param_group("momentum", spread=0.1, move=False),
        ]
    },
    "schedule_every": {"schedule_every": math.nan},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_constructor_leaves_everything_to_the_earlier_scheduler(what, tmp_path):
    w = _examples.world()
    settings = dict(REFUSED[what])
    if settings.get("prior"):
        hdet.explore.Prior({"other": 2.0}).save(tmp_path / "prior.yaml")
        settings["prior"] = tmp_path / "prior.yaml"
    watched = (*w, settings.get("hyperparameters"))
    before, generators = picture(*watched), random_state()
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        hdet.Ensemble(
            w.optimizer, settings.pop("schedule", None), model=w.model, spread=0.1, converge_every=2, auto_lr=True,
            **settings,
        )  # fmt: skip
    assert picture(*watched) == before
    assert random_state() == generators
    w.optimizer.step()
    w.earlier.step(torch.tensor(1.0))


def test_a_constructor_that_fails_in_torch_leaves_the_optimizer_alone():
    w = _examples.world()
    before = picture(*w)
    for arguments in ({"total_steps": 2.5}, {"total_steps": 10, "pct_start": 2.0}, {"total_steps": 10, "last_epoch": 3},
                      {"total_steps": 10, "base_momentum": "x"}, {"total_steps": 10, "max_lr": None}):  # fmt: skip
        with pytest.raises((TypeError, ValueError, KeyError)):
            hdet.OneCycleLR(w.optimizer, **{"max_lr": 0.1, "model": w.model, "spread": 0.1, **arguments})
        assert picture(*w) == before, arguments


def test_what_can_be_read_only_once_is_read_once():
    model = _examples.net()
    optimizer = _examples.adamw(model)
    reports = []
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 10, model=iter([model]), spread=0.1, monitor=iter([reports.append]))
    assert scheduler.ensemble.settings.modules == (model,)
    assert len(scheduler.ensemble.settings.monitors) == 1


# -------------------------------------------------------------------------------------------------------- saved states

BAD_STATES = {
    "steps": [-5, 3.7, math.nan, "x", None],
    "base_lr": [[math.nan], [-1.0, 0.1], [], None],
    "controller": [
        [[math.nan, 0.0, 0, (), (0.0, 0.0, 0, math.inf)]],
        [[-1.0, 0.0, 0, (), (0.0, 0.0, 0, math.inf)]],
        [[1e300, 0.0, 0, (), (0.0, 0.0, 0, math.inf)]],
        [[1.0, math.inf, 0, (), (0.0, 0.0, 0, math.inf)]],
        [[1.0, 0.0, -1, (), (0.0, 0.0, 0, math.inf)]],
        [[1.0, 0.0, 0, ((0.0, -1.0),) * 6, (0.0, 0.0, 0, math.inf)]],
        [[]],
        [],
    ],
    "replicas": ["x", 0],
    "rollbacks": [-100, 1.5],
    "first_loss": [-math.inf, "x"],
    "slow_rounds": [-3, 2],
    "slow_average": [[[torch.ones(1), torch.ones(2)]], [[1.0, 2.0]], [[torch.tensor([math.nan])] * 2]],
    "round_losses": [[[math.nan, -1]], [[1.0]], []],
    "found_schedule": [[[0, [0.1]]], [[0, [0.1, math.nan]]], [[5, [0.1, 0.1]], [5, [0.1, 0.1]]]],
    "version": [None, 5, "6"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_STATES.items() for value in values])
def test_a_state_that_no_run_can_have_is_refused_and_nothing_has_changed(key, value):
    model, optimizer, scheduler = _examples.one_cycle()
    state = copy.deepcopy(scheduler.state_dict())
    state["hdet"][key] = value
    before = picture(model, optimizer, scheduler)
    with pytest.raises((TypeError, ValueError)):
        scheduler.load_state_dict(state)
    assert picture(model, optimizer, scheduler) == before


def test_a_state_without_a_key_is_refused_and_nothing_has_changed():
    model, optimizer, scheduler = _examples.one_cycle()
    good = scheduler.state_dict()
    before = picture(model, optimizer, scheduler)
    for key in set(good["hdet"]) - {
        "outer",
        "shard",
        "loss_level",
        "undone_jump",
        "controller_kind",
    }:  # which older states lack
        bad = {**good, "hdet": {k: v for k, v in good["hdet"].items() if k != key}}
        with pytest.raises(ValueError, match=key):
            scheduler.load_state_dict(bad)
        assert picture(model, optimizer, scheduler) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("last_epoch", math.nan),
        ("last_epoch", 101),
        ("base_lrs", [0.1]),
        ("_schedule_phases", []),
        ("step", 3),
        ("total_steps", -1),
    ],
)
def test_a_state_of_torchs_part_is_checked_too(key, value):
    model, optimizer, scheduler = _examples.one_cycle()
    state = {**scheduler.state_dict(), key: value}
    before = picture(model, optimizer, scheduler)
    with pytest.raises((TypeError, ValueError)):
        scheduler.load_state_dict(state)
    assert picture(model, optimizer, scheduler) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5]),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]),
        lambda o: hdet.schedules.infinite(cooldown_steps=3, constant_factor=0.5),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_good_states_of_torchs_schedulers_load(make):
    def build():
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, hdet.Ensemble(optimizer, make(optimizer), model=model, spread=0.1, converge_every=2)

    optimizer, ensemble = build()
    for _ in range(7):
        optimizer.step()
        ensemble.step(0.5)
    state = ensemble.state_dict()
    other_optimizer, other = build()
    other.load_state_dict(state)
    for _ in range(3):
        for o, e in ((optimizer, ensemble), (other_optimizer, other)):
            o.step()
            e.step(0.5)
    assert other.get_last_lr() == ensemble.get_last_lr()


def test_a_learning_rate_of_0_is_named_by_find_lr():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"learning rates \[0.0\].*not all 0"):
        hdet.find_lr(model, optimizer, _examples.loss_fn, _examples.BATCHES)
    with pytest.raises(ValueError, match=r"LBFGS.*closure"):
        hdet.find_lr(model, torch.optim.LBFGS(model.parameters()), _examples.loss_fn, _examples.BATCHES)


def test_find_lr_leaves_the_random_numbers_to_the_run():
    model = nn.Linear(3, 1)
    data = torch.utils.data.DataLoader(torch.randn(64, 3), 8, shuffle=True)
    generators = random_state()
    hdet.find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), _examples.loss_fn, data, steps=4)
    assert random_state() == generators
    assert random.getstate() == generators[0]


def test_a_group_added_later_is_named_where_a_state_is_saved():
    w = _examples.world()
    w.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="3 parameter groups and had 2"):
        w.optimizer.state_dict()
