"""The spread is symmetric with mean exactly 1, and its permutations need no random state."""

import collections
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdet.explore.spread import assignment, multipliers, permutation

spreads = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 300), spreads)
def test_symmetric_with_mean_exactly_one(replicas, spread):
    """rho_r = 1 + alpha (r - (N-1)/2) / max((N-1)/2, 1/2)"""
    rho = multipliers(replicas, spread)
    assert math.fsum(rho) == replicas
    assert all(low - 1 == 1 - high for low, high in zip(rho, reversed(rho), strict=True))
    assert list(rho) == sorted(rho)
    centre = (replicas - 1) / 2
    for r, value in enumerate(rho):
        assert value == pytest.approx(1 + spread * (r - centre) / max(centre, 0.5), abs=1e-15)


@given(st.integers(2, 64), st.floats(1e-6, 0.999))
def test_spans_the_whole_interval(replicas, spread):
    rho = multipliers(replicas, spread)
    assert rho[0] == pytest.approx(1 - spread)
    assert rho[-1] == pytest.approx(1 + spread)
    assert len(set(rho)) == replicas


def test_small_ensembles():
    assert multipliers(1, 0.5) == (1.0,)
    assert multipliers(2, 0.5) == (0.5, 1.5)
    assert multipliers(3, 0.5) == (0.5, 1.0, 1.5)
    assert multipliers(5, 0.0) == (1.0,) * 5


@given(st.integers(1, 50), st.integers(), st.integers(0, 10**9), st.text(max_size=8))
def test_a_permutation_that_depends_on_its_arguments_alone(replicas, seed, round, name):
    state = random.getstate()
    drawn = permutation(replicas, seed=seed, round=round, hyperparameter=name)
    assert sorted(drawn) == list(range(replicas))
    assert drawn == permutation(replicas, seed=seed, round=round, hyperparameter=name)
    assert random.getstate() == state


def test_golden_permutations():
    """Saved runs resume under these draws: they must never change between versions."""
    assert permutation(8, seed=0, round=0, hyperparameter="lr/0") == (2, 0, 4, 1, 6, 3, 7, 5)
    assert permutation(4, seed=7, round=12, hyperparameter="lr/1") == (0, 1, 2, 3)


@pytest.mark.parametrize("vary", ["seed", "round", "hyperparameter"])
def test_each_argument_draws_anew(vary):
    base = {"seed": 1, "round": 1, "hyperparameter": "lr/0"}
    drawn = {permutation(6, **base | {vary: f"lr/{i}" if vary == "hyperparameter" else i}) for i in range(200)}
    assert len(drawn) > 150


def test_permutations_are_uniform_and_independent_between_hyperparameters():
    """Chi-squared over the 24 x 24 pairs for two hyperparameters: 3 standard deviations at most."""
    draws = 24 * 24 * 20
    pairs = collections.Counter(
        tuple(permutation(4, seed=3, round=k, hyperparameter=f"lr/{g}") for g in (0, 1)) for k in range(draws)
    )
    cells = 24 * 24
    expected = draws / cells
    chi = (sum((n - expected) ** 2 for n in pairs.values()) + (cells - len(pairs)) * expected**2) / expected
    assert abs(chi - (cells - 1)) < 3 * math.sqrt(2 * (cells - 1))


@given(st.integers(1, 20), spreads, st.integers(0, 100))
def test_an_assignment_holds_every_multiplier_once(replicas, spread, round):
    held = assignment(replicas, spread, seed=0, round=round, hyperparameter="lr/0")
    assert sorted(held) == list(multipliers(replicas, spread))


@pytest.mark.parametrize("spread", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_bad_spread_names_the_value(spread):
    with pytest.raises(ValueError, match=f"Invalid spread={spread}"):
        multipliers(4, spread)


def test_no_replicas():
    with pytest.raises(ValueError, match="Invalid replicas=0"):
        multipliers(0, 0.1)
