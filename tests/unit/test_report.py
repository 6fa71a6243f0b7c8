"""The report of a converge: what the controllers contribute to it, and how it is assembled."""

import math

import pytest
import torch

import hdet
from hdet.monitor.report import Converged, Moment, assemble
from hdet.observe.slopes import ProbeLosses
from hdet.steer.controllers import Controllers, RoundObservation
from hdet.steer.one_slope import OneSlope
from hdet.steer.posterior import Posterior
from hdet.steer.published import Published

NAMES = ("weight_decay",)


def decay():
    weight = torch.nn.Parameter(torch.zeros(1))
    decay = hdet.param_group("weight_decay", spread=0.5, bounds=(0.01, 0.2))
    decay.attach(torch.optim.SGD([weight], lr=0.1, weight_decay=0.1))
    return decay


def controllers(controller=None, rates=1, names=NAMES):
    return Controllers(
        controller or Posterior(), OneSlope(), auto_lr=True, rates=rates, names=names, replicas=4, spread=0.1,
        design="orthogonal", seed=0,
    )  # fmt: skip


def observation(k, losses=(1.0, 1.1, 0.9, 1.0), probe=True):
    one = (1.0,) * 4
    above, below = (1.1 + 0.01 * k, 1.3, 0.9, 1.2), (1.0, 0.8, 1.1, 0.9)
    seen = ProbeLosses(above, below, (0.9,) * 4, (1.1,) * 4, one) if probe else None
    return RoundObservation(losses, (0.1,), 0.1 + 0.01 * k, 0.01, 1.0, 0.55, 0.0, 4.0, seen, (0.05,))


def test_a_move_is_an_update_clamped_to_the_bounds():
    by_move, by_update, h = controllers(), controllers(), decay()
    for k in range(30):
        report = by_move.move(k, observation(k), [h])
        centre = by_update.centre_states[0]
        gains = by_update.gains
        signal = by_update.update(k, observation(k), [(h.spread_at(centre.position), h.move)])
        (after,) = by_update.centre_states
        by_update.centre_states = [after._replace(position=h.clamped(after.position))]
        assert by_move.lr_states == by_update.lr_states
        assert by_move.centre_states == by_update.centre_states
        assert (report.gain, report.next_gain) == (gains, by_update.gains)
        assert report.hypergradient == signal.hypergradient
        assert report.slopes == signal.slopes
        assert report.multipliers == (by_move.multipliers(0, k),)
        (of_decay,) = report.hyperparameters
        assert of_decay.centre == h.value(centre.position)
        assert of_decay.next_centre == h.value(by_update.centre_states[0].position)
        (levels,) = by_move.hyperparameter_levels(k)
        assert of_decay.values == tuple(h.value(centre.position, level) for level in levels)
        assert (of_decay.effect, of_decay.error) == signal.effects[0]
    assert by_move.gains != (1.0,)
    assert by_move.centre_states[0].position != 0


def test_a_converge_inside_a_round_moves_nothing():
    resting, h = controllers(), decay()
    for k in range(5):
        resting.move(k, observation(k), [h])
    before = resting.state()
    report = resting.rest(5, [h])
    assert resting.state() == before
    assert report.gain == report.next_gain == resting.gains
    assert all(math.isnan(x) for x in (*report.hypergradient, *report.slopes, report.hyperparameters[0].effect))
    assert report.hyperparameters[0].centre == report.hyperparameters[0].next_centre


def test_a_rollback_divides_the_gains_and_keeps_the_centres():
    undone, h = controllers(), decay()
    for k in range(5):
        undone.move(k, observation(k), [h])
    gains, position, (before,) = undone.gains, undone.centre_states[0].position, undone.lr_states
    report = undone.roll_back(5, [h], divisor=3.0)
    assert report.gain == gains
    assert report.next_gain == undone.gains == (gains[0] / 3.0,)
    assert undone.centre_states[0].position == position
    assert undone.centre_states[0].rounds == 0
    assert undone.lr_states == [Posterior().cut(before, 3.0)]


@pytest.mark.parametrize("rates", [1, 2])
def test_a_report_is_by_parameter_group(rates):
    moved = controllers(Published(warmup_rounds=0), rates, ())
    seen = observation(0, (1.0, 2.0, 3.0, 4.0), probe=False)._replace(schedule=(0.1, 0.01), movement=())
    control = moved.move(0, seen)
    moment = Moment(20, 0, True, ("body", "head"), (0.1, 0.01), 4, True)
    report = assemble(moment, (1.0, math.nan, 3.0, 4.0), control)
    assert report.replicas == 4
    assert report.mean_loss == pytest.approx(8 / 3)
    assert report.next_gain == tuple(moved.gains[g if rates == 2 else 0] for g in range(2))
    assert report.base_lr == (0.1, 0.01)
    for g, base in enumerate(report.base_lr):
        rhos = moved.multipliers(g if rates == 2 else 0, 0)
        assert report.replica_lr[g] == tuple(base * rho for rho in rhos)
    assert all(math.isnan(distance) for distance in report.distance)
    assert not report.rolled_back

    landed = report.with_converged(Converged((0.1, 0.2, 0.3, 0.4), (1,), 1024, 0.5))
    assert (landed.distance, landed.excluded) == ((0.1, 0.2, 0.3, 0.4), (1,))
    assert (landed.converge_bytes, landed.converge_ms) == (1024, 500.0)
    unmeasured = report.with_converged(Converged((), (), 1024, 0.5))
    assert len(unmeasured.distance) == 4


def test_no_finite_loss_has_no_mean():
    moment = Moment(20, 0, False, ("all",), (0.1,), 1, True)
    report = assemble(moment, (math.nan, math.inf, math.nan, math.nan), controllers(names=()).rest(0), rolled_back=True)
    assert math.isnan(report.mean_loss)
    assert report.rolled_back
