"""Designs, hyperparameters, centres, priors and virtual replicas, without processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hdet
from hdet.explore.design import effects, levels, multipliers_of
from hdet.explore.identification import check_identified
from hdet.explore.prior import Prior
from hdet.explore.spread import assignment
from hdet.observe.slopes import ProbeLosses
from hdet.steer.controllers import Controllers, RoundObservation
from hdet.steer.one_slope import CentreState, OneSlope
from hdet.steer.posterior import Posterior
from hdet.steer.published import Published

NAMES = ["a", "b", "c", "d", "e"]


# ------------------------------------------------------------------------------------------------------------ designs


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 50), st.sampled_from(["orthogonal", "independent"]))
def test_levels_are_balanced_and_within_one(replicas, factors, round, design):
    drawn = levels(replicas, NAMES[:factors], design=design, seed=1, round=round)
    assert drawn == levels(replicas, NAMES[:factors], design=design, seed=1, round=round)
    for column in drawn:
        assert len(column) == replicas
        assert max(map(abs, column)) <= 1
        assert math.fsum(column) == pytest.approx(0, abs=1e-12)
        assert math.fsum(multipliers_of(column, 0.3)) == pytest.approx(replicas, abs=1e-13)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 50))
def test_columns_of_the_orthogonal_design_are_orthogonal(replicas, factors, round):
    drawn = levels(replicas, NAMES[:factors], seed=0, round=round)
    active = [column for column in drawn if any(column)]
    assert len(active) == min(factors, replicas - 1)
    for i, a in enumerate(active):
        for b in active[:i]:
            assert math.fsum(x * y for x, y in zip(a, b, strict=True)) == pytest.approx(0, abs=1e-10)
    if replicas % 4 == 0 and replicas not in (28, 36):  # a Hadamard matrix: everybody at one end of every spread
        assert all(abs(x) == 1 for column in active for x in column)


def test_factors_take_turns():
    explored = [0] * 5
    for round in range(50):
        for h, column in enumerate(levels(4, NAMES, seed=0, round=round)):
            explored[h] += any(column)
    assert explored == [30] * 5


def test_independent_levels_are_the_spread_of_the_paper():
    for round in range(5):
        (column,) = levels(5, ["lr/0"], design="independent", seed=3, round=round)
        assert multipliers_of(column, 0.25) == assignment(5, 0.25, seed=3, round=round, hyperparameter="lr/0")


def test_every_factor_meets_every_level_of_another():
    seen = {tuple(zip(*levels(4, ["a", "b"], seed=0, round=round), strict=True)) for round in range(40)}
    assert len(seen) > 10
    assert all(set(pairs) == {(-1, -1), (-1, 1), (1, -1), (1, 1)} for pairs in seen)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(4, 12), st.integers(0, 20))
def test_effects_are_recovered(truth, replicas, round):
    drawn = levels(replicas, NAMES[:3], seed=0, round=round)
    losses = [math.fsum(z[r] * e for z, e in zip(drawn, truth, strict=True)) for r in range(replicas)]
    found = effects(drawn, losses)
    assert [effect.value for effect in found] == pytest.approx(truth, abs=1e-9)
    assert all(effect.error < 1e-6 or math.isnan(effect.error) for effect in found)
    assert math.isnan(found[0].error) == (replicas == 3)


def test_effects_with_lost_replicas_and_lost_factors():
    drawn = ((1.0, -1.0, 1.0, -1.0), (0.0,) * 4, (1.0, 1.0, -1.0, -1.0))
    losses = [3.0, -1.0, math.nan, -3.0]
    found = effects(drawn, losses)
    assert found[0].value == pytest.approx(2)
    assert math.isnan(found[1].value)
    assert found[2].value == pytest.approx(1)
    nothing = effects(drawn, [math.nan, 1.0, math.nan, math.nan])
    assert all(math.isnan(effect.value) for effect in nothing)


def test_the_orthogonal_design_has_less_variance():
    """One effect of three, at equal N and rounds, in units of the losses' variance."""
    generator = torch.Generator().manual_seed(0)
    variance = {}
    for design in ("orthogonal", "independent"):
        estimates = []
        for round in range(300):
            drawn = levels(8, NAMES[:3], design=design, seed=0, round=round)
            noise = torch.randn(8, generator=generator).tolist()
            estimates.append(effects(drawn, noise)[0].value)
        variance[design] = sum(x * x for x in estimates) / len(estimates)
    assert variance["orthogonal"] == pytest.approx(1 / 8, rel=0.25)
    assert variance["independent"] > 2 * variance["orthogonal"]


# ---------------------------------------------------------------------------------------------------- hyperparameters


def optimizer_of(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=0.1, **{"weight_decay": 0.1, **settings})


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2), nn.Dropout(0.4))


def test_spaces():
    optimizer = optimizer_of(net(), betas=(0.9, 0.99))
    for field, value, up in [
        ("weight_decay", 0.1, 0.1 * math.exp(0.5)),
        ("betas[0]", 0.9, 1 - 0.1 * math.exp(-0.5)),
        ("betas[1]", 0.99, 1 - 0.01 * math.exp(-0.5)),
    ]:
        h = hdet.param_group(field, spread=0.5)
        h.attach(optimizer)
        assert h.value(0.0) == pytest.approx(value)
        assert h.value(0.0, 1.0) == pytest.approx(up)
        h.write(0.5, 0.0)
        assert h.value(0.5) == pytest.approx(up)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 * math.exp(0.5))
    assert optimizer.param_groups[0]["betas"] == pytest.approx((1 - 0.1 * math.exp(-0.5), 1 - 0.01 * math.exp(-0.5)))


def test_places_keep_their_distances():
    model = net()
    p = hdet.module_attribute(model, nn.Dropout, "p", spread=0.1)
    p.attach(optimizer_of(model))
    p.write(0.05, 1.0)
    assert (model[1].p, model[3].p) == pytest.approx((0.35, 0.55))
    with p.neutral(0.05):
        assert (model[1].p, model[3].p) == pytest.approx((0.25, 0.45))
    assert (model[1].p, model[3].p) == pytest.approx((0.35, 0.55))


def test_a_group_without_weight_decay_stays_without():
    model = net()
    groups = [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.2)
    h = hdet.param_group("weight_decay", spread=0.5)
    h.attach(optimizer)
    h.write(0.0, 1.0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.0, 0.2 * math.exp(0.5)])


@given(st.floats(-1, 2), st.floats(-1, 1))
def test_replicas_stay_inside_the_bounds_and_apart(position, level):
    h = hdet.scalar("x", 0.2, spread=0.1, bounds=(0.0, 0.5))
    h.attach(optimizer_of(net()))
    clamped = h.clamped(position)
    assert 0 <= h.value(clamped, level) <= 0.5
    assert h.spread_at(clamped) >= 0.01 - 1e-12
    assert (h.value(clamped, 1.0) + h.value(clamped, -1.0)) / 2 == pytest.approx(h.value(clamped))


def test_tensors_are_written_in_place():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    tensor = optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    h = hdet.param_group("weight_decay", spread=0.5)
    h.attach(optimizer)
    h.write(0.0, 1.0)
    assert optimizer.param_groups[0]["weight_decay"] is tensor
    assert tensor.item() == pytest.approx(0.1 * math.exp(0.5))
    saved = optimizer.state_dict()
    h.write_centre(saved["param_groups"], 0.0)
    assert saved["param_groups"][0]["weight_decay"].item() == pytest.approx(0.1)
    assert tensor.item() == pytest.approx(0.1 * math.exp(0.5))
    smoothing = hdet.scalar("smoothing", 0.1, spread=0.05)
    smoothing.attach(optimizer)
    seen = smoothing.tensor()
    smoothing.write(0.0, 1.0)
    assert seen.item() == pytest.approx(0.15)
    assert float(smoothing) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hdet.param_group("weight_decay", spread=0.0), "Must be > 0"),
        (lambda: hdet.param_group("weight_decay", spread=0.1, space="cubic"), "Must be one of 'log', 'linear'"),
        (lambda: hdet.param_group("lr", spread=0.1), "learning rates have spread="),
        (lambda: hdet.param_group("betas[x]", spread=0.1), "betas"),
        (lambda: hdet.param_group("weight_decay", spread=0.1, bounds=(1.0, 0.5)), "low < high"),
        (lambda: hdet.module_attribute(nn.Linear(2, 2), nn.Dropout, "p", spread=0.1), "has no Dropout"),
        (lambda: hdet.module_attribute(net(), nn.Dropout, "q", spread=0.1), "of a Dropout is None"),
        (lambda: attached(hdet.param_group("nesterov", spread=0.1)), "has no 'nesterov'"),
        (lambda: attached(hdet.param_group("amsgrad", spread=0.1)), "amsgrad is False"),
        (lambda: attached(hdet.param_group("weight_decay", spread=0.1, groups=["head"])), "names none"),
        (lambda: attached(hdet.scalar("s", 0.9, spread=0.1, bounds=(0, 0.5))), "Must be in its bounds"),
        (lambda: attached(hdet.scalar("s", 0.0, spread=0.1, space="log")), "0 has no logarithm"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def attached(h):
    h.attach(optimizer_of(net()))


# ------------------------------------------------------------------------------------------------- what is identified


def dropout(**settings):
    return hdet.module_attribute(net(), nn.Dropout, "p", spread=0.1, **settings)


@pytest.mark.parametrize(
    ("make", "gradients", "probe", "held_out", "message"),
    [
        (dropout, "shared", True, True, 'Pass gradients="local"'),
        (dropout, "shared", False, False, "gives all replicas the same"),
        (dropout, "local", False, False, "which it changes directly"),
        (dropout, "local", True, False, "only held-out data"),
        (lambda: hdet.param_group("weight_decay", spread=0.1), "shared", True, False, "only held-out data"),
        (lambda: hdet.param_group("momentum", spread=0.1), "shared", False, False, "cannot be read off"),
    ],
)
def test_combinations_without_a_signal_are_refused(make, gradients, probe, held_out, message):
    with pytest.raises(ValueError, match=message):
        check_identified([make()], gradients=gradients, probe=probe, held_out=held_out)


@pytest.mark.parametrize(
    ("h", "gradients", "probe", "held_out"),
    [
        (dropout(), "local", True, True),
        (dropout(), "grouped", True, True),
        (dropout(move=False), "shared", False, False),
        (dropout(regularises=False), "local", True, False),
        (hdet.param_group("weight_decay", spread=0.1), "shared", True, True),
        (hdet.param_group("momentum", spread=0.1), "shared", True, False),
    ],
)
def test_combinations_with_a_signal_pass(h, gradients, probe, held_out):
    check_identified([h], gradients=gradients, probe=probe, held_out=held_out)


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Pass name="):
        check_identified([dropout(move=False)] * 2, gradients="local", probe=True, held_out=True)


def test_why_dropout_under_shared_gradients_is_refused():
    """The published signal, the replicas' training losses, under a shared gradient: all replicas have the same
    parameters, so dropout cannot have done anything to them; but a replica that drops more sees a larger loss. The
    hypergradient says "less" in every round, wherever the best value is."""
    torch.manual_seed(0)
    xs, ys = torch.randn(64, 8), torch.randint(0, 2, (64,))
    models = [nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 2)) for _ in range(4)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in models]
    published = Published()
    said = []
    for round in range(30):
        (column,) = levels(4, ["p"], seed=0, round=round)
        losses = [0.0] * 4
        for model, level in zip(models, column, strict=True):
            model[2].p = 0.3 + 0.1 * level
        for _ in range(20):
            gradients = []
            for r, model in enumerate(models):
                loss = F.cross_entropy(model(xs), ys)
                losses[r] += loss.item() / 20
                gradients.append(torch.autograd.grad(loss, list(model.parameters())))
            for model, optimizer in zip(models, optimizers, strict=True):
                for i, p in enumerate(model.parameters()):
                    p.grad = sum(g[i] for g in gradients) / 4
                optimizer.step()
        assert all(
            torch.equal(a, b)
            for model in models
            for a, b in zip(model.parameters(), models[0].parameters(), strict=True)
        )
        seen = hdet.controller.Observation(tuple(losses), multipliers_of(column, 0.1), 1.0)
        said.append(published.update(hdet.controller.ControllerState(), seen)[1])
    mean = sum(said) / len(said)
    error = (sum((x - mean) ** 2 for x in said) / (len(said) - 1) / len(said)) ** 0.5
    assert mean / error < -5


# ----------------------------------------------------------------------------------------------------------- steering


def test_one_slope_moves_down_the_slope_and_rests_in_noise():
    config = OneSlope()
    down = up = noise = CentreState()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        jitter = torch.randn((), generator=generator).item()
        down = config.update(down, 1.0 + 0.5 * jitter, spread=0.1)
        up = config.update(up, -1.0 + 0.5 * jitter, spread=0.1)
        noise = config.update(noise, jitter, spread=0.1)
    assert down.position < -0.8
    assert up.position > 0.8
    assert abs(noise.position) < 0.3
    assert config.update(up, math.nan, spread=0.1) is up


def test_one_slope_does_not_depend_on_the_units_of_the_loss():
    config, small, large = OneSlope(), CentreState(), CentreState()
    for effect in (0.3, 0.2, 0.5, -0.1, 0.4, 0.3, 0.2):
        small = config.update(small, effect, spread=0.1)
        large = config.update(large, 1000 * effect, spread=0.1)
    assert small.position == pytest.approx(large.position)
    assert small.position < 0


@pytest.mark.parametrize("length", [0.05, 0.25, 2.0])
def test_one_slope_counts_in_shares_of_the_run(length):
    def position(length):
        place, config = CentreState(), OneSlope()
        for k in range(round(40 / length)):
            place = config.update(place, length * (1 + 0.1 * (-1) ** k), spread=0.1, share=length / 100)
        return place.position

    assert position(length) == pytest.approx(position(1.0) / max(1.0, length), rel=0.15)


def test_steering_tells_how_long_a_round_is():
    def position(share):
        settings = {"auto_lr": False, "rates": 1, "names": ("h",), "replicas": 4, "spread": 0.1, "seed": 0}
        controllers = Controllers(Posterior(), OneSlope(), design="orthogonal", **settings)
        for round in range(6):
            (held,) = controllers.hyperparameter_levels(round)
            above, below, one = tuple(1 + 0.1 * z for z in held), tuple(1 - 0.1 * z for z in held), (1.0,) * 4
            probe = ProbeLosses(above, below, one, one, one)
            controllers.update(
                round, RoundObservation((), (0.1,), 0.3, share, 1.0, 0.55, 0.0, 4.0, probe), [(0.5, True)]
            )
        return controllers.centre_states[0].position

    assert position(0.01) < 0
    assert position(0.0025) == pytest.approx(position(0.01) / 4)


def scheduler_of(model=None, hyperparameters=(), gradients="local", **settings):
    model = model or net()
    optimizer = optimizer_of(model)
    return optimizer, hdet.OneCycleLR(
        optimizer,
        0.1,
        100,
        cycle_momentum=False,
        model=model,
        hyperparameters=hyperparameters,
        gradients=gradients,
        **settings,
    )


def test_bad_combinations_leave_the_optimizer_alone():
    model = net()
    optimizer = optimizer_of(model)
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="held_out=True"):
        hdet.OneCycleLR(optimizer, 0.1, 100, model=model, hyperparameters=[hdet.param_group("weight_decay", spread=1)])
    with pytest.raises(TypeError, match=r"Must be a list of what hdet\.param_group"):
        hdet.OneCycleLR(optimizer, 0.1, 100, model=model, hyperparameters=["weight_decay"])
    with pytest.raises(ValueError, match="cycle_momentum=True"):
        hdet.OneCycleLR(
            optimizer, 0.1, 100, model=model, hyperparameters=[hdet.param_group("betas[0]", spread=1, move=False)]
        )
    with pytest.raises(ValueError, match=r"Invalid exploration\.design"):
        hdet.Exploration(design="greedy")
    assert optimizer.param_groups[0] == before


def test_one_replica_keeps_the_centre():
    model = net()
    optimizer, _ = scheduler_of(model, [hdet.param_group("weight_decay", spread=0.5, move=False)])
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------------------- priors


def test_a_prior_is_a_small_file(tmp_path):
    model = net()
    h = hdet.param_group("weight_decay", spread=0.5, move=False)
    _, scheduler = scheduler_of(model, [h], spread=0.1)
    states = scheduler.ensemble._phases.steer._controllers.lr_states
    states[0] = states[0]._replace(gain=2.5)
    path = tmp_path / "prior.yaml"
    scheduler.ensemble.save_prior(path)
    assert path.read_text() == (
        "# hdet prior 1\ngains:\n  group0: 2.5\nhyperparameters:\n  weight_decay: 0.10000000000000002\n"
    )
    path.write_text("gains:\n  group0: 3\nhyperparameters:\n  weight_decay: 0.4\n")
    optimizer, again = scheduler_of(hyperparameters=[h], spread=0.1, prior=path)
    assert again.ensemble.gains == (3,)
    assert again.ensemble.centres == pytest.approx({"weight_decay": 0.4})
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)
    assert again.get_last_lr()[0] == pytest.approx(3 * 0.1 / 25)


def test_groups_are_listed_by_gain(tmp_path):
    Prior({"head": 3.0, "body": 0.5, "norm": 1.0}).save(tmp_path / "p.yaml")
    assert list(Prior.load(tmp_path / "p.yaml").gains) == ["body", "norm", "head"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gains:\n  other: 2.0\n", "this run"),
        ("gains:\n  group0: -1\n", "Must be > 0"),
        ("- 1\n", "is no prior"),
        ("gains: 3\n", "is no prior"),
    ],
)
def test_bad_priors_are_refused(tmp_path, text, message):
    path = tmp_path / "prior.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        scheduler_of(spread=0.1, prior=path)


# --------------------------------------------------------------------------------------------------- virtual replicas


def test_parameters_come_back_to_the_bit():
    model = net()
    _, scheduler = scheduler_of(model, gradients="shared", spread=0.3, virtual_replicas=3)
    for p in model.parameters():
        p.data.add_(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    seen = [(name, [p.detach().clone() for p in model.parameters()]) for name in scheduler.each("abc")]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert [name for name, _ in seen] == ["a", "b", "c"]
    (first, *_), (_, *_), (last, *_) = (values for _, values in seen)
    assert not torch.equal(first, last)
    mean = sum(values[0] for _, values in seen) / 3
    assert torch.allclose(mean, before[0])  # multipliers have mean 1
    unfinished = scheduler.each("abc")
    assert [next(unfinished), *scheduler.each("def")] == ["a", "d", "e", "f"]  # a step that was given up
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("batches", ["ab", "abcd"])
def test_each_takes_one_micro_batch_per_virtual_replica(batches):
    _, scheduler = scheduler_of(gradients="shared", spread=0.3, virtual_replicas=3)
    with pytest.raises(ValueError, match="virtual_replicas=3"):
        list(scheduler.each(batches))


def test_all_parameters_of_a_group_may_be_frozen_with_virtual_replicas():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, cycle_momentum=False, model=model, spread=0.1, virtual_replicas=2)
    for step in range(8):
        model[0].requires_grad_(step not in (2, 3, 4))
        for x in scheduler.each([torch.ones(1, 2)] * 2):
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(1.0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_without_virtual_replicas_each_passes_on():
    _, scheduler = scheduler_of(gradients="shared", spread=0.3)
    assert list(scheduler.each("ab")) == ["a", "b"]
    model = net()
    assert list(hdet.OneCycleLR(optimizer_of(model), 0.1, 10).each("ab")) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"virtual_replicas": 0}, "Must be >= 1"),
        ({"virtual_replicas": 2, "spread": 0.0}, "needs spread > 0"),
        ({"virtual_replicas": 2, "gradients": "local"}, "needs gradients='shared'"),
        (
            {"virtual_replicas": 2, "averaging": hdet.Averaging(overlap_steps=1), "converge_every": 5},
            "exclude one another",
        ),
        ({"virtual_replicas": 2, "hyperparameters": [dropout(move=False)]}, "share one optimizer"),
    ],
)
def test_bad_virtual_replicas_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(**{"spread": 0.1, "gradients": "shared", **settings})


def test_the_published_controller_wants_each_virtual_replicas_loss():
    settings = {"auto_lr": True, "controller": Published()}
    optimizer, scheduler = scheduler_of(gradients="shared", spread=0.3, virtual_replicas=2, **settings)
    optimizer.step()
    with pytest.raises(TypeError, match="loss of each"):
        scheduler.step(1.0)
    with pytest.raises(ValueError, match="3 losses for virtual_replicas=2"):
        scheduler.step([1.0, 2.0, 3.0])
    scheduler.step([1.0, 2.0])
    assert scheduler.ensemble.last_report.losses == (1.0, 2.0)


# -------------------------------------------------------------------------------------------------- warm noisy starts


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.low_precision = nn.Parameter(torch.randn(200).bfloat16())
        self.zero = nn.Parameter(torch.zeros(5))


def test_noise_is_in_proportion_and_leaves_the_rest():
    torch.manual_seed(0)
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    hdet.warm_noisy_start(model, 0.05, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.head.weight is model.embedding.weight
    after = model.state_dict()
    for name in ("embedding.weight", "low_precision"):
        moved = (after[name].double() - before[name].double()).norm() / before[name].double().norm()
        assert moved.item() == pytest.approx(0.05, rel=0.2)
    for name in ("frozen", "zero", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
    again = Tied()
    again.load_state_dict(before)
    hdet.warm_noisy_start(again, 0.05, seed=3)
    assert all(torch.equal(after[name], tensor) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="Invalid nu=-1"):
        hdet.warm_noisy_start(model, -1)


# ------------------------------------------------------------------------------------------------------ torch.compile


def test_dropout_with_a_tensor_drops_the_same_share():
    torch.manual_seed(0)
    layer = hdet.Dropout(0.3)
    x = torch.ones(200, 200, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(x.grad, y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.eval()(x) is x
    assert layer.state_dict() == {}
    assert repr(layer) == "Dropout(p=0.3)"
    with pytest.raises(ValueError, match="Invalid p=1"):
        hdet.Dropout(1)


def test_nothing_compiles_anew_when_values_change():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 8), hdet.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), weight_decay=0.1)
    p = hdet.module_attribute(model, hdet.Dropout, "p", spread=0.1)
    smoothing = hdet.scalar("smoothing", 0.1, spread=0.05, bounds=(0, 0.5))
    for h in (p, smoothing):
        h.attach(optimizer)
    value = smoothing.tensor()

    def loss_of(x, y):
        log_p = F.log_softmax(model(x), -1)
        return -((1 - value) * log_p.gather(1, y[:, None]).mean() + value * log_p.mean())

    torch._dynamo.reset()
    step = torch.compile(loss_of, backend=backend)
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    for level in (-1.0, -0.5, 0.0, 0.5, 1.0):
        p.write(0.0, level)
        smoothing.write(0.0, level)
        torch.manual_seed(0)
        loss = step(x, y)
        torch.manual_seed(0)
        assert torch.equal(loss, loss_of(x, y))
    assert len(compiled) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("nu", [-0.1, 1e308, float("inf")])
def test_noise_beyond_all_measure_is_refused_before_anything_is_changed(nu):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Invalid nu=.*in \[0, 1e6\]"):
        hdet.warm_noisy_start(model, nu=nu)
    assert all(map(torch.equal, before, model.parameters()))
