"""TwoSlope, the probe's parts, snapshots, find_lr and found schedules, without processes."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hdet
from hdet.converge.buckets import fill_buckets
from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.explore.spread import multipliers
from hdet.model.snapshot import Snapshot
from hdet.model.weights import Weights
from hdet.observe.probe import FORGOTTEN, Batches, evaluate, evaluation
from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.schedules.forecast import forecast
from hdet.schedules.found import Recorder
from hdet.steer.centres import Centres, RoundObservation
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import OneSlope
from hdet.steer.recovery import Recovery
from hdet.steer.two_slope import TwoSlope

RHO = multipliers(4, 0.11)


def probe_of(raw, debiased, noise, further=None, level=2.0, lag=4.0, rho=RHO):
    """Losses of a probe whose slopes are these. By default the far point is twice as bad as the one beside it."""
    further = abs(level - lag * debiased) if further is None else further
    above = tuple(level + noise - lag * debiased - (r - 1) * raw for r in rho)
    below = tuple(level + noise - lag * debiased + (r - 1) * raw for r in rho)
    levels = (level - lag * debiased, level + lag * debiased, level + noise + lag * debiased)
    levels += (level - lag * debiased + further,)
    return ProbeLosses(above, below, *((x,) * len(rho) for x in levels))


def seen(probe, progress=0.3, height=1.0, final=0.0):
    return Observation((), RHO, 0.1, progress, 0.01, height, 0.55, final, probe, 4.0)


def run(config, probes, progress=0.3, **more):
    state = ControllerState()
    for probe in probes:
        state, _ = config.update(state, seen(probe, progress, **more))
    return state


@given(*[st.floats(-1, 1)] * 4, st.floats(0, 10))
def test_slopes_are_read_off_the_losses(raw, debiased, noise, further, level):
    found = slopes_of(probe_of(raw, debiased, noise, further, level), RHO, 4.0)
    assert found == pytest.approx((raw, debiased, noise, further), abs=1e-9)


def test_a_replica_without_finite_losses_is_left_out():
    probe = probe_of(0.5, 0.1, 0.2, 0.0)
    broken = ProbeLosses((math.nan, *probe.above[1:]), *probe[1:])
    assert slopes_of(broken, RHO, 4.0) == pytest.approx((0.5, 0.1, 0.2, 0.0), abs=1e-9)
    assert slopes_of(ProbeLosses(*((math.nan,) * 3 + row[3:] for row in probe)), RHO, 4.0) is None
    alike = slopes_of(probe, (1.0,) * 4, 4.0)  # learning rates did not differ: the debiased slope needs no difference
    assert math.isnan(alike.raw)
    assert alike[1:] == pytest.approx((0.1, 0.2, 0.0), abs=1e-9)
    unknown = slopes_of(probe._replace(far=(math.inf, *probe.far[1:])), RHO, 4.0)  # a far point may be anything
    assert unknown[:3] == pytest.approx((0.5, 0.1, 0.2))
    assert math.isnan(unknown.further)


def test_the_slopes_of_a_quadratic():
    """L = h theta^2 / 2: for a round's displacement d that ends at theta, R = -h theta d; for the slow average's
    velocity v at e, A = -h e v, and E is what theta's distance from e costs, less the curvature along v. From e = 0.5
    at a velocity of -0.01 a round the loss falls until 12.5 times as far away as e + (e - f) is, and rises beyond."""
    h, theta, d, e, v, lag = 3.0, 0.7, -0.2, 0.5, -0.01, 4.0
    far = 24.0

    def loss(x):
        return h * x * x / 2

    probe = ProbeLosses(
        tuple(loss(theta + (r - 1) * d) for r in RHO),
        tuple(loss(theta - (r - 1) * d) for r in RHO),
        (loss(e + lag * v),) * 4,
        (loss(e - lag * v),) * 4,
        (loss(2 * e - theta),) * 4,
        (loss(e + far * lag * v),) * 4,
    )
    found = slopes_of(probe, RHO, lag)
    assert found.raw == pytest.approx(-h * theta * d)
    assert found.debiased == pytest.approx(-h * e * v)
    spread = sum(((r - 1) * d) ** 2 for r in RHO) / 4
    assert found.noise == pytest.approx(h / 2 * ((theta - e) ** 2 + spread / 2 - (lag * v) ** 2))
    assert found.further == pytest.approx(0, abs=1e-9)  # as far beyond the lowest point as e + (e - f) is before it


@pytest.mark.parametrize(
    ("slopes", "progress", "direction"),
    [
        ((0.1, 0.1, 0.0), 0.3, 1),  # everything asks for more
        ((-0.5, -0.1, 0.5), 0.3, -1),  # and for less
        ((-0.5, 0.1, 0.1), 0.05, -1),  # early the raw slope rules
        ((-0.5, 0.1, 0.1), 0.4, 1),  # later the debiased one
        ((-0.1, 0.001, 0.5), 0.4, -1),  # with some of the noise held against it
        ((math.nan, 0.001, 0.5), 0.4, -1),  # even if learning rates do not differ, and the raw slope says nothing
        ((0.1, 0.1, 0.0), 0.6, 0),  # after until=0.55 it rests
    ],
)
def test_which_way_the_gain_moves(slopes, progress, direction):
    probes = [probe_of(*(s * (1 + 0.01 * i) for s in slopes)) for i in range(8)]
    gain = run(TwoSlope(), probes, progress).gain
    assert (gain > 1) - (gain < 1) == direction


def test_evidence_is_the_documented_sum():
    config = TwoSlope(ramp=0.2, noise_weight=(0.3, 0.1))
    slopes = Slopes(2.0, 3.0, 5.0, math.nan)
    for final in (0.0, 1.0):
        assert config.evidence(slopes, 0.0, 0.6, final) == 2.0
        assert config.evidence(slopes, 0.1, 0.6, final) == pytest.approx(0.5 * 2.0 + 0.5 * (3.0 - 0.3 * 5.0))
        assert config.evidence(slopes, 0.2, 0.6, final) == pytest.approx(3.0 - 0.3 * 5.0)
    assert config.evidence(slopes, 0.4, 0.6, 0.0) == pytest.approx(3.0 - math.sqrt(0.03) * 5.0)
    assert config.evidence(slopes, 0.6, 0.6, 0.0) == pytest.approx(3.0 - 0.1 * 5.0)
    assert config.evidence(slopes, 0.6, 0.6, 0.5) == pytest.approx(3.0 - 1.1 * 5.0)


def test_nothing_moves_inside_the_noise():
    generator = torch.Generator().manual_seed(0)
    moves = []
    for _ in range(200):
        noise = torch.randn(12, generator=generator).tolist()
        moves.append(abs(math.log(run(TwoSlope(), [probe_of(x, x, 0.0) for x in noise]).gain)))
    steady = [probe_of(1 + 0.1 * x, 1 + 0.1 * x, 0.0) for x in torch.randn(12, generator=generator).tolist()]
    assert sum(moves) / len(moves) < 0.2 * math.log(run(TwoSlope(), steady).gain)


def test_a_noisy_warm_up_does_not_hide_the_slope_that_takes_over():
    """The raw slope swings by a hundred times what the debiased one says: once its weight is gone, so is its noise."""
    state, config = ControllerState(), TwoSlope()
    for k in range(1, 31):
        progress = k / 100
        raw = (-1) ** k * 2.0 if progress < config.ramp else -2.0
        probe = probe_of(raw, -0.02 * (1 + 0.1 * (-1) ** k), 0.0)
        before = state.gain
        state, _ = config.update(state, seen(probe, progress))
        if progress < config.ramp:
            assert state.gain == pytest.approx(1, abs=0.2)
        else:  # a whole step down in every round
            assert math.log(state.gain / before) == pytest.approx(-config.step * config.down)


def gain_after(rounds):
    """What ``(debiased slope, training loss)`` of so many rounds lead to: the first 20, and the rest."""
    state, gains = ControllerState(), []
    for debiased, loss in rounds:
        state, _ = TwoSlope().update(state, seen(probe_of(0.0, debiased, 0.0, 100.0))._replace(losses=(loss,)))
        gains.append(state.gain)
    return gains[19], gains[-1]


@pytest.mark.parametrize(
    ("early", "late", "moves"),
    [(100.0, 1.0, True), (0.1, 1e-3, True), (1.0, 1.0, False), (math.nan, math.nan, False), (-1.0, -100.0, False)],
)
def test_slopes_count_relative_to_the_loss_of_their_time(early, late, moves):
    """After lively rounds, whose errors linger: only if the loss has fallen as much, relative to it later slopes stand
    out. Not where no loss is known, or where it is not positive."""
    lively = [((-1) ** k * 0.1, early) for k in range(20)]
    before, after = gain_after([*lively, *[(0.005, late)] * 16])
    assert before == pytest.approx(1, abs=0.05)
    assert (after > 1.2 * before) == moves
    assert moves or after == before


def test_for_less_slopes_must_ask_in_both_units():
    """What the loss was worth then still argues for more."""
    progress, regress = [(0.1, 100.0)] * 10 + [(0.11, 100.0)] * 10, [(-0.02, 1.0)] * 4
    before, after = gain_after([*progress, *regress])
    assert after >= before
    before, after = gain_after([*((slope / 100, 1.0) for slope, _ in progress), *regress])
    assert after < before
    before, after = gain_after([*progress, *[(-0.1, 1.0)] * 8])
    assert after < before


@pytest.mark.parametrize(("further", "falls"), [(-1.0, False), (0.9, False), (1.1, True), (math.nan, True)])
def test_on_a_plateau_the_gain_stands(further, falls):
    """No progress, and noise: it falls only if to go far costs half of the loss, 2, or if the training loss rises."""
    config, state = TwoSlope(), ControllerState()
    for k in range(12):
        probe = probe_of(-0.1 - 0.01 * (-1) ** k, 0.0, 0.1, further)
        state, x = config.update(state, seen(probe)._replace(losses=(2.0,)))
        assert x < 0
    assert (state.gain < 1) == falls
    for _ in range(12):
        state, _ = config.update(state, seen(probe_of(-0.1, 0.0, 0.1, further))._replace(losses=(4.0,)))
    assert state.gain < 0.7


def test_a_learning_rate_that_is_too_high_does_not_hide_itself():
    """The raw slope asks for less in every round, in one ten times as loudly: that one is not to widen the error
    so much that for twenty rounds nothing stands out of it."""
    config, state = TwoSlope(), ControllerState()
    for k in range(16):
        loud = 10 if k == 8 else 1
        before = state.gain
        state, _ = config.update(state, seen(probe_of(-0.1 * loud * (1 + 0.1 * (-1) ** k), 0.0, 0.0), 0.01))
    assert state.gain < before < 0.1


def test_the_gain_falls_where_the_training_loss_rises():
    """Once per rise, whatever the slopes say; not for noise, not for what is not finite, and not if told not to."""

    def gains(losses, share=0.01, **settings):
        config, state, found = TwoSlope(**settings), ControllerState(), []
        for k, loss in enumerate(losses):
            probe = probe_of(0.1, 0.01 * (-1) ** k, 0.0)  # nothing stands out
            now = seen(probe)._replace(losses=(loss, loss, math.nan, loss), share=share)
            state, _ = config.update(state, now)
            found.append(state.gain)
        return found

    risen = [2.0, 1.5, 1.2] + [1.0] * 12 + [1.5] * 12
    config = TwoSlope()
    fall = math.exp(-config.step * config.down)
    assert gains(risen)[14] == 1
    assert gains(risen)[-1] == pytest.approx(fall)
    assert gains([-loss for loss in reversed(risen)])[-1] == pytest.approx(fall)  # a loss may be negative
    assert gains([*risen, *[2.2] * 12])[-1] == pytest.approx(fall**2)
    assert gains([2.0, 1.5, 1.2] + [1.0] * 12 + [1.25] * 12)[-1] == 1
    assert gains([1.0 + 0.9 * (-1) ** k for k in range(40)])[-1] == 1
    assert gains([1.0] * 12 + [math.nan, math.inf] * 5)[-1] == 1
    assert gains(risen, rise=math.inf)[-1] == 1
    many = [loss for loss in risen for _ in range(10)]
    assert gains(many, share=0.001)[-1] == pytest.approx(fall)  # a whole step, in short rounds too
    assert gains([0.5, *[1.0] * 200], share=0.001)[-1] == 1  # whose first says little
    assert gains([0.0] * 12 + [1.0] * 12, rise=math.inf, threshold=2.0)[-1] == 1


@pytest.mark.parametrize("length", [0.01, 0.1, 0.25, 2.0])
@pytest.mark.parametrize(
    ("slopes", "progress"),
    [((-0.5, 0.1, 0.1, 0.0), 0.05), ((-0.5, 0.1, 0.05, 0.0), 0.3), ((-0.5, 0.03, 0.2, 0.0), 0.3)],
)
def test_rounds_of_any_length_lead_to_the_same_gain(slopes, progress, length):
    """In hundredths of the run. Progress in a round goes with its length, noise does not."""
    config = TwoSlope()
    evidence = config.evidence(Slopes(*slopes), progress, 0.55, 0.0)

    def log_gain(length):
        state = ControllerState()
        for k in range(round(16 / length)):
            raw, debiased, noise, _ = ((1 + 0.1 * (-1) ** k) * slope for slope in slopes)
            observation = seen(probe_of(raw * length, debiased * length, noise), progress)
            state, x = config.update(state, observation._replace(share=length / 100))
            assert x == pytest.approx((1 + 0.1 * (-1) ** k) * evidence)
        return math.log(state.gain)

    expected = log_gain(1.0)
    assert abs(expected) > 1
    # In one round the gain moves no farther than a step, however long it is.
    assert log_gain(length) == pytest.approx(expected / max(1.0, length), rel=0.2)


def test_a_rise_is_scaled_by_the_schedules_height_and_a_fall_is_not():
    up, down = ([probe_of(s * (1 + 0.01 * i), s * (1 + 0.01 * i), 0.0) for i in range(8)] for s in (1, -1))
    assert math.log(run(TwoSlope(), up, height=0.5).gain) == pytest.approx(math.log(run(TwoSlope(), up).gain) / 2)
    assert run(TwoSlope(), down, height=0.5).gain == run(TwoSlope(), down).gain


def test_far_below_the_best_learning_rate_the_gain_climbs():
    """In the ramp, whatever the schedule's height; and only if the slopes ask for more."""
    config = TwoSlope(climb=3.0)

    def change(slope, further, height, progress=0.2):
        probes = [probe_of(s := slope * (1 + 0.01 * i), s, 0.0, further) for i in range(8)]
        return math.log(run(config, probes, progress, height=height).gain)

    for height in (0.1, 1.0):
        assert change(1, -0.1, height) == pytest.approx(3 * change(1, 0.1, 1.0))
        assert change(-1, 100.0, height) < change(-1, -0.1, height) == 0
        assert change(1, -0.1, height, 0.21) == change(1, 0.1, height, 0.21) > 0
    assert config.reach(1.0) == config.far
    assert config.reach(0.25) == 4 * config.far
    assert math.isfinite(config.reach(0.0))


def test_non_finite_losses_lower_the_gain_and_no_probe_moves_nothing():
    broken = ProbeLosses(*((math.inf,) * 4,) * 6)
    state, slope = TwoSlope(step=0.4).update(ControllerState(), seen(broken))
    assert state.gain == pytest.approx(math.exp(-0.4))
    assert slope == -math.inf
    assert TwoSlope().update(ControllerState(), seen(None)) == (ControllerState(), None)


def test_several_learning_rates_share_what_one_probe_says():
    """Two groups whose progress along the slow average is 0.3 and -0.1 a round, with a noise of 0.2: some replicas go
    forward in one and back in the other, and the far point is judged by all going forward."""
    centres = Centres(
        TwoSlope(), OneSlope(), auto_lr=True, rates=2, names=(), replicas=4, spread=0.1, design="orthogonal", seed=0
    )
    lag, level, progress, noise = 4.0, 5.0, (0.3, -0.1), 0.2
    columns = zip(*centres.directions(0), strict=True)
    odd = [-lag * sum(p * z for p, z in zip(progress, column, strict=True)) for column in columns]
    there = (level + noise,) * 4
    probe = ProbeLosses(there, there, tuple(level + x for x in odd), tuple(level - x for x in odd), there, (4.0,) * 4)
    told = centres.observe(0, RoundObservation((), (0.1, 0.1), 0.3, 0.01, 1.0, 0.55, 0.0, lag, probe))
    assert told.slopes == pytest.approx((0.0, 0.2, 0.2, 4.0 - (level - lag * 0.2)), abs=1e-9)
    k = TwoSlope().evidence(Slopes(0.0, 0.0, -1.0, 0.0), 0.3, 0.55, 0.0)
    assert told.hypergradient == pytest.approx([p - k * noise / 2 for p in progress])


losses = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=200)
@given(st.lists(st.lists(losses, min_size=24, max_size=24), max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_bounds_hold_under_any_input(rounds, progress, height):
    config = TwoSlope(bounds=(0.5, 3.0))
    probes = [ProbeLosses(*(tuple(row[4 * i : 4 * i + 4]) for i in range(6))) for row in rounds]
    state = run(config, probes, progress, height=height)
    assert 0.5 <= state.gain <= 3.0


@pytest.mark.parametrize(
    "bad",
    [{"step": 0}, {"ramp": 0}, {"noise_weight": (0.0, 1.0)}, {"rise": 1.0}, {"smoothing": 1.0},
     {"overshoot": -1}, {"threshold": -1}, {"slack": 0}, {"down": 0},
     {"far": 0.5}, {"climb": 0}, {"rest_below": 1.5}, {"bounds": (2, 3)}],
)  # fmt: skip
def test_two_slope_refuses_bad_values(bad):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(bad))}"):
        TwoSlope(**bad)


# -------------------------------------------------------------------------------------------------------- the probe


def test_the_slow_average_and_its_trail_are_the_documented_sums():
    means = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    piece = torch.zeros(5)
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    for storage in ({}, {"dtype": torch.bfloat16}, {"device": torch.device("cpu")}):
        slow = SlowAverage(0.25, **storage)
        e = f = means[0].double()
        slow.unpack(0, bucket, means[0].clone(), 1)
        for n, mean in enumerate(means[1:], start=2):
            slow.unpack(0, bucket, mean.clone(), 1)
            e = e + 1.25 / (n + 0.25) * (mean - e)
            f = f + 1.25 / (n + 0.25) * (e - f)
            assert torch.equal(piece, mean)
        tolerance = {"atol": 0.05, "rtol": 0.05} if "dtype" in storage else {}
        torch.testing.assert_close(slow.point(0, 1, piece), (2 * e - f).float(), **tolerance)
        torch.testing.assert_close(slow.point(0, -1, piece), f.float(), **tolerance)
        torch.testing.assert_close(slow.point(0, 3.0, piece), (4 * e - 3 * f).float(), **tolerance)
        torch.testing.assert_close(slow.mirrored(0, means[-1]), (2 * e - means[-1]).float(), **tolerance)


def test_a_slow_average_in_bf16_keeps_up_over_thousands_of_rounds():
    """Its steps are then smaller than half a digit."""
    piece, rounds = torch.zeros(500), 2000
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    slow = SlowAverage(0.25, dtype=torch.bfloat16)
    for n in range(rounds):
        slow.unpack(0, bucket, torch.full((500,), 1 + n / rounds), 1)
    assert slow.rounds == rounds
    progress = slow.point(0, 1.0, piece) - slow.point(0, 0.0, piece)
    assert progress.mean() == pytest.approx(slow.lag / rounds, rel=0.02)


@pytest.mark.parametrize("power", [0.0, 0.25, 3.0])
def test_the_lag_of_a_slow_average_is_that_of_steady_progress(power):
    piece = torch.zeros(1, dtype=torch.float64)
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    slow = SlowAverage(power)
    for n in range(1, 31):
        slow.unpack(0, bucket, torch.full((1,), float(n), dtype=torch.float64), 1)
        progress = slow.point(0, 1, piece) - slow.point(0, 0, piece)
        assert float(progress) == pytest.approx(slow.lag if n > 1 else 0.0)


def probed_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def test_evaluate_uses_the_six_points_and_leaves_no_trace():
    model = probed_model()
    model[2].eval()  # a part that the user keeps in eval mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    (bucket,) = fill_buckets(parameters, 2**20, lambda t: t.device)
    mean = bucket.pack()
    displacement = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean.clone(), 1)
    slow.unpack(0, bucket, mean * 1.1, 1)
    bucket.write(mean)
    batch = torch.randn(16, 4)
    visited = []

    def loss_fn(module, x):
        visited.append(bucket.pack())
        assert not torch.is_grad_enabled()
        assert not any(part.training for part in module.modules())
        torch.rand(3)
        return module(x).square().mean()

    state = torch.get_rng_state()
    found = evaluate((model,), loss_fn, batch, [Point(bucket, mean, displacement)], slow, Weights((model,)), reach=5.0)
    assert len(set(found)) == 6
    e = slow.point(0, 0, mean)
    for at, expected in zip(
        visited,
        (mean + displacement, mean - displacement, slow.point(0, 1, mean), slow.point(0, -1, mean), 2 * e - mean,
         slow.point(0, 5.0, mean)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(at, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [True, True, False, True]
    assert model.training


def test_a_loss_that_draws_noise_draws_the_same_at_every_point():
    """Points are compared with one another: the noise's own differences would hide the parameters'."""
    model = nn.Linear(4, 4)
    (bucket,) = fill_buckets(list(model.parameters()), 2**20, lambda t: t.device)
    mean = bucket.pack()
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean.clone(), 1)
    drawn = []

    def loss_fn(module, x):
        drawn.append(torch.randn_like(x))  # as in a diffusion model
        if len(drawn) == 2:
            torch.rand(7)
        return (module(x + drawn[-1]) - x).square().mean()

    points = [Point(bucket, mean, torch.zeros_like(mean))]
    for _ in range(2):
        found = evaluate((model,), loss_fn, torch.randn(16, 4), points, slow, Weights((model,)))
        assert len(set(found)) == 1
    assert all(torch.equal(noise, drawn[0]) for noise in drawn[:6])
    assert all(torch.equal(noise, drawn[6]) for noise in drawn[6:])
    assert not torch.equal(drawn[0], drawn[6])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_probe_normalises_by_the_statistics_that_training_uses(frozen):
    """Running statistics are those of recent parameters: at another point they would make the loss worse than it is."""
    model = probed_model()
    if frozen:
        model[1].eval()  # as in fine-tuning with fixed statistics
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(16, 4) * 3 + 1

    def output():
        with torch.no_grad():
            return model[3](model[1](model[0](batch)))

    expected = output()  # without dropout; outside of the probe it moves the running statistics
    model.load_state_dict(before)

    def evaluated():
        with evaluation((model,)):
            assert not model[1].training
            assert torch.equal(model(batch), expected)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        evaluated()
    assert [part.training for part in model] == [True, not frozen, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_instance_normalisation_that_tracks_statistics_does_not_use_them_in_the_probe():
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with evaluation((norm,)):
        found = norm(batch)
    assert norm.track_running_stats
    assert norm.training
    assert norm.num_batches_tracked == 0
    assert torch.equal(found, norm(batch))


@pytest.mark.parametrize("bad", [torch.ones(2), torch.tensor(1), "1.0", None])
def test_a_loss_function_must_return_a_scalar(bad):
    model = probed_model()
    (bucket,) = fill_buckets(list(model.parameters()), 2**20, lambda t: t.device)
    mean = bucket.pack()
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean, 1)
    with pytest.raises(TypeError, match="Must be a scalar loss"):
        evaluate((model,), lambda *_: bad, None, [Point(bucket, mean, torch.ones_like(mean))], slow, Weights((model,)))
    assert torch.equal(bucket.pack(), mean)
    assert model.training


def test_batches_are_used_again_when_they_are_forgotten():
    batches = Batches(hdet.Probe(loss_fn=print), round_length=10)
    memory = torch.zeros(2)
    for i in range(8):
        assert batches.ready == (i > math.ceil(FORGOTTEN / 10))
        if batches.ready:
            assert batches.take()["x"].tolist() == [i - 5.0] * 2
        batches.offer({"x": memory.fill_(i)})  # as a loader does that uses its memory again
    own = Batches(hdet.Probe(loss_fn=print, batches=[1, 2]), round_length=10)
    assert own.ready
    assert [own.take() for _ in range(5)] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": TwoSlope()}, "needs the paired probe"),
        ({"probe": print, "total_steps": None}, "must know how long"),
        ({"probe": print, "total_steps": 100, "overlap_steps": 2}, "exclude one another"),
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
    assert ensemble._forecast.peak == pytest.approx(0.1)
    assert ensemble._forecast.heights[0] == pytest.approx(0.1)
    assert ensemble._until == pytest.approx(0.1 + 0.9 * math.acos(0.4) / math.pi, abs=0.02)
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


# --------------------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_snapshot_brings_everything_back_in_place(kind, device):
    model = probed_model()
    optimizer = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step():
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()

    fresh = Snapshot([model], optimizer, device)
    fresh.take()
    snapshot = Snapshot([model], optimizer, device)
    for _ in range(2):  # the second take() reuses the first one's memory
        step()
        snapshot.take()
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    step()
    after = [p.detach().clone() for p in model.parameters()]
    snapshot.restore()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    torch.set_rng_state(state)
    step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))
    fresh.restore()
    assert all(not s or kind is torch.optim.Adagrad for s in optimizer.state.values())


# ---------------------------------------------------------------------------------------------------------- recovery


def test_a_state_on_its_way_to_blowing_up_is_not_one_to_go_back_to():
    model = nn.Linear(2, 1)
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=0.1), None)
    for weight, loss in ((1.0, 2.0), (2.0, 1.0), (3.0, 2.1), (4.0, 2.5), (5.0, 3.9)):
        nn.init.constant_(model.weight, weight)
        assert not recovery.is_needed([True], [loss], watches_losses=True)
        recovery.observe([loss])
        recovery.keep(loss)
    for count, bound in ((1, 4.0), (2, 8.0)):
        assert not recovery.is_needed([True], [bound - 0.1], watches_losses=True)
        assert recovery.is_needed([True], [bound + 0.1], watches_losses=True)
        recovery.go_back()
        assert recovery.count == count
        assert model.weight.tolist() == [[3.0, 3.0]]
        nn.init.constant_(model.weight, 6.0)
    assert recovery.is_needed([False], [], watches_losses=False)
    recovery.keep()  # nothing is known of its loss
    recovery.go_back()
    assert model.weight.tolist() == [[6.0, 6.0]]


def test_a_loss_that_no_learning_rate_lowers_does_not_end_the_run():
    model = nn.Linear(2, 1)
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=0.1), None)
    recovery.observe([1.0])
    for _ in range(100):  # every other round meets an example that is lost
        recovery.keep(0.1)
        if recovery.is_needed([True], [10.0], watches_losses=True):
            recovery.go_back()
    assert recovery.count == 3
    for _ in range(5):
        assert recovery.is_needed([False], [10.0], watches_losses=True)
        recovery.go_back()
    with pytest.raises(hdet.DivergedError, match="after 8 rollbacks"):
        recovery.is_needed([False], [10.0], watches_losses=True)


# ----------------------------------------------------------------------------------------------------------- find_lr


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


# --------------------------------------------------------------------------------------------------- found schedules


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
            ensemble._centres.learning_rates = [ControllerState(gain=ensemble.gains[0] * (2.0 if step == 18 else 0.3))]
            ensemble._draw()
            ensemble._fan_out.undo()
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
