"""How far a round takes the weights."""

import math

import pytest
import torch
from torch import nn

import hdet
from hdet.model.weights import Weights
from hdet.observe.movement import Matrices, MovementMeter, movement
from hdet.replicas.topology import Replicas


def moved(tensors, by, shapes=None):
    matrices = Matrices(tensors, shapes)
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for tensor, change in zip(tensors, by, strict=True):
            tensor.add_(change)
    return matrices, matrices.squares([t.detach() for t in tensors], before)


@pytest.mark.parametrize("chunk_bytes", [2**20, 60, 4])
def test_squares_agree_with_the_plain_norms_in_chunks_of_any_size(monkeypatch, chunk_bytes):
    monkeypatch.setattr("hdet.observe.movement._CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 3, 2), torch.randn(()), torch.randn(1, 6).double()]
    by = [torch.randn_like(t) for t in tensors]
    matrices, squares = moved(tensors, by)
    assert matrices.own == [1.0, 2 / 3, 1 / 3]
    wanted = [
        (float(b.square().sum()), float(t.square().sum())) for t, b in zip(tensors, by, strict=True) if t.dim() > 1
    ]
    torch.testing.assert_close(torch.tensor(squares), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_a_round_that_moves_each_matrix_by_a_tenth_of_its_default_size_has_a_movement_of_a_tenth():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
    tensors = list(net.parameters())
    matrices, squares = moved(tensors, [0.1 * t.detach() for t in tensors])
    assert movement(squares, matrices.own) == pytest.approx(0.1, rel=0.1)


def test_tied_frozen_and_flat_tensors():
    weight = torch.randn(4, 4)
    assert Matrices([weight, torch.randn(2), weight, torch.randn(0, 3)]).indices == [0]
    flat = [torch.ones(6), torch.ones(1)]  # a framework's partitions: no matrices, so each counts with its own norm
    matrices, squares = moved(flat, [torch.full((6,), 0.1), torch.ones(1)])
    assert matrices.indices == [0]
    assert movement(squares, matrices.own) == pytest.approx(0.1 / 1.1)


def test_a_matrix_that_starts_at_zero_has_its_default_size():
    matrices, squares = moved([torch.zeros(12, 5)], [torch.full((12, 5), 0.01)])
    assert movement(squares, matrices.own) == pytest.approx(0.01 * math.sqrt(60) / math.sqrt(12 / 3))


def test_growth_of_the_norm_counts_by_half():
    own = 4.0
    assert movement([[0.01, own]], [own]) == pytest.approx(0.05)
    assert movement([[0.01, 16 * own]], [own]) == pytest.approx(0.05 / 2)
    assert movement([[0.01, own / 16]], [own]) == pytest.approx(0.05)


@pytest.mark.parametrize(("odd", "wanted"), [([0.0, 1.0], 1 / 4), ([1e6, 1e6], 4.0), ([0.04, 1.0], 2.0)])
def test_one_matrix_that_stands_still_or_runs_away_counts_as_a_quarter_or_four_times_the_median(odd, wanted):
    assert movement([*[[0.01, 1.0]] * 4, odd], [1.0] * 5) == pytest.approx(0.1 * wanted**0.2)


def test_where_most_matrices_stand_still_there_is_none():
    assert movement([[0.01, 1.0], [0.0, 1.0], [0.0, 1.0]], [1.0] * 3) == 0.0


@pytest.mark.parametrize("squares", [[], [[math.nan, 1.0]], [[1.0, math.inf]]])
def test_without_a_finite_matrix_there_is_no_movement(squares):
    assert math.isnan(movement(squares, [1.0] * len(squares)))


def test_shards_add_up_to_the_whole():
    torch.manual_seed(0)
    whole, by = torch.randn(6, 3), torch.randn(6, 3)
    _, wanted = moved([whole.clone()], [by])
    total = [0.0, 0.0]
    for rows in (slice(0, 4), slice(4, 6), slice(6, 6)):
        matrices, squares = moved([whole[rows].clone()], [by[rows]], shapes=[whole.shape])
        assert matrices.own == [2.0]
        total = [t + s for t, s in zip(total, squares[0], strict=True)]
    assert total == pytest.approx(wanted[0])


def run(steps, *, per_group=False, **settings):
    """An ensemble whose weights an outsider moves by a tenth of their size in every round of two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    reports = []
    ensemble = hdet.Ensemble(
        optimizer, model=model, spread=0.1, converge_every=2, auto_lr=True, per_group=per_group, monitor=reports.append,
        total_steps=100, **settings,
    )  # fmt: skip
    for _ in range(steps):
        optimizer.step()
        with torch.no_grad():
            for p, by in zip(model.parameters(), (0.05, 0.0, 0.2), strict=True):
                p.add_(
                    by * p.norm() * torch.nn.functional.normalize(torch.randn_like(p), dim=None if p.dim() < 1 else 0)
                )
        ensemble.step(1.0)
    return model, reports


def expected(now, before):
    now, before = now.detach(), before.detach()
    return float((now - before).norm()) / math.sqrt(max(float(now.norm()), math.sqrt(64 / 3)) * math.sqrt(64 / 3))


@pytest.mark.parametrize("per_group", [False, True])
def test_the_engine_measures_from_the_round_s_start_to_its_end(per_group):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    model, reports = run(2, per_group=per_group)
    each = [expected(model[i].weight, start[i].weight) for i in (0, 1)]
    wanted = each if per_group else [math.sqrt(each[0] * each[1])] * 2
    assert reports[0].movement == pytest.approx(wanted, rel=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    model, reports = run(4, per_group=per_group)
    each = [expected(model[0].weight, before[0]), expected(model[1].weight, before[2])]
    wanted = each if per_group else [math.sqrt(each[0] * each[1])] * 2
    assert reports[1].movement == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("per_group", [False, True])
def test_without_a_copy_of_the_state_it_is_the_same(per_group):
    """The first round begins before the optimizer's first step, and not after it, when step() is first called."""
    for steps in (2, 8):
        with_copy, without = (run(steps, per_group=per_group, **more)[1] for more in ({}, {"rollback": False}))
        assert [r.movement for r in without] == [r.movement for r in with_copy]


def test_published_does_not_measure_it_where_no_copy_is_kept():
    _, reports = run(2, rollback=False, controller=hdet.controller.Published())
    assert all(math.isnan(x) for x in reports[0].movement)


@pytest.mark.parametrize("rollback", [True, False])
def test_a_step_that_amp_skipped_hides_no_start(rollback):
    """Its hook did not run."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = hdet.Ensemble(
        optimizer, total_steps=100, model=model, converge_every=2, auto_lr=True, rollback=rollback
    )
    scheduler.step(1.0)
    start = model.weight.detach().clone()
    model.weight.data += 0.1 * torch.randn(64, 64)
    optimizer.step()
    scheduler.step(1.0)
    (moved,) = scheduler.last_report.movement
    assert moved == pytest.approx(expected(model.weight, start), rel=1e-4)


@pytest.mark.parametrize("rollback", [True, False])
@pytest.mark.parametrize("after", [1, 3])
def test_after_a_resume_in_a_round_the_rest_of_it_stands_for_the_whole(rollback, after):
    """The weights walk like the square root of the steps."""

    def build():
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        settings = {"model": model, "converge_every": 4, "auto_lr": True, "rollback": rollback, "total_steps": 100}
        return model, optimizer, hdet.Ensemble(optimizer, **settings)

    _, optimizer, ensemble = build()
    for _ in range(4 + after):
        optimizer.step()
        ensemble.step(1.0)
    model, optimizer, resumed = build()
    resumed.load_state_dict(ensemble.state_dict())
    start = model.weight.detach().clone()
    for _ in range(4 - after):
        optimizer.step()
        model.weight.data += 0.1 * torch.randn(64, 64)
        resumed.step(1.0)
    (moved,) = resumed.last_report.movement
    assert moved == pytest.approx(expected(model.weight, start) / math.sqrt((4 - after) / 4), rel=1e-4)


def test_of_flat_partitions_each_learning_rate_has_one_movement():
    """As DeepSpeed keeps them: there is no telling which part of which matrix they are."""

    class Flat(Weights):
        def tensors(self):
            return [(p, True) for p in parameters]

        def shapes(self):
            return [tuple(p.shape) for p in parameters]

    parameters = [torch.full((n,), 2.0) for n in (6, 2, 8)]
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    starts = {p.data_ptr(): p.clone() for p in parameters}
    for p, by in zip(parameters, (0.1, 0.3, 0.4), strict=True):
        p += by
    each = [math.sqrt(0.06 + 0.18) / math.sqrt(6 * 2.1**2 + 2 * 2.3**2), 0.4 / 2.4]
    for per_group, wanted in ((True, each), (False, [math.sqrt(0.24 + 8 * 0.16) / math.sqrt(37.04 + 8 * 2.4**2)])):
        meter = MovementMeter(Flat(()), optimizer, Replicas(None), per_group=per_group, kept=lambda: starts)
        assert meter.measure() == pytest.approx(wanted)
        meter.restart(0.25)
        assert meter.measure() == pytest.approx([m * 2 for m in wanted])


def test_double_precision_and_many_elements():
    weight = torch.zeros(20, 10, dtype=torch.float64)
    _, ((square, _),) = moved([weight], [torch.full_like(weight, 1e-3)])
    assert square == pytest.approx(200 * 1e-6, rel=1e-12)
    weight = torch.zeros(5000, 1000)  # one fp32 sum of so many equal squares is percents off
    _, ((square, _),) = moved([weight], [torch.full_like(weight, 0.1)])
    assert square == pytest.approx(5e4, rel=2e-3)
