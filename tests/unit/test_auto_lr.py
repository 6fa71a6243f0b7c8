"""What auto_lr needs to know of the run: settings that exclude one another, and the schedule's forecast."""

import math

import pytest
import torch
from torch import nn

import hdet
from hdet.schedules.forecast import forecast


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": None}, "must know how long"),
        ({"model": None, "spread": 0.0, "total_steps": 100}, "needs model="),
        ({"total_steps": 100, "averaging": hdet.Averaging(overlap_steps=2)}, "exclude one another"),
        ({"total_steps": 100, "spread": 0.0, "controller": hdet.controller.Published()}, "needs spread > 0"),
        ({"probe": print, "total_steps": None}, "must know how long"),
        ({"probe": print, "total_steps": 100, "averaging": hdet.Averaging(overlap_steps=2)}, "exclude one another"),
        ({"probe": 3, "total_steps": 100}, "Must be a function"),
        ({"total_steps": 0}, "total_steps"),
        ({"auto_lr": False, "probe": print, "total_steps": 100}, "without auto_lr"),
    ],
)
def test_contradictory_settings(settings, message):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        hdet.Ensemble(optimizer, **({"model": model, "spread": 0.1, "converge_every": 5, "auto_lr": True} | settings))
    with pytest.raises(ValueError, match="power"):
        hdet.Probe(loss_fn=print, power=-1.0)


def test_the_peak_of_a_schedule_is_found_by_running_a_copy_ahead():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90),
        ],
        [10],
    )
    ensemble = hdet.Ensemble(
        optimizer, schedule, model=model, spread=0.1, converge_every=5, auto_lr=True, probe=print, total_steps=100
    )
    assert ensemble._phases.course.forecast.peak == pytest.approx(0.1)
    assert ensemble._phases.course.forecast.heights[0] == pytest.approx(0.1)
    assert ensemble.settings.controller.rests_after(ensemble._phases.course) == pytest.approx(
        0.1 + 0.9 * math.acos(0.4) / math.pi, abs=0.02
    )
    assert schedule.last_epoch == 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("build", [
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=300, three_phase=True),
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 70, 0.5),
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, hdet.schedules.cosine(total_steps=300)),
])  # fmt: skip
def test_a_forecast_is_what_comes(build):
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.2, momentum=0.9)
    schedule = build(optimizer)
    before = (dict(schedule.__dict__), optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"])
    found = forecast(schedule, optimizer, 300)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == before[1:]
    assert schedule.last_epoch == before[0]["last_epoch"]
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 300:
            schedule.step()
    assert found.peak == pytest.approx(max(rates))
    assert found.heights[-1] == pytest.approx(rates[-1] / max(rates), abs=1e-6)
    assert found.area == pytest.approx(sum(rates) / max(rates) / 300, abs=0.01)
    wanted = [rates[299 * i // 999] / max(rates) for i in range(1000)]
    if len(found.heights) == 1000:
        assert list(found.heights) == pytest.approx(wanted)
    last = max(i for i, rate in enumerate(rates) if rate >= 0.7 * max(rates))
    assert found.high_until(0.7) == pytest.approx((last + 1) / 300, abs=0.01)


def test_a_schedule_that_never_falls_is_high_to_the_end():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.2)
    for schedule in (None, torch.optim.lr_scheduler.LambdaLR(optimizer, hdet.schedules.constant(warmup_steps=5))):
        found = forecast(schedule, optimizer, 100)
        assert (found.high_until(0.7), found.heights[-1]) == (1.0, 1.0)


def test_max_lr_may_be_left_out_with_auto_lr():
    """The optimizer's own learning rates are then where the controller begins: the schedule's peaks."""
    model = nn.Linear(4, 4)
    groups = [{"params": [model.weight], "lr": torch.tensor(0.25)}, {"params": [model.bias], "lr": 0.1}]

    def build(*given, **settings):
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return hdet.OneCycleLR(optimizer, *given, total_steps=50, auto_lr=True, model=model, **settings)

    left_out, given = build(), build([0.25, 0.1])
    assert left_out._ensemble._phases.course.forecast == given._ensemble._phases.course.forecast
    assert [group["max_lr"] for group in left_out.optimizer.param_groups] == [0.25, 0.1]
    groups[1]["lr"] = 0.0
    with pytest.raises(ValueError, match="no place to begin"):
        build()


@pytest.mark.parametrize("settings", [{}, {"model": nn.Linear(4, 4), "spread": 0.1}])
def test_without_auto_lr_max_lr_must_be_given(settings):
    optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match=r"needs max_lr.*auto_lr=True"):
        hdet.OneCycleLR(optimizer, total_steps=50, **settings)
    assert "max_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("settings", [{}, {"rollback": False}, {"per_group": True}, {"spread": 0.2}])
def test_one_replica_finds_its_learning_rate_by_how_far_its_weights_move(settings):
    """Without a process group, a probe or a spread, from a hundredth of the learning rate and from ten times it."""
    gains = []
    for start in (1e-4, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in (model[0], model[2])], lr=start)
        scheduler = hdet.OneCycleLR(
            optimizer, total_steps=200, cycle_momentum=False, auto_lr=True, model=model, **settings
        )
        xs = torch.randn(200, 16, 6)
        for x in xs:
            loss = (model(x)[:, 0] - x.sum(-1).sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
        gains.append([gain * start for gain in scheduler.ensemble.gains])
    for low, high in zip(*gains, strict=True):
        assert 1e-3 < low < 0.5
        assert low == pytest.approx(high, rel=0.5)


def test_a_max_lr_that_was_given_is_kept_where_it_may_be_right_and_one_left_out_is_not(caplog):
    """Two runs that differ in nothing else: from a learning rate near the right one, and from far below it."""

    def gain(start, *given):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=start)
        scheduler = hdet.OneCycleLR(optimizer, *given, total_steps=200, cycle_momentum=False, auto_lr=True, model=model)
        for x in torch.randn(200, 16, 6):
            loss = (model(x)[:, 0] - x.sum(-1).sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
        return scheduler.ensemble.gains[0]

    right = 1e-3 * gain(1e-3)
    near = right / 1.5
    assert 1 < gain(near, near) < 0.9 * gain(near)
    far = gain(1e-4)
    assert "has raised the learning rate" not in caplog.text
    assert gain(1e-4, 1e-4) == pytest.approx(far, rel=0.1)
    assert far > 10
    assert caplog.text.count("has raised the learning rate") == 1


def saved_before(ensemble, controller):
    """A state that does not say whose it is, as it was saved before there was Posterior."""
    state = ensemble.state_dict()
    del state["controller_kind"]
    return state | {"controller": controller}


TWO_SLOPE = [2.0, -0.1, 30, ((0.1, 0.01),) * 6, (0.3, 0.01, 30, 0.3)]
PUBLISHED = [2.0, -0.1, 30, (), (0.0, 0.0, 0, math.inf)]


@pytest.mark.parametrize("values", [TWO_SLOPE, PUBLISHED])
@pytest.mark.parametrize("controller", [hdet.controller.Posterior(), hdet.controller.Published()])
def test_of_the_state_of_another_controller_the_gains_are_taken(values, controller):
    def build(controller):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return hdet.Ensemble(optimizer, model=model, spread=0.1, total_steps=100, auto_lr=True, controller=controller)

    resumed = build(controller)
    resumed.load_state_dict(saved_before(build(controller), [values]))
    (state,) = resumed._phases.steer._controllers.lr_states
    whole = values is PUBLISHED and isinstance(controller, hdet.controller.Published)
    assert state == (hdet.controller.ControllerState(2.0, -0.1, 30) if whole else controller.begin(2.0))
    other = build(hdet.controller.Published() if isinstance(controller, hdet.controller.Posterior) else None)
    other.load_state_dict(resumed.state_dict())
    assert other.gains == (2.0,)
    (state,) = other._phases.steer._controllers.lr_states
    assert state == other.settings.controller.begin(2.0)
