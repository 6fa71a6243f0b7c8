"""The base schedules against torch's schedulers, against each other, and against what their docstrings promise."""

from __future__ import annotations

import copy
import doctest
import io
import math
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from hdet import schedules

Factor = Callable[[int], float]
quickly = settings(deadline=None, max_examples=100)  # the first optimizer takes torch half a second to make

STEPS, WARMUP = 60, 7
WSD: dict[str, Any] = {"total_steps": STEPS, "decay_steps": 20, "warmup_steps": WARMUP}
# A batch of 2**20 tokens per step: the cap of the power law ends after some 26 billion tokens, 24 steps.
POWER: dict[str, Any] = {"batch_size": 1024, "sequence_length": 2**20, "warmup_steps": WARMUP}
INFINITE: dict[str, Any] = {"cooldown_steps": 20, "constant_factor": 0.5, "warmup_steps": WARMUP}

# Every schedule, with its first step at the peak and the step from which on it holds its final value.
CASES: dict[str, tuple[Factor, int, int]] = {
    "constant": (schedules.constant(warmup_steps=WARMUP), WARMUP, WARMUP),
    "linear": (schedules.linear(total_steps=STEPS, warmup_steps=WARMUP), WARMUP, STEPS),
    "linear to 0.3": (schedules.linear(total_steps=STEPS, final_factor=0.3), 0, STEPS),
    "cosine": (schedules.cosine(total_steps=STEPS, warmup_steps=WARMUP), WARMUP, STEPS),
    "cosine to 0.1": (schedules.cosine(total_steps=STEPS, final_factor=0.1), 0, STEPS),
    "rex": (schedules.rex(total_steps=STEPS, warmup_steps=WARMUP), WARMUP, STEPS),
    "rex to 0.1": (schedules.rex(total_steps=STEPS, final_factor=0.1), 0, STEPS),
    "uba 0.1": (schedules.uba(total_steps=STEPS, phi=0.1, warmup_steps=WARMUP), WARMUP, STEPS),
    "uba 9": (schedules.uba(total_steps=STEPS, phi=9, final_factor=0.01), 0, STEPS),
    "wsd sqrt": (schedules.warmup_stable_decay(**WSD), WARMUP, STEPS),
    "wsd linear": (schedules.warmup_stable_decay(**WSD, decay_type="linear"), WARMUP, STEPS),
    "wsd cosine": (schedules.warmup_stable_decay(**WSD, decay_type="cosine", final_factor=0.1), WARMUP, STEPS),
    "wsd exponential": (
        schedules.warmup_stable_decay(**WSD, decay_type="exponential", final_factor=0.01),
        WARMUP,
        STEPS,
    ),
    "power": (schedules.power(**POWER, decay_start=40, decay_steps=20), WARMUP, STEPS),
    "infinite cosine": (schedules.infinite(**INFINITE, anneal_start=40, anneal_steps=20), WARMUP, STEPS),
    "infinite inverse_sqrt": (schedules.infinite(**INFINITE, cooldown_type="inverse_sqrt"), WARMUP, WARMUP + 20),
    "one_cycle": (schedules.one_cycle(total_steps=STEPS), 17, STEPS - 1),
    "one_cycle linear": (schedules.one_cycle(total_steps=STEPS, anneal_strategy="linear"), 17, STEPS - 1),
    "one_cycle three_phase": (schedules.one_cycle(total_steps=STEPS, three_phase=True), 17, STEPS - 1),
}
each_case = pytest.mark.parametrize(("factor", "peak", "end"), CASES.values(), ids=CASES)


def sgd(lr: float = 1.0, groups: int = 1) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)], lr=lr)


def learning_rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rates of the next ``steps`` steps; the scheduler is left at the last of them."""
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps - 1):
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def values(factor: Factor, steps: int) -> list[float]:
    return [factor(t) for t in range(steps)]


# --- what all of them promise ---


def test_every_public_schedule_is_among_the_cases() -> None:
    assert {type(factor).__name__ for factor, _, _ in CASES.values()} == set(schedules.__all__)


def test_doctests() -> None:
    results = [doctest.testmod(module) for module in (schedules.decays, schedules.onecycle, schedules.open_ended)]
    assert sum(result.attempted for result in results) >= 2 * len(schedules.__all__) - 1
    assert not any(result.failed for result in results)


@each_case
def test_range_and_plain_floats(factor: Factor, peak: int, end: int) -> None:
    for value in values(factor, 3 * STEPS):
        assert type(value) is float
        assert 0.0 <= value <= 1.0
    assert factor(0) > 0.0  # the first update is never wasted


@each_case
def test_the_peak_is_exactly_one_and_the_factor_rises_to_it_and_falls_from_it(
    factor: Factor, peak: int, end: int
) -> None:
    curve = values(factor, 2 * STEPS)
    assert curve[peak] == max(curve) == 1.0
    assert all(a < b for a, b in pairwise(curve[: peak + 1]))
    assert all(b <= a + 1e-15 for a, b in pairwise(curve[peak:]))


@each_case
def test_the_final_value_holds(factor: Factor, peak: int, end: int) -> None:
    assert {factor(t) for t in (end, end + 1, end + 17, 10**9)} == {factor(end)}
    if end > peak:
        assert factor(end - 1) > factor(end)


@pytest.mark.parametrize(("name", "final"), [("linear to 0.3", 0.3), ("cosine to 0.1", 0.1), ("rex", 0.0)])
def test_the_final_value_is_the_one_asked_for(name: str, final: float) -> None:
    assert CASES[name][0](STEPS) == final


# A phase border is an ordinary point of the curve: with phases of tens of thousands of steps no single step may jump.
LONG = 10**5
LONG_SCHEDULES: list[Factor] = [
    schedules.constant(warmup_steps=LONG // 10),
    *(kind(total_steps=LONG, warmup_steps=LONG // 10) for kind in (schedules.linear, schedules.cosine, schedules.rex)),
    schedules.uba(total_steps=LONG, phi=0.5, warmup_steps=LONG // 10, final_factor=0.1),
    *(
        schedules.warmup_stable_decay(
            total_steps=LONG, decay_steps=LONG // 2, warmup_steps=LONG // 10, decay_type=kind, final_factor=0.1
        )
        for kind in ("linear", "cosine", "exponential", "sqrt")
    ),
    # Warm-up that ends above the cap of the power law, and warm-up that ends below it.
    schedules.power(
        batch_size=64, sequence_length=1024, warmup_steps=LONG // 10, decay_start=LONG // 2, decay_steps=LONG // 2
    ),
    schedules.power(batch_size=64, sequence_length=2**15, warmup_steps=LONG // 10),
    *(
        schedules.infinite(
            cooldown_steps=LONG // 4,
            constant_factor=0.5,
            warmup_steps=LONG // 10,
            cooldown_type=kind,
            anneal_start=LONG // 2,
            anneal_steps=LONG // 4,
        )
        for kind in ("cosine", "inverse_sqrt")
    ),
    *(schedules.one_cycle(total_steps=LONG, three_phase=three_phase) for three_phase in (False, True)),
]


@pytest.mark.parametrize("factor", LONG_SCHEDULES, ids=lambda factor: type(factor).__name__)
def test_continuous_at_phase_borders(factor: Factor) -> None:
    curve = values(factor, LONG + 10)
    # 1 - sqrt(p) falls with infinite slope at first: by 1 / sqrt(50 000) in the first step.
    bound = 5e-3 if "'sqrt'" in str(factor) else 1.5e-4
    assert max(abs(b - a) for a, b in pairwise(curve)) < bound


# --- against torch ---


@quickly
@given(
    total_steps=st.integers(1, 80),
    pct_start=st.floats(0, 1),
    strategy=st.sampled_from(["cos", "linear"]),
    max_lr=st.floats(1e-6, 10),
    div_factor=st.floats(1, 1e3),
    final_div_factor=st.floats(1, 1e6),
    three_phase=st.booleans(),
)
def test_one_cycle_is_torchs_divided_by_max_lr(
    total_steps: int,
    pct_start: float,
    strategy: Any,
    max_lr: float,
    div_factor: float,
    final_div_factor: float,
    three_phase: bool,
) -> None:
    assume(pct_start * total_steps != 1)  # torch divides by zero at step 0
    shape = {"pct_start": pct_start, "anneal_strategy": strategy, "three_phase": three_phase}
    shape |= {"div_factor": div_factor, "final_div_factor": final_div_factor}
    theirs = OneCycleLR(sgd(), max_lr, total_steps=total_steps, cycle_momentum=False, **shape)
    expected = [rate / max_lr for rate in learning_rates(theirs, total_steps)]
    ours = values(schedules.one_cycle(total_steps=total_steps, **shape), total_steps)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_one_cycle_has_torchs_defaults() -> None:
    expected = learning_rates(OneCycleLR(sgd(), 1.0, total_steps=40, cycle_momentum=False), 40)
    assert values(schedules.one_cycle(total_steps=40), 40) == expected


def test_one_cycle_whose_rise_is_a_single_step_starts_at_the_peak() -> None:
    """torch's OneCycleLR raises ZeroDivisionError for total_steps=10, pct_start=0.1."""
    with pytest.raises(ZeroDivisionError):
        OneCycleLR(sgd(), 1.0, total_steps=10, pct_start=0.1, cycle_momentum=False)
    assert schedules.one_cycle(total_steps=10, pct_start=0.1)(0) == 1.0


@quickly
@given(total_steps=st.integers(1, 60), final_factor=st.floats(0, 1))
def test_cosine_is_torchs(total_steps: int, final_factor: float) -> None:
    theirs = CosineAnnealingLR(sgd(), T_max=total_steps, eta_min=final_factor)
    ours = values(schedules.cosine(total_steps=total_steps, final_factor=final_factor), total_steps + 1)
    assert ours == pytest.approx(learning_rates(theirs, total_steps + 1), rel=1e-9, abs=1e-9)


@quickly
@given(total_steps=st.integers(1, 60), final_factor=st.floats(0, 1))
def test_linear_is_torchs(total_steps: int, final_factor: float) -> None:
    theirs = LinearLR(sgd(), start_factor=1.0, end_factor=final_factor, total_iters=total_steps)
    ours = values(schedules.linear(total_steps=total_steps, final_factor=final_factor), total_steps + 5)
    assert ours == pytest.approx(learning_rates(theirs, total_steps + 5), rel=1e-9, abs=1e-9)


@quickly
@given(warmup_steps=st.integers(1, 30))
def test_warmup_is_torchs_linear_lr(warmup_steps: int) -> None:
    theirs = LinearLR(sgd(), start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    ours = values(schedules.constant(warmup_steps=warmup_steps), warmup_steps + 5)
    assert ours == pytest.approx(learning_rates(theirs, warmup_steps + 5), rel=1e-12)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own doing
def test_warmup_then_cosine_is_torchs_sequential_lr() -> None:
    optimizer = sgd()
    warmup = LinearLR(optimizer, start_factor=1 / (WARMUP + 1), total_iters=WARMUP)
    decay = CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP)
    theirs = SequentialLR(optimizer, [warmup, decay], milestones=[WARMUP])
    ours = values(schedules.cosine(total_steps=STEPS, warmup_steps=WARMUP), STEPS)
    assert ours == pytest.approx(learning_rates(theirs, STEPS), abs=1e-9)


# --- against each other, and against the papers ---

progress = st.integers(0, STEPS)


@quickly
@given(t=progress, final_factor=st.floats(0, 1), warmup_steps=st.integers(0, STEPS - 1))
def test_uba_at_phi_2_is_cosine(t: int, final_factor: float, warmup_steps: int) -> None:
    shared: dict[str, Any] = {"total_steps": STEPS, "warmup_steps": warmup_steps, "final_factor": final_factor}
    assert schedules.uba(phi=2, **shared)(t) == pytest.approx(schedules.cosine(**shared)(t), abs=1e-14)


@quickly
@given(t=progress, phi=st.floats(1e-6, 1e6))
def test_uba_is_the_published_equation(t: int, phi: float) -> None:
    """eta_t = (eta_max - eta_min) 2 (1 + cos(pi t / T)) / (2 phi + (2 - phi) (1 + cos(pi t / T))) + eta_min."""
    c = 1 + math.cos(math.pi * t / STEPS)
    published = (1 - 0.1) * 2 * c / (2 * phi + (2 - phi) * c) + 0.1
    assert schedules.uba(total_steps=STEPS, phi=phi, final_factor=0.1)(t) == pytest.approx(published, rel=1e-6)


@quickly
@given(t=progress)
def test_uba_at_phi_1_is_rex_of_the_cosine(t: int) -> None:
    u = schedules.cosine(total_steps=STEPS)(t)
    assert schedules.uba(total_steps=STEPS, phi=1)(t) == pytest.approx(u / (1 / 2 + u / 2), abs=1e-14)


@quickly
@given(phi=st.floats(5e-324, 1e308))
def test_uba_starts_at_exactly_one_and_ends_at_exactly_zero_for_every_phi(phi: float) -> None:
    factor = schedules.uba(total_steps=STEPS, phi=phi)
    assert (factor(0), factor(STEPS)) == (1.0, 0.0)


def test_a_smaller_phi_stays_higher() -> None:
    midway = [schedules.uba(total_steps=STEPS, phi=phi)(STEPS // 2) for phi in (0.01, 0.5, 1, 2, 5, 100)]
    assert midway == sorted(midway, reverse=True)


@quickly
@given(t=progress)
def test_rex_is_the_published_equation(t: int) -> None:
    p = t / STEPS
    assert schedules.rex(total_steps=STEPS)(t) == pytest.approx((1 - p) / (1 / 2 + (1 - p) / 2), abs=1e-15)


@pytest.mark.parametrize(("decay_type", "same"), [("linear", schedules.linear), ("cosine", schedules.cosine)])
def test_wsd_that_decays_from_the_start_is_the_plain_decay(decay_type: str, same: Any) -> None:
    shared: dict[str, Any] = {"total_steps": STEPS, "warmup_steps": WARMUP, "final_factor": 0.1}
    wsd = schedules.warmup_stable_decay(decay_steps=STEPS - WARMUP, decay_type=decay_type, **shared)
    assert values(wsd, STEPS + 2) == values(same(**shared), STEPS + 2)


def test_wsd_sqrt_is_haegeles_equation() -> None:
    """f(n, N, N_decay) = 1 - sqrt((n - (N - N_decay)) / N_decay)."""
    factor = schedules.warmup_stable_decay(total_steps=100, decay_steps=25)
    assert [factor(n) for n in range(76)] == [1.0] * 76
    assert factor(84) == pytest.approx(1 - math.sqrt(9 / 25))


def test_wsd_exponential_has_minicpms_half_life() -> None:
    factor = schedules.warmup_stable_decay(
        total_steps=100_000, decay_steps=10_000, decay_type="exponential", final_factor=0.5 ** (10_000 / 5_000)
    )
    assert [factor(90_000), factor(95_000), factor(100_000)] == pytest.approx([1, 0.5, 0.25])


def test_power_gives_the_papers_number() -> None:
    """Section 3.2: eta = beta * 4.6 * T**-0.51 is 0.0011 for 10 trillion tokens and batch size 1024."""
    factor = schedules.power(batch_size=1024, sequence_length=4096, amplitude=4.6)
    assert 0.02 * factor(10**13 // (1024 * 4096)) == pytest.approx(0.0011, abs=5e-5)


@quickly
@given(t=st.integers(1, 10**6), batch_size=st.integers(1, 4096), exponent=st.floats(-2, -0.01))
def test_power_is_the_published_equation(t: int, batch_size: int, exponent: float) -> None:
    """eta_power(n) = min(eta_max, beta * a * n**b), n tokens trained."""
    factor = schedules.power(batch_size=batch_size, sequence_length=2048, exponent=exponent)
    published = min(0.02, batch_size * 4 * (t * batch_size * 2048) ** exponent)
    assert 0.02 * factor(t) == pytest.approx(published, rel=1e-12)


def test_power_warms_up_to_where_the_power_law_is_and_decays_from_where_it_is() -> None:
    law = schedules.power(batch_size=1024, sequence_length=2**20)
    factor = schedules.power(batch_size=1024, sequence_length=2**20, warmup_steps=99, decay_start=200, decay_steps=50)
    assert law(99) < 1  # the warm-up ends below the cap
    assert [factor(t) for t in (0, 49, 99, 150, 200)] == pytest.approx(
        [0.01 * law(99), 0.5 * law(99), law(99), law(150), law(200)]
    )
    halfway = (math.exp(0.5) - 1) / (math.e - 1)  # IBM/dolomite-engine: a exp(-p) + b, 1 at p = 0 and 0 at p = 1
    assert [factor(225), factor(250)] == pytest.approx([halfway * law(200), 0.0])


def test_power_before_the_first_token_is_at_the_cap() -> None:
    assert schedules.power(batch_size=1, sequence_length=1)(0) == 1.0


def test_infinite_phases() -> None:
    factor = schedules.infinite(
        cooldown_steps=100, constant_factor=0.4, warmup_steps=10, anneal_start=500, anneal_steps=50
    )
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.7)  # half of the cosine: midway between 1 and the constant
    assert {factor(t) for t in range(110, 501)} == {0.4}
    assert factor(525) == pytest.approx(math.sqrt(0.4 * 0.1))  # exponential: the geometric mean, midway
    assert factor(550) == factor(10**6) == pytest.approx(0.1)


def test_infinite_without_annealing_never_ends() -> None:
    factor = schedules.infinite(cooldown_steps=100, constant_factor=0.4, cooldown_type="inverse_sqrt")
    assert factor(100) == factor(10**9) == 0.4
    assert factor(50) < schedules.infinite(cooldown_steps=100, constant_factor=0.4)(50)


def test_the_final_phase_can_be_decided_later() -> None:
    """What infinite and power are for: the steps before the final phase do not depend on it."""
    for kind, known, start in ((schedules.infinite, INFINITE, "anneal"), (schedules.power, POWER, "decay")):
        later = kind(**known, **{f"{start}_start": 45, f"{start}_steps": 5})
        assert values(kind(**known), 46) == values(later, 46)


# --- arguments ---

GOOD: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"total_steps": 10},
    "cosine": {"total_steps": 10},
    "rex": {"total_steps": 10},
    "uba": {"total_steps": 10, "phi": 1.0},
    "warmup_stable_decay": {"total_steps": 10, "decay_steps": 2},
    "power": {"batch_size": 8, "sequence_length": 16},
    "infinite": {"cooldown_steps": 5, "constant_factor": 0.5},
    "one_cycle": {"total_steps": 10},
}
BUDGETED = ("linear", "cosine", "rex", "uba", "warmup_stable_decay")
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    # schedule, arguments, the value the message must show, the rule it must state
    *((name, {"total_steps": 0}, "total_steps=0", ">= 1") for name in (*BUDGETED, "one_cycle")),
    *((name, {"total_steps": 1e3}, "total_steps=1000.0", "a whole number") for name in (*BUDGETED, "one_cycle")),
    *((name, {"warmup_steps": 10}, "warmup_steps=10", "in [0, total_steps=10)") for name in BUDGETED),
    *((name, {"warmup_steps": -1}, "warmup_steps=-1", "0") for name in GOOD if name != "one_cycle"),
    *((name, {"warmup_steps": True}, "warmup_steps=True", "a whole number") for name in GOOD if name != "one_cycle"),
    *((name, {"final_factor": 1.5}, "final_factor=1.5", "in [0, 1]") for name in BUDGETED),
    *((name, {"final_factor": -0.1}, "final_factor=-0.1", "in [0, 1]") for name in BUDGETED),
    *((name, {"final_factor": math.nan}, "final_factor=nan", "finite") for name in (*BUDGETED, "infinite")),
    *((name, {"final_factor": "0.1"}, "final_factor='0.1'", "number") for name in (*BUDGETED, "infinite")),
    ("uba", {"phi": 0}, "phi=0", "> 0"),
    ("uba", {"phi": math.inf}, "phi=inf", "finite"),
    ("warmup_stable_decay", {"decay_steps": 0}, "decay_steps=0", "in [1, total_steps - warmup_steps = 10]"),
    ("warmup_stable_decay", {"decay_steps": 9, "warmup_steps": 2}, "decay_steps=9", "total_steps - warmup_steps = 8"),
    ("warmup_stable_decay", {"decay_type": "1-sqrt"}, "decay_type='1-sqrt'", "'sqrt', 'linear'"),
    ("warmup_stable_decay", {"decay_type": "exponential"}, "final_factor=0.0", "> 0"),
    ("power", {"batch_size": 0}, "batch_size=0", ">= 1, in sequences"),
    ("power", {"sequence_length": 2.5}, "sequence_length=2.5", "a whole number"),
    ("power", {"max_lr": 0.0}, "max_lr=0.0", "> 0"),
    ("power", {"amplitude": -4}, "amplitude=-4", "> 0"),
    ("power", {"exponent": 0.51}, "exponent=0.51", "< 0"),
    ("power", {"decay_start": 5}, "decay_steps=0", ">= 1 with decay_start"),
    ("power", {"decay_steps": 5}, "decay_steps=5", "0 without decay_start"),
    ("power", {"decay_start": 5, "decay_steps": 5, "warmup_steps": 6}, "decay_start=5", ">= 6"),
    ("infinite", {"cooldown_steps": 0}, "cooldown_steps=0", ">= 1"),
    ("infinite", {"cooldown_type": "linear"}, "cooldown_type='linear'", "'cosine', 'inverse_sqrt'"),
    ("infinite", {"constant_factor": 0.0}, "constant_factor=0.0", "in (0, 1]"),
    ("infinite", {"anneal_steps": 5}, "anneal_steps=5", "0 without anneal_start"),
    ("infinite", {"anneal_start": 4, "anneal_steps": 5}, "anneal_start=4", ">= 5"),
    (
        "infinite",
        {"anneal_start": 5, "anneal_steps": 5, "final_factor": 0.6},
        "final_factor=0.6",
        "<= constant_factor=0.5",
    ),
    ("one_cycle", {"pct_start": 1.1}, "pct_start=1.1", "in [0, 1]"),
    ("one_cycle", {"anneal_strategy": "cosine"}, "anneal_strategy='cosine'", "'cos', 'linear'"),
    ("one_cycle", {"div_factor": 0.5}, "div_factor=0.5", ">= 1"),
    ("one_cycle", {"final_div_factor": 0.01}, "final_div_factor=0.01", ">= 0.04"),
    ("one_cycle", {"final_div_factor": 0.5, "three_phase": True}, "final_div_factor=0.5", ">= 1"),
    ("one_cycle", {"three_phase": "yes"}, "three_phase='yes'", "True or False"),
]


@pytest.mark.parametrize(("name", "bad", "given_", "rule"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments(name: str, bad: dict[str, Any], given_: str, rule: str) -> None:
    make = getattr(schedules, name)
    make(**GOOD[name])
    with pytest.raises((TypeError, ValueError), match="Must be") as error:
        make(**{**GOOD[name], **bad})
    assert (error.type is TypeError) == (rule in ("a whole number", "number", "True or False"))
    assert str(error.value).startswith(f"Invalid {given_}. Must be ")
    assert rule in str(error.value)


@pytest.mark.parametrize("name", schedules.__all__)
def test_arguments_are_keywords_and_known(name: str) -> None:
    make = getattr(schedules, name)
    with pytest.raises(TypeError):
        make(10)
    with pytest.raises(TypeError, match="steps_total"):
        make(**GOOD[name], steps_total=10)


def test_extreme_but_valid_lengths() -> None:
    for name in ("linear", "cosine", "rex"):
        assert values(getattr(schedules, name)(total_steps=1), 3) == [1.0, 0.0, 0.0]
    assert values(schedules.cosine(total_steps=3, warmup_steps=2), 4) == pytest.approx([1 / 3, 2 / 3, 1, 0])
    assert schedules.one_cycle(total_steps=1)(0) == pytest.approx(4e-6)


# --- as objects: in LambdaLR, in checkpoints, in other processes ---


@each_case
def test_pickles_copies_compares_and_prints(factor: Factor, peak: int, end: int) -> None:
    for twin in (pickle.loads(pickle.dumps(factor)), copy.deepcopy(factor), eval(repr(factor), vars(schedules))):
        assert twin == factor
        assert hash(twin) == hash(factor)
        assert values(twin, 2 * STEPS) == values(factor, 2 * STEPS)
    with pytest.raises(AttributeError):
        factor.total_steps = 3  # type: ignore[attr-defined]


@each_case
def test_lambda_lr_and_its_checkpoint(factor: Factor, peak: int, end: int) -> None:
    optimizer = sgd(lr=0.25, groups=2)
    scheduler = LambdaLR(optimizer, factor)
    assert learning_rates(scheduler, 21) == [0.25 * value for value in values(factor, 21)]
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for entry in saved["scheduler"]["lr_lambdas"]:
        assert {type(value) for value in entry.values()} <= {int, float, str, bool, type(None)}

    resumed_optimizer = sgd(lr=0.25, groups=2)
    resumed = LambdaLR(resumed_optimizer, copy.deepcopy(factor))
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    assert resumed.lr_lambdas == [factor, factor]
    assert learning_rates(resumed, 2 * STEPS) == [0.25 * factor(t) for t in range(20, 20 + 2 * STEPS)]


def test_numpy_arguments_are_kept_as_plain_numbers() -> None:
    """torch.load(weights_only=True) refuses NumPy scalars, which arguments computed from data easily are."""
    factor = schedules.cosine(total_steps=np.int64(9), warmup_steps=np.int32(2), final_factor=np.float32(0.5))
    assert factor == schedules.cosine(total_steps=9, warmup_steps=2, final_factor=0.5)
    assert [type(value) for value in vars(factor).values()] == [int, int, float]


def test_a_checkpoint_restores_the_arguments_unless_they_are_left_out() -> None:
    scheduler = LambdaLR(sgd(), schedules.linear(total_steps=10))
    learning_rates(scheduler, 5)
    state = scheduler.state_dict()

    restored = LambdaLR(sgd(), schedules.linear(total_steps=20))
    restored.load_state_dict(state)
    assert restored.lr_lambdas == [schedules.linear(total_steps=10)]

    longer = LambdaLR(sgd(), schedules.linear(total_steps=20))
    state["lr_lambdas"] = [None] * len(state["lr_lambdas"])
    longer.load_state_dict(state)
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == [1 - 5 / 20]


# --- the page about them ---


def test_the_calls_in_the_documentation_work() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "schedules.md").read_text(encoding="utf-8")
    calls = re.findall(r"\| `(schedules\.\w+\([^`]*\))` \|", page)
    made = [eval(call, {"schedules": schedules}) for call in calls]
    assert {type(factor).__name__ for factor in made} == set(schedules.__all__)
    assert all(0 < factor(0) <= 1 for factor in made)
