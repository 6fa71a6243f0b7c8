"""Identities of the published controller, and its bounds under any input."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hdet.explore.spread import multipliers
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.published import Published, hypergradient

any_float = st.floats()
finite = st.floats(allow_nan=False, allow_infinity=False)
tame = st.floats(-1e6, 1e6)
settings_of = st.builds(
    Published,
    meta_lr=st.floats(0, 1e6),
    momentum=st.floats(0, 0.999),
    temperature=st.floats(1e-6, 1e6),
    decay=st.floats(0, 0.99),
    bounds=st.tuples(st.floats(1e-6, 1.0), st.floats(1.0, 1e6)),
    warmup_rounds=st.integers(0, 3),
)


def observation(losses, spread=0.3, schedule=0.1):
    return Observation(tuple(losses), multipliers(len(losses), spread), schedule)


def run(config, rounds, **more):
    state = ControllerState()
    for losses in rounds:
        state, slope = config.update(state, observation(losses, **more))
        yield state, slope


@given(settings_of, st.floats(0, 0.99), st.lists(st.lists(any_float, min_size=3, max_size=3), max_size=20), tame)
def test_bounds_hold_under_any_input(config, spread, rounds, schedule):
    for state, _ in run(config, rounds, spread=spread, schedule=schedule):
        assert config.bounds[0] <= state.gain <= config.bounds[1]
        assert math.isfinite(state.velocity)


@given(settings_of, st.integers(2, 9), finite, st.integers(1, 10))
def test_equal_losses_move_nothing(config, replicas, loss, rounds):
    for state, slope in run(config, [[loss] * replicas] * rounds):
        assert slope == 0
        assert state[:2] == (1.0, 0.0)


@given(st.lists(tame, min_size=2, max_size=9, unique=True), st.floats(0.01, 0.9))
def test_better_high_rates_raise_the_gain_and_better_low_rates_lower_it(losses, spread):
    falling = sorted(losses, reverse=True)  # multipliers rise, losses fall: more is better
    assume(max(losses) - min(losses) > 1e-6 * max(map(abs, losses)))
    config = Published(warmup_rounds=0)
    (up, slope_up), (down, slope_down) = (
        next(run(config, [order], spread=spread)) for order in (falling, falling[::-1])
    )
    assert slope_up > 0 > slope_down
    assert up.gain > 1 > down.gain


@given(st.lists(tame, min_size=2, max_size=9), st.integers(-20, 20), st.floats(0.01, 0.9))
def test_the_unit_of_the_loss_does_not_matter(losses, power, spread):
    """sigma is in standard deviations of the losses: scaling them changes nothing. (Powers of two scale exactly.)"""
    rho = multipliers(len(losses), spread)
    scaled = tuple(loss * 2.0**power for loss in losses)
    assume(all(math.isfinite(x) and (abs(x) > 1e-290 or x == 0) for x in scaled))
    assert hypergradient(scaled, rho, 1.0) == pytest.approx(hypergradient(tuple(losses), rho, 1.0), abs=1e-12)


@given(st.lists(any_float, min_size=1, max_size=9), st.floats(0, 0.99), st.floats(1e-6, 1e6))
def test_the_hypergradient_stays_inside_the_spread(losses, spread, temperature):
    rho = multipliers(len(losses), spread)
    slope = hypergradient(tuple(losses), rho, temperature)
    if sum(map(math.isfinite, losses)) < 2:
        assert slope is None
    else:
        assert abs(slope) <= 2 * spread + 1e-12


@given(settings_of, st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), min_size=2, max_size=6))
def test_losses_that_are_all_non_finite_move_nothing(config, losses):
    state = ControllerState(1.0, 0.2, 5)
    assert config.update(state, observation(losses)) == (state, None)


@given(tame, tame, st.sampled_from([math.nan, math.inf]))
def test_a_non_finite_replica_is_left_out_of_the_hypergradient(a, b, bad):
    rho = multipliers(3, 0.3)
    assert hypergradient((a, b, bad), rho, 1.0) == hypergradient((a, b), rho[:2], 1.0)


def test_by_hand():
    """Two replicas: w = softmax((+-s)), s = 1 / sqrt(2) in units of the standard deviation."""
    config = Published(meta_lr=0.5, momentum=0.75, temperature=1.0, warmup_rounds=0)
    high = 1 / (1 + math.exp(-math.sqrt(2)))  # weight of the better replica
    delta = high * 1.2 + (1 - high) * 0.8 - 1
    state, slope = config.update(ControllerState(), Observation((2.0, 1.0), (0.8, 1.2), 0.1))
    assert slope == pytest.approx(delta)
    assert state.velocity == pytest.approx(0.25 * delta)
    assert state.gain == pytest.approx(math.exp(0.5 * 0.25 * delta))
    again, _ = config.update(state, Observation((2.0, 1.0), (0.8, 1.2), 0.1))
    assert again.velocity == pytest.approx(0.75 * 0.25 * delta + 0.25 * delta)
    assert math.log(again.gain) == pytest.approx(0.5 * (state.velocity + again.velocity))


def test_warmup_feeds_the_velocity_and_holds_the_gain():
    states = [state for state, _ in run(Published(warmup_rounds=2), [[2.0, 1.0]] * 3)]
    assert [state.gain for state in states[:2]] == [1.0, 1.0]
    assert states[1].velocity > states[0].velocity > 0
    assert states[2].gain > 1


def test_decay_returns_the_gain_to_the_users_schedule():
    state = ControllerState(8.0, 0.0, 5)
    config = Published(decay=0.5)
    for expected in (8**0.5, 8**0.25, 8**0.125):
        state, _ = config.update(state, observation([1.0, 1.0]))
        assert state.gain == pytest.approx(expected)


def test_the_velocity_does_not_wind_up_against_a_bound():
    config = Published(meta_lr=100.0, bounds=(0.5, 2.0), warmup_rounds=0)
    states = [state for state, _ in run(config, [[2.0, 1.0]] * 5 + [[1.0, 2.0]])]
    assert states[4].gain == 2.0
    assert states[4].velocity == 0.0
    assert states[5].gain < 2.0


def test_literal_is_the_published_update_word_for_word():
    lam, beta, sigma, gamma, base = 0.9, 0.8, 0.05, 0.01, 0.003
    config = Published(meta_lr=lam, momentum=beta, temperature=sigma, decay=gamma, literal=True)
    losses, rho = (2.31, 2.30, 2.33, 2.29), multipliers(4, 1 / 9)
    state, v, eta = ControllerState(), 0.0, base
    for _ in range(4):
        rates = [eta * m for m in rho]
        exponentials = [math.exp((sum(losses) / 4 - loss) / sigma) for loss in losses]
        weights = [e / sum(exponentials) for e in exponentials]
        delta = sum(w * h for w, h in zip(weights, rates, strict=True)) - sum(rates) / 4
        v = beta * v + (1 - beta) * delta
        eta = eta * (1 - gamma) + lam * v
        state, slope = config.update(state, Observation(losses, rho, base))
        assert slope == pytest.approx(delta, rel=1e-9)
        assert state.velocity == pytest.approx(v, rel=1e-9)
        assert state.gain * base == pytest.approx(eta, rel=1e-12)


def test_the_published_codes_sign_of_gamma_grows_the_rate_400_fold():
    """The story of a bug: with the decay's sign turned round, 600 rounds without any evidence multiply the rate by 391.
    Corrected, the same setting leaves the user's schedule alone."""
    state = ControllerState()
    for _ in range(600):
        state, _ = Published(decay=-0.01, literal=True).update(state, observation([1.0, 1.0]))
    assert state.gain == pytest.approx(1.01**600)
    assert 380 < state.gain < 400
    for final, _ in run(Published(decay=0.01), [[1.0, 1.0]] * 600):
        assert final.gain == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("meta_lr", -1.0), ("meta_lr", math.nan), ("meta_lr", math.inf), ("momentum", 1.0), ("momentum", -0.1),
        ("temperature", 0.0), ("decay", -0.01), ("decay", 1.0), ("bounds", (0.0, 2.0)), ("bounds", (0.5, 0.9)),
        ("bounds", (2.0, 3.0)), ("bounds", (0.5, math.inf)), ("warmup_rounds", -1), ("warmup_rounds", 1.5),
    ],
)  # fmt: skip
def test_bad_settings_name_the_value(field, value):
    with pytest.raises(TypeError if value == 1.5 else ValueError, match=f"Invalid {field}=") as caught:
        Published(**{field: value})
    assert "Must" in str(caught.value)


@settings(max_examples=200)
@given(settings_of, st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=5))
def test_pure(config, rounds):
    assert list(run(config, rounds)) == list(run(config, rounds))
