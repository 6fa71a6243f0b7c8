"""One process: arguments, errors, state, and everything else that needs no second rank."""

import copy
import gc
import logging
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import hdet
from hdet.steer.published import Published


def setting(**settings):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, {"model": model, "spread": 0.1, "converge_every": 2} | settings


def scheduler(**settings):
    _, optimizer, settings = setting(**settings)
    return optimizer, hdet.OneCycleLR(optimizer, 0.1, total_steps=20, **settings)


BAD = [
    ({"spread": -0.1}, ValueError, r"Invalid spread=-0.1.*\[0, 1\)"),
    ({"spread": 1.0}, ValueError, r"Invalid spread=1.0.*\[0, 1\)"),
    ({"spread": math.nan}, ValueError, "Invalid spread=nan"),
    ({"converge_every": 0}, ValueError, r"Invalid converge_every=0.*>= 1"),
    ({"converge_every": -5}, ValueError, "Invalid converge_every=-5"),
    ({"converge_every": 2.5}, TypeError, "Invalid converge_every=2.5"),
    ({"converge_every": True}, TypeError, "Invalid converge_every=True"),
    ({"auto_lr": True, "spread": 0.0, "controller": hdet.controller.Published()}, ValueError, "needs spread > 0"),
    ({"model": None}, ValueError, "needs model="),
    ({"model": 3}, TypeError, "int"),
    ({"model": [nn.Linear(1, 1), "x"]}, TypeError, "got str"),
    ({"controller": "paper"}, TypeError, r"controller='paper'.*Published"),
    ({"seed": 1.5}, TypeError, "Invalid seed=1.5"),
    (
        {"averaging": hdet.Averaging(overlap_steps=2)},
        ValueError,
        r"Invalid overlap_steps=2.*\[0, converge_every=2\)",
    ),
    ({"averaging": 64}, TypeError, "Invalid averaging=64. Must be an instance of hdet.Averaging"),
    ({"overlap_steps": 1}, TypeError, r"Unknown setting overlap_steps=. Pass averaging=hdet.Averaging\(overlap_steps="),
    ({"outer_lr": 1.0}, TypeError, r"Unknown setting outer_lr=. Pass outer=hdet.Outer\(lr="),
    ({"sprad": 0.1}, TypeError, "Unknown setting sprad=. Did you mean spread="),
    ({"monitor": 3}, TypeError, "monitor=3"),
    ({"replicas": "world"}, TypeError, "ProcessGroup, a 1-D DeviceMesh or None, got str"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_arguments_name_the_value_before_anything_changes(settings, error, message):
    _, optimizer, settings = setting(**settings)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises(error, match=message):
        hdet.OneCycleLR(optimizer, 0.1, total_steps=20, **settings)
    with pytest.raises(error, match=message):
        hdet.Ensemble(optimizer, **settings)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


BAD_AVERAGING = [
    ({"bucket_mib": 0}, ValueError, "Invalid bucket_mib=0"),
    ({"overlap_steps": -1}, ValueError, "Invalid overlap_steps=-1"),
    ({"overlap_steps": 0.5}, TypeError, "Invalid overlap_steps=0.5"),
    (
        {"wire_dtype": torch.bfloat16},
        TypeError,
        "Invalid wire_dtype=torch.bfloat16. Must be one of 'float32', 'bfloat16'",
    ),
    ({"wire_dtype": "float16"}, ValueError, "Invalid wire_dtype='float16'"),
    ({"wire_dtype": "bfloat16", "overlap_steps": 1}, ValueError, "exclude one another: replicas send how far"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_AVERAGING)
def test_a_bad_way_to_average_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        hdet.Averaging(**settings)


def test_ensemble_needs_a_round_length_and_its_own_schedule():
    model, optimizer, settings = setting()
    del settings["converge_every"]
    with pytest.raises(ValueError, match="Pass converge_every"):
        hdet.Ensemble(optimizer, **settings)
    with pytest.raises(ValueError, match="schedule_every=0"):
        hdet.Ensemble(optimizer, schedule_every=0)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="another optimizer"):
        hdet.Ensemble(optimizer, torch.optim.lr_scheduler.StepLR(other, 3))
    with pytest.raises(TypeError, match="is not an Optimizer"):
        hdet.Ensemble(model)


LOSSES = [
    (3, TypeError, r"got the int 3.*epoch="),
    (True, TypeError, "got the int True"),
    (np.int64(3), TypeError, "got the int"),
    (torch.tensor(3), TypeError, "dtype torch.int64"),
    (torch.tensor(1 + 2j), TypeError, "dtype torch.complex64"),
    (torch.ones(2), ValueError, r"shape \(2,\)"),
    (torch.ones(2, 1), ValueError, r"shape \(2, 1\)"),
    ("0.3", TypeError, "got str"),
    ([0.3, 0.4], TypeError, "got list"),
]


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize(("loss", "error", "message"), LOSSES)
def test_a_bad_loss_is_an_error_and_the_step_can_be_taken_again(loss, error, message, spread):
    optimizer, schedule = scheduler(spread=spread, converge_every=2 if spread else None)
    optimizer.step()
    before = schedule.last_epoch, optimizer.param_groups[0]["lr"]
    with pytest.raises(error, match=message):
        schedule.step(loss)
    assert before == (schedule.last_epoch, optimizer.param_groups[0]["lr"])
    schedule.step(0.5)
    assert schedule.last_epoch == 1


@pytest.mark.parametrize(
    "loss",
    [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).bfloat16(),
     torch.tensor(0.5, requires_grad=True) * 1],
)  # fmt: skip
def test_every_kind_of_scalar_is_a_loss(loss):
    reports = []
    optimizer, schedule = scheduler(monitor=reports.append)
    for _ in range(2):
        optimizer.step()
        schedule.step(loss)
    assert reports[0].losses == (0.5,)


def test_a_loss_is_summed_in_float64_and_may_be_overwritten_in_place():
    """A CUDA graph's loss is one tensor that each replay overwrites: its value must be taken at once."""
    reports = []
    optimizer, schedule = scheduler(converge_every=3, monitor=reports.append)
    loss = torch.zeros(())
    for value in (1.0, 1e-9, 2.0):
        loss.fill_(value)
        optimizer.step()
        schedule.step(loss)
    assert reports[0].losses == (pytest.approx((3.0 + float(np.float32(1e-9))) / 3, rel=1e-15),)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_ignored_by_the_controller(bad):
    reports = []
    optimizer, schedule = scheduler(auto_lr=True, monitor=reports.append)
    for value in (1.0, bad, 1.0, 1.0):
        optimizer.step()
        schedule.step(value)
    assert not math.isfinite(reports[0].losses[0])
    assert math.isnan(reports[0].mean_loss)
    assert reports[1].losses == (1.0,)
    assert schedule.ensemble.gains == (1.0,)


def test_without_a_loss_the_controller_rests_and_says_so_once(caplog):
    optimizer, schedule = scheduler(auto_lr=True)
    with caplog.at_level(logging.WARNING, "hdet"):
        for _ in range(6):
            optimizer.step()
            schedule.step()
    assert [record.message for record in caplog.records if "without a loss" in record.message] == [
        "scheduler.step() was called without a loss: a rollback does not see one that rises, and the published "
        "controller does not move. Pass it: scheduler.step(loss)."
    ]
    assert schedule.ensemble.gains == (1.0,)
    assert math.isnan(schedule.ensemble.last_report.mean_loss)


def test_one_replica_trains_at_the_base_rate():
    optimizer, schedule = scheduler(spread=0.5, monitor=lambda report: None)
    plain = torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9)
    torchs = torch.optim.lr_scheduler.OneCycleLR(plain, 0.1, total_steps=20)
    for _ in range(20):
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        for o, s in ((optimizer, schedule), (plain, torchs)):
            o.step()
            s.step()
    report = schedule.ensemble.last_report
    assert (report.distance, report.excluded, report.converge_bytes) == ((0.0,), (), 0)


@pytest.mark.parametrize(("total", "expected"), [(50, 1), (1000, 10), (10_099, 100), (30_000, 100), (100_000, 250)])
def test_a_hundred_rounds_by_default_and_in_long_runs_up_to_four_hundred(total, expected):
    model, optimizer, _ = setting()
    schedule = hdet.OneCycleLR(optimizer, 0.1, total_steps=total, model=model, spread=0.1)
    assert schedule.ensemble.settings.converge_every == expected
    ensemble = hdet.Ensemble(setting()[1], model=model, spread=0.1, total_steps=total)
    assert ensemble.settings.converge_every == expected


def test_converge_inside_a_round_does_not_end_it():
    optimizer, schedule = scheduler(converge_every=4)
    for _ in range(3):
        optimizer.step()
        schedule.step(1.0)
    report = schedule.converge()
    assert (report.step, report.round, report.complete) == (3, 0, False)
    assert math.isnan(report.hypergradient[0])
    assert schedule.converge() is None
    optimizer.step()
    schedule.step(5.0)
    report = schedule.ensemble.last_report
    assert (report.step, report.round, report.complete, report.losses) == (4, 0, True, (2.0,))


def test_saving_between_converges_warns_only_where_replicas_differ():
    optimizer, schedule = scheduler()
    optimizer.step()
    schedule.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.state_dict()  # one replica: nothing to warn of


def test_ensemble_state_round_trip_with_a_schedule():
    def build():
        _, optimizer, settings = setting(auto_lr=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return optimizer, hdet.Ensemble(optimizer, schedule, total_steps=30, **settings)

    optimizer, ensemble = build()
    for _ in range(7):
        optimizer.step()
        ensemble.step(1.0)
    ensemble._phases.steer._controllers.lr_states = [hdet.controller.Belief(2.0, 0.5, 3.0, 0.1)]
    new_optimizer, new = build()
    new.load_state_dict(copy.deepcopy(ensemble.state_dict()))
    assert new.gains == (2.0,)
    assert new.steps == 7
    assert new_optimizer.param_groups[0]["lr"] == 2.0 * ensemble.get_base_lr()[0]
    for o, e in ((optimizer, ensemble), (new_optimizer, new)):
        o.step()
        e.step(1.0)
    assert new.get_base_lr() == ensemble.get_base_lr()


def test_a_state_that_does_not_fit_is_refused_before_anything_changes():
    optimizer, schedule = scheduler()
    state = schedule.state_dict()
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"controller": [[1.0, 0.0, 0]] * 2}, "has 2 gains, this run 1"),
    ):
        optimizer.step()
        schedule.step(1.0)
        before = schedule.last_epoch
        with pytest.raises(ValueError, match=message):
            schedule.load_state_dict(state | {"hdet": state["hdet"] | change})
        assert schedule.last_epoch == before


def test_a_parameter_group_added_later_is_an_error():
    optimizer, schedule = scheduler()
    optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    with pytest.raises(ValueError, match="2 parameter groups and had 1"):
        schedule.step(1.0)
    assert len(schedule.state_dict()["_last_lr"]) == 1


def test_a_second_scheduler_takes_over():
    _, optimizer, settings = setting(spread=0.0)
    first = hdet.OneCycleLR(optimizer, 0.1, total_steps=20, **settings)
    second = hdet.OneCycleLR(optimizer, 0.2, total_steps=20, **settings)
    optimizer.step()
    second.step(1.0)
    with pytest.raises(RuntimeError, match="Another hdet scheduler"):
        first.step(1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == second.ensemble.get_base_lr()[0]


def test_the_optimizers_parameters_outside_the_model_are_averaged_only_if_a_module_that_has_them_is_passed():
    model, _, settings = setting()
    outside = nn.Parameter(torch.ones(3))
    inside = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    plan = hdet.Ensemble(optimizer, **settings)._phases.converge._averager._current_plan()
    assert sum(bucket.numel for bucket in plan.buckets) == inside
    assert not any(t is outside for t in plan.tensors)
    settings["model"] = [model, nn.ParameterList([outside])]
    plan = hdet.Ensemble(optimizer, **settings)._phases.converge._averager._current_plan()
    assert sum(bucket.numel for bucket in plan.buckets) == inside + 3
    assert any(t is outside for t in plan.tensors)
    assert len(plan.untrained) == 3


def test_schedule_every_counts_epochs():
    _, optimizer, settings = setting(schedule_every=5)
    ensemble = hdet.Ensemble(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), **settings)
    seen = []
    for _ in range(11):
        optimizer.step()
        ensemble.step(1.0)
        seen.append(ensemble.get_base_lr()[0])
    assert seen == [0.1] * 4 + [0.05] * 5 + [0.025] * 2


def test_dropping_everything_frees_the_model():
    optimizer, schedule = scheduler()
    model = weakref.ref(schedule.ensemble.settings.modules[0])
    del optimizer, schedule
    gc.collect()
    assert model() is None


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(TypeError):
        hdet.Averaging(64.0)
    with pytest.raises(AttributeError):
        hdet.Averaging().bucket_mib = 1.0
    with pytest.raises(TypeError):
        Published(1.0)
