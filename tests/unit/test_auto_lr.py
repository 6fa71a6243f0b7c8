"""What auto_lr needs to know of the run: settings that exclude one another, and the schedule's forecast."""

import math

import pytest
import torch
from torch import nn

import hdet
from hdet.schedules.forecast import forecast
from hdet.steer.two_slope import TwoSlope


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": TwoSlope()}, "needs the paired probe"),
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
    assert found.final == pytest.approx(rates[-1] / max(rates), abs=1e-6)
    wanted = [rates[299 * i // 999] / max(rates) for i in range(1000)]
    if len(found.heights) == 1000:
        assert list(found.heights) == pytest.approx(wanted)
    last = max(i for i, rate in enumerate(rates) if rate >= 0.7 * max(rates))
    assert found.high_until(0.7) == pytest.approx((last + 1) / 300, abs=0.01)


def test_a_schedule_that_never_falls_is_high_to_the_end():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.2)
    for schedule in (None, torch.optim.lr_scheduler.LambdaLR(optimizer, hdet.schedules.constant(warmup_steps=5))):
        found = forecast(schedule, optimizer, 100)
        assert (found.high_until(0.7), found.final) == (1.0, 1.0)
