"""The default controller: what movement, losses and the user's rate say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hdet
from hdet.observe.slopes import ProbeLosses
from hdet.steer.observation import Observation
from hdet.steer.posterior import Belief, Posterior, right_as_given, target

RHOS = (0.9, 1.1)


def _probe(progress: float, noise: float, level: float = 1.0) -> ProbeLosses:
    """Losses whose slopes are ``A = progress`` and ``E = noise`` at a lag of 1."""
    here = (level + noise,) * 2
    return ProbeLosses(here, here, (level - progress,) * 2, (level + progress,) * 2, here)


def _seen(
    movement: float = math.nan,
    *,
    progress: float = 0.2,
    height: float = 1.0,
    share: float = 0.01,
    probe: ProbeLosses | None = None,
    final: float = 0.0,
    given: bool = False,
) -> Observation:
    return Observation(
        losses=(1.0, 1.0),
        multipliers=RHOS,
        schedule=1.0,
        progress=progress,
        share=share,
        height=height,
        until=0.56,
        probe=probe,
        final=final,
        movement=movement,
        area=0.5,
        given=given,
    )


def _run(
    law: Callable[[float], float],
    *,
    controller: Posterior | None = None,
    start: float = 1.0,
    share: float = 0.01,
    given: bool = False,
) -> float:
    """The gain after a run whose movement is ``law(gain)`` times the target."""
    controller = controller or Posterior()
    belief = controller.begin(start)
    for i in range(round(1 / share)):
        right = target(1.0, share, 0.5)
        seen = _seen(law(belief.gain) * right, progress=(i + 1) * share, share=share, given=given)
        belief, _ = controller.update(belief, seen)
    return belief.gain


def test_the_squared_targets_of_a_run_add_up_to_two() -> None:
    heights = [0.1 + 0.9 * i / 49 for i in range(50)] + [1 - 0.9 * i / 49 for i in range(50)]
    area = sum(heights) / 100
    assert sum(target(h, 0.01, area) ** 2 for h in heights) == pytest.approx(2)
    assert target(1.0, 0.01, 0.5, steps=1e9) == pytest.approx(target(1.0, 0.01, 0.5))


@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_the_target_is_that_of_a_walk_that_forgets_its_velocity(steps: int) -> None:
    """``|d_n|^2`` in rounds of ``n`` steps, from the velocity's correlation ``exp(-t / 5)``, per squared step."""
    grid = 200
    moments = [(i + 0.5) * steps / grid for i in range(grid)]
    squared = sum(math.exp(-abs(s - t) / 5) for s in moments for t in moments) * (steps / grid) ** 2
    long = 2 * 5 * steps
    factor = target(1.0, 0.01, 0.5, steps=steps) / target(1.0, 0.01, 0.5)
    assert factor == pytest.approx(math.sqrt(squared / long), rel=0.01)


def _noise(heights: list[float]) -> float:
    """``B`` of the bound on the last iterate."""
    total = sum(heights)
    squares = sum(h * h for h in heights)
    bound = squares / total
    for h in heights[:-1]:
        bound += h / (total - h) * squares / total
        total -= h
        squares -= h * h
    return bound


@pytest.mark.parametrize(("final", "within"), [(1.0, 0.03), (0.5, 0.05), (0.3, 0.08), (0.1, 0.12)])
def test_the_target_is_smaller_by_the_noise_that_the_schedule_leaves(final: float, within: float) -> None:
    """As the bound has it, for cosines that end at ``final``, over one that ends near 0."""
    steps = 1000

    def heights(final: float) -> list[float]:
        cosine = (0.5 + 0.5 * math.cos(math.pi * i / (steps - 1)) for i in range(steps))
        return [min(1.0, (i + 1) / 50) * (final + (1 - final) * x) for i, x in enumerate(cosine)]

    one_cycle = [0.5 - 0.5 * math.cos(math.pi * (i + 1) / 300) for i in range(300)]
    one_cycle += [1e-5 + 0.5 + 0.5 * math.cos(math.pi * (i + 1) / 700) for i in range(700)]
    factor = target(1.0, 0.01, 0.5, final) / target(1.0, 0.01, 0.5)
    assert factor == pytest.approx(math.sqrt(_noise(one_cycle) / _noise(heights(final))), abs=within)


def test_without_annealing_the_gain_goes_where_less_movement_is_right() -> None:
    controller = Posterior()
    belief = controller.begin(1.0)
    for _ in range(60):
        seen = _seen(belief.gain * target(1.0, 0.01, 0.5))._replace(final=1.0)
        belief, _ = controller.update(belief, seen)
    assert belief.gain == pytest.approx(3.5**-0.5, rel=0.01)


@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.04, 0.01, 0.0025])
@pytest.mark.parametrize("best", [1e-3, 0.1, 1.0, 30.0])
def test_the_gain_goes_where_the_movement_is_right(best: float, share: float, power: float) -> None:
    assert _run(lambda gain: (gain / best) ** power, share=share) == pytest.approx(best, rel=0.05)


def _normal(x: float, variance: float) -> float:
    return math.exp(-(x**2) / 2 / variance) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("variance", [0.05, 0.15, 1.0])
@pytest.mark.parametrize("estimate", [0.0, 0.3, -0.8, 2.0])
def test_the_gain_is_the_posterior_mean_of_the_right_one(estimate: float, variance: float) -> None:
    """Over a prior of one half at the user's rate, and the rest within a factor of 100, summed on a grid."""
    wide = math.log(100)
    grid = [wide * (2 * (i + 0.5) / 20_000 - 1) for i in range(20_000)]
    weights = [0.5 * _normal(estimate - x, variance) / len(grid) for x in grid]
    user = 0.5 * _normal(estimate, variance)
    mean = math.fsum(x * w for x, w in zip(grid, weights, strict=True)) / (math.fsum(weights) + user)
    assert (1 - right_as_given(estimate, variance)) * estimate == pytest.approx(mean, abs=0.02)


def test_nothing_is_too_far_to_be_computed() -> None:
    assert right_as_given(1e6, 1e-6) == pytest.approx(0)


@pytest.mark.parametrize("best", [0.75, 1.0, 1.3])
def test_a_rate_as_good_as_can_be_told_is_kept(best: float) -> None:
    gain = _run(lambda gain: (gain / best) ** 0.7, given=True)
    assert abs(math.log(gain)) < 0.25 * abs(math.log(best)) + 1e-9


@pytest.mark.parametrize("power", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.04, 0.01, 0.0025])
@pytest.mark.parametrize("best", [0.01, 0.1, 8.0, 100.0])
def test_a_rate_that_is_far_off_is_left_altogether(best: float, share: float, power: float) -> None:
    assert _run(lambda gain: (gain / best) ** power, share=share, given=True) == pytest.approx(best, rel=0.05)


def test_the_first_rounds_say_less_of_the_users_rate_than_later_ones() -> None:
    estimate = 0.9
    movement = math.exp(-0.7 * estimate) * target(1.0, 0.01, 0.5)
    gains = []
    for progress in (0.01, 0.1, 0.4):
        belief, _ = Posterior(memory=0.0).update(Belief(), _seen(movement, progress=progress, given=True))
        gains.append(math.log(belief.gain))
    assert 0 < gains[0] < 0.3 < gains[1] < gains[2] < estimate


def test_losses_weigh_against_the_users_rate_as_movement_does() -> None:
    controller = Posterior(movement_error=0.5, evidence_error=0.5)
    heard = Belief(1.0, 0.0, math.inf, 0.8, 1.0)
    given, _ = controller.update(heard, _seen(given=True))
    found, _ = controller.update(heard, _seen())
    assert math.log(found.gain) == pytest.approx(0.4)
    assert 0 < math.log(given.gain) < 0.1


def test_a_users_rate_that_blew_up_is_not_believed_in() -> None:
    controller = Posterior()
    belief = controller.cut(controller.begin(1.0), 3.0)
    right = target(1.0, 0.01, 0.5)
    for _ in range(20):  # the movement is right at the third
        belief, _ = controller.update(belief, _seen((3 * belief.gain) ** 0.7 * right, given=True))
    assert belief.gain == pytest.approx(1 / 3)


def test_rounds_of_any_length_move_the_centre_alike() -> None:
    """If movement goes with the gain to the power 0.7."""
    controller = Posterior(memory=0.5)
    centres = []
    for share in (0.01, 0.0025):
        belief = controller.begin(1.0)
        for _ in range(round(0.01 / share)):
            seen = _seen(2 * belief.gain**0.7 * target(1.0, share, 0.5), share=share)
            belief, _ = controller.update(belief, seen)
        centres.append(belief.centre)
    assert centres == pytest.approx([-math.log(2) / 2 / 0.7] * 2)


def test_no_round_moves_the_gain_by_more_than_a_factor_of_four() -> None:
    controller = Posterior()
    for movement in (1e-30, 1e30):
        belief, _ = controller.update(controller.begin(1.0), _seen(movement))
        assert abs(math.log(belief.gain)) <= math.log(4) + 1e-12


@pytest.mark.parametrize("movement", [math.nan, 0.0, math.inf, -1.0])
def test_a_movement_that_is_not_known_moves_nothing(movement: float) -> None:
    belief, q = Posterior().update(Belief(2.0, math.log(2.0)), _seen(movement))
    assert (belief, q) == (Belief(2.0, math.log(2.0)), None)


def test_the_gain_rests_without_a_known_length_and_after_the_schedule_has_fallen() -> None:
    start = Belief(2.0, math.log(2.0))
    for progress in (math.nan, 0.57):
        belief, _ = Posterior().update(start, _seen(1e-3, progress=progress, probe=_probe(1.0, 0.0)))
        assert belief.gain == 2.0


def test_movement_is_not_followed_after_until() -> None:
    belief, _ = Posterior().update(Belief(2.0, math.log(2.0)), _seen(1e-3, progress=0.41))
    assert belief.gain == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("progress", "noise", "sign"), [(1.0, 0.0, 1), (0.0, 1.0, -1), (1.0, -5.0, 1), (-1.0, 5.0, -1)]
)
def test_movement_and_unanimous_probes_meet_where_their_errors_put_them(
    progress: float, noise: float, sign: int
) -> None:
    """The movement has 1 for right. At ``x``, the log gain, the probe has ``x`` and a constant more."""
    controller = Posterior(movement_error=0.4, evidence_error=0.8)
    belief = controller.begin(1.0)
    for _ in range(200):
        movement = belief.gain**0.7 * target(1.0, 0.01, 0.5)
        belief, q = controller.update(belief, _seen(movement, probe=_probe(progress, noise)))
        assert q == pytest.approx(sign, abs=1e-6)
    more = (sign - 0.7) / 0.5
    assert math.log(belief.gain) == pytest.approx(more * 0.4**2 / 0.8**2, abs=1e-6)
    assert belief.centre == pytest.approx(0, abs=1e-6)
    assert belief.evidence == pytest.approx(math.log(belief.gain) + more, abs=1e-6)


def test_a_probe_compares_what_is_still_to_come_with_what_the_noise_costs_at_the_peak() -> None:
    controller = Posterior(noise_weight=0.25)
    for height, final in ((1.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        seen = _seen(progress=0.2, share=0.02, height=height, final=final, probe=_probe(0.01, 0.3))
        belief, q = controller.update(Belief(2.0), seen)
        left, cost = 0.2 * 0.01 / 0.02, 0.25 * 0.3 * (1 + 2.5 * final) / height
        assert q == pytest.approx((left - cost) / (left + cost))
        assert belief.evidence == pytest.approx(math.log(2.0) + (q - 0.7) / 0.5)


def test_the_first_tenth_of_a_run_is_not_listened_to() -> None:
    belief, q = Posterior().update(Belief(), _seen(progress=0.09, probe=_probe(1.0, 0.0)))
    assert (belief, q) == (Belief(), None)


def test_probes_are_averaged_and_one_alone_is_trusted_in_part() -> None:
    controller = Posterior(memory=0.75)
    belief, _ = controller.update(Belief(), _seen(probe=_probe(1.0, 0.0)))
    assert (belief.evidence, belief.heard) == pytest.approx((0.6, 0.25))
    here = math.log(belief.gain)
    belief, _ = controller.update(belief, _seen(probe=_probe(-1.0, 0.0)))
    weights = 0.75 * 0.25, 0.25
    assert belief.heard == pytest.approx(sum(weights))
    assert belief.evidence == pytest.approx((weights[0] * 0.6 + weights[1] * (here - 3.4)) / sum(weights))


def test_evidence_does_not_depend_on_the_unit_of_the_loss() -> None:
    controller = Posterior()
    one, other = controller.begin(1.0), controller.begin(1.0)
    for i in range(9):
        one, _ = controller.update(one, _seen(probe=_probe(0.1 * i - 0.3, 0.5)))
        other, _ = controller.update(other, _seen(probe=_probe(1e3 * (0.1 * i - 0.3), 500.0)))
    assert one.gain == pytest.approx(other.gain)


def test_a_probe_that_is_not_finite_says_nothing() -> None:
    nan = (math.nan,) * 2
    belief, q = Posterior().update(Belief(), _seen(probe=ProbeLosses(nan, nan, nan, nan, nan)))
    assert (belief, q) == (Belief(), None)


def test_no_probe_is_asked_for_where_the_gain_rests() -> None:
    assert Posterior().wants_probe(0.5, 0.56)
    assert not Posterior().wants_probe(0.57, 0.56)


@pytest.mark.parametrize(
    ("total", "every", "probed"),
    [
        (300, 3, [36, 48, 60, 72, 84, 96, 108, 120, 132, 144, 156]),  # of 100 rounds every fourth
        (40, 4, [4, 8, 12, 16, 20]),  # where rounds are longer, each
    ],
)
def test_probes_come_every_four_hundredths_of_the_run_from_a_tenth_on(
    total: int, every: int, probed: list[int]
) -> None:
    def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(batch).square().mean()
        return found

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = hdet.OneCycleLR(
        optimizer, 0.01, total_steps=total, model=model, spread=0.1, converge_every=every, auto_lr=True,
        virtual_replicas=2, probe=hdet.Probe(loss_fn=loss_fn, batches=[torch.ones(4, 3)]),
    )  # fmt: skip
    seen = []
    for step in range(1, total + 1):
        for x in scheduler.each([torch.ones(4, 3), -torch.ones(4, 3)]):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = scheduler.ensemble.last_report
        scheduler.step([0.5, 0.5])
        report = scheduler.ensemble.last_report
        if report is not before and not math.isnan(report.hypergradient[0]):
            seen.append(step)
    assert seen == probed


def test_a_gain_at_which_the_run_blew_up_is_not_reached_again() -> None:
    controller = Posterior()
    belief = controller.cut(Belief(9.0, math.log(9.0)), 3.0)
    assert belief.gain == pytest.approx(3.0)
    for _ in range(30):
        belief, _ = controller.update(belief, _seen(1e-3))
    assert 3.0 < belief.gain < 9.0
    again = controller.cut(belief, 3.0)
    assert again.ceiling < belief.ceiling


def test_the_gain_stays_within_its_bounds_and_does_not_wind_up() -> None:
    controller = Posterior(bounds=(0.5, 2.0))
    belief = controller.begin(1.0)
    for _ in range(20):
        belief, _ = controller.update(belief, _seen(1e-9, probe=_probe(1.0, 0.0)))
    assert (belief.gain, belief.centre) == (2.0, math.log(2.0))


def test_saved_beliefs_are_plain_values() -> None:
    belief, _ = Posterior().update(Belief(), _seen(0.1, probe=_probe(1.0, 0.5)))
    assert Belief(*list(belief)) == belief
    assert all(type(value) is float for value in belief)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": -0.1},
        {"memory": 1.0},
        {"movement_error": 0.0},
        {"movement_error": math.inf},
        {"evidence_error": math.inf},
        {"until": -0.1},
        {"evidence_error": 0.0},
        {"evidence_error": math.nan},
        {"noise_weight": 0.0},
        {"rest_below": 2.0},
        {"bounds": (2.0, 3.0)},
    ],
)
def test_wrong_values_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Invalid {next(iter(wrong))}="):
        Posterior(**wrong)
