"""Schedules recorded from a run: replayed, saved, refined."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import hdet
from hdet.schedules.found import Recorder
from hdet.steer.observation import ControllerState


def test_a_found_schedule_replays_what_the_run_did(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}], lr=0.1)
    scheduler = hdet.OneCycleLR(
        optimizer, [0.1, 0.01], total_steps=60, cycle_momentum=False, model=model, spread=0.2, converge_every=3
    )
    ensemble = scheduler.ensemble
    rates = []
    for step in range(60):
        if step in (18, 30):  # as a controller would, at the beginning of a round
            gain = ensemble.gains[0] * (2.0 if step == 18 else 0.3)
            ensemble._phases.steer._controllers.lr_states = [ControllerState(gain=gain)]
            ensemble._rounds.draw()
            ensemble._phases.explore.undo()
            ensemble.fan_out()
        rates.append([lr * gain for lr, gain in zip(ensemble.get_base_lr(), ensemble.gains, strict=True)])
        optimizer.step()
        if step < 59:
            scheduler.step(1.0)
    found = ensemble.found_schedule()
    found.save(tmp_path / "found.json")
    assert hdet.FoundSchedule.load(tmp_path / "found.json") == found
    other = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}], lr=7.0)
    replay = found.scheduler(other)
    for step, expected in enumerate(rates):
        assert [group["lr"] for group in other.param_groups] == pytest.approx(expected, abs=0.002), step
        assert found.lr(step, 0) == pytest.approx(expected[0], abs=0.002)
        other.step()
        replay.step()


def test_a_found_schedule_survives_a_resume():
    def build():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, hdet.OneCycleLR(
            optimizer, 0.1, total_steps=40, cycle_momentum=False, model=model, spread=0.2, converge_every=4
        )

    optimizer, scheduler = build()
    other_optimizer, other = build()
    for step in range(39):
        optimizer.step()
        scheduler.step(1.0)
        if step == 17:
            other.load_state_dict(scheduler.state_dict())
        if step > 17:
            other_optimizer.step()
            other.step(1.0)
    assert other.ensemble.found_schedule() == scheduler.ensemble.found_schedule()


def test_bad_schedule_files_are_named(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not a schedule"):
        hdet.FoundSchedule.load(tmp_path / "x.json")
    good = hdet.FoundSchedule(("a",), (0, 5), ((0.1, 0.2),))
    for bad in ({"steps": (1, 5)}, {"steps": (0, 0)}, {"lrs": ((0.1,),)}, {"lrs": ((0.1, math.nan),)}, {"groups": ()}):
        with pytest.raises(ValueError, match="Invalid"):
            dataclasses.replace(good, **bad)
    with pytest.raises(ValueError, match="parameter groups"):
        good.scheduler(torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}], lr=1.0))


def test_a_recorder_forgets_what_a_run_that_went_back_did():
    recorder = Recorder(["a"])
    for step, lr in ((0, 1.0), (4, 2.0), (8, 3.0), (4, 5.0), (6, 6.0)):
        recorder.add(step, [lr])
    assert recorder.schedule() == hdet.FoundSchedule(("a",), (0, 4, 6), ((1.0, 5.0, 6.0),))


def test_a_refined_schedule_is_the_documented_sum():
    norms = [5.0, 3.0, 1.0, 1.0, 2.0, 1.0]
    weights = [norm**-2 for norm in norms]
    shape = [weights[t] * sum(weights[t + 1 :]) for t in range(6)]
    found = hdet.FoundSchedule.refined(norms, 0.3, smoothing=0.0)
    assert [found.lr(t) for t in range(6)] == pytest.approx([0.3 * x / max(shape) for x in shape])
    assert found.lr(0) < 0.03  # large norms at the start become a warm-up
    linear = hdet.FoundSchedule.refined([2.0] * 5, 1.0)
    assert [linear.lr(t) for t in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_a_refined_schedule_is_smooth_and_fits_another_length():
    norms = [(3.0 if t < 300 else 1.0) * (1 + 0.1 * math.sin(7 * t)) for t in range(5000)]
    norms[2500] = 1e6  # one bad batch
    found = hdet.FoundSchedule.refined(norms, 1.0, total_steps=100)
    values = [found.lr(t) for t in range(100)]
    assert 0 < values[0] < 0.2
    assert max(values) == pytest.approx(1.0)
    assert values[50] == pytest.approx(0.5, abs=0.1)
    assert values[99] == 0.0


@pytest.mark.parametrize(
    ("norms", "arguments", "message"),
    [
        ([1.0], {}, "norms"),
        ([1.0, 0.0], {}, "norms"),
        ([1.0, math.nan], {}, "norms"),
        ([1.0, 1.0], {"power": 0.0}, "power"),
        ([1.0, 1.0], {"smoothing": 2.0}, "smoothing"),
        ([1.0, 1.0], {"total_steps": 1}, "total_steps"),
    ],
)
def test_a_refined_schedule_refuses_bad_values(norms, arguments, message):
    with pytest.raises(ValueError, match=message):
        hdet.FoundSchedule.refined(norms, 0.1, **arguments)
