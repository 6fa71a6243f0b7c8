"""The slopes that a probe's losses come to, without processes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdet.explore.spread import multipliers
from hdet.observe.slopes import ProbeLosses, slopes_of
from hdet.steer.controllers import Controllers, RoundObservation
from hdet.steer.one_slope import OneSlope
from hdet.steer.posterior import Posterior

RHO = multipliers(4, 0.11)


def probe_of(raw, debiased, noise, level=2.0, lag=4.0, rho=RHO):
    """Losses of a probe whose slopes are these."""
    above = tuple(level + noise - lag * debiased - (r - 1) * raw for r in rho)
    below = tuple(level + noise - lag * debiased + (r - 1) * raw for r in rho)
    levels = (level - lag * debiased, level + lag * debiased, level + noise + lag * debiased)
    return ProbeLosses(above, below, *((x,) * len(rho) for x in levels))


@given(*[st.floats(-1, 1)] * 3, st.floats(0, 10))
def test_slopes_are_read_off_the_losses(raw, debiased, noise, level):
    found = slopes_of(probe_of(raw, debiased, noise, level), RHO, 4.0)
    assert found == pytest.approx((raw, debiased, noise), abs=1e-9)


def test_a_replica_without_finite_losses_is_left_out():
    probe = probe_of(0.5, 0.1, 0.2)
    for point in range(5):
        rows = [list(row) for row in probe]
        rows[point][0] = math.nan
        assert slopes_of(ProbeLosses(*map(tuple, rows)), RHO, 4.0) == pytest.approx((0.5, 0.1, 0.2), abs=1e-9)
    assert slopes_of(ProbeLosses(*((math.nan,) * 3 + row[3:] for row in probe)), RHO, 4.0) is None
    alike = slopes_of(probe, (1.0,) * 4, 4.0)  # learning rates did not differ: the debiased slope needs no difference
    assert math.isnan(alike.raw)
    assert alike[1:] == pytest.approx((0.1, 0.2), abs=1e-9)


def test_the_slopes_of_a_quadratic():
    """L = h theta^2 / 2: for a round's displacement d that ends at theta, R = -h theta d; for the slow average's
    velocity v at e, A = -h e v, and E is what theta's distance from e costs, less the curvature along v."""
    h, theta, d, e, v, lag = 3.0, 0.7, -0.2, 0.5, -0.01, 4.0

    def loss(x):
        return h * x * x / 2

    probe = ProbeLosses(
        tuple(loss(theta + (r - 1) * d) for r in RHO),
        tuple(loss(theta - (r - 1) * d) for r in RHO),
        (loss(e + lag * v),) * 4,
        (loss(e - lag * v),) * 4,
        (loss(2 * e - theta),) * 4,
    )
    found = slopes_of(probe, RHO, lag)
    assert found.raw == pytest.approx(-h * theta * d)
    assert found.debiased == pytest.approx(-h * e * v)
    spread = sum(((r - 1) * d) ** 2 for r in RHO) / 4
    assert found.noise == pytest.approx(h / 2 * ((theta - e) ** 2 + spread / 2 - (lag * v) ** 2))


def test_several_learning_rates_share_what_one_probe_says():
    """Two groups whose progress along the slow average is 0.3 and -0.1 a round, with a noise of 0.2: some replicas go
    forward in one and back in the other."""
    controller = Posterior(noise_weight=0.5)
    controllers = Controllers(
        controller, OneSlope(), auto_lr=True, rates=2, names=(), replicas=4, spread=0.1, design="orthogonal", seed=0
    )
    lag, level, progress, noise = 4.0, 5.0, (0.3, -0.1), 0.2
    columns = zip(*controllers.probe_directions(0), strict=True)
    odd = [-lag * sum(p * z for p, z in zip(progress, column, strict=True)) for column in columns]
    there = (level + noise,) * 4
    probe = ProbeLosses(there, there, tuple(level + x for x in odd), tuple(level - x for x in odd), there)
    told = controllers.update(0, RoundObservation((), (0.1, 0.1), 0.3, 0.3, 1.0, 0.55, 0.0, lag, probe))
    assert told.slopes == pytest.approx((0.0, 0.2, 0.2), abs=1e-9)
    cost = controller.noise_weight * noise / 2  # half of the noise each
    assert told.hypergradient == pytest.approx([(p - cost) / (abs(p) + cost) for p in progress])
