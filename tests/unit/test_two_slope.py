"""TwoSlope, and the slopes that it weighs, without processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdet.explore.spread import multipliers
from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.steer.controllers import Controllers, RoundObservation
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import OneSlope
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
    controllers = Controllers(
        TwoSlope(), OneSlope(), auto_lr=True, rates=2, names=(), replicas=4, spread=0.1, design="orthogonal", seed=0
    )
    lag, level, progress, noise = 4.0, 5.0, (0.3, -0.1), 0.2
    columns = zip(*controllers.probe_directions(0), strict=True)
    odd = [-lag * sum(p * z for p, z in zip(progress, column, strict=True)) for column in columns]
    there = (level + noise,) * 4
    probe = ProbeLosses(there, there, tuple(level + x for x in odd), tuple(level - x for x in odd), there, (4.0,) * 4)
    told = controllers.update(0, RoundObservation((), (0.1, 0.1), 0.3, 0.01, 1.0, 0.55, 0.0, lag, probe))
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
