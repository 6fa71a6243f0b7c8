"""How far a round took the weights."""

import math

import pytest
import torch
from torch import nn

from hdet.buckets import Bucket, fill_buckets
from hdet.observe.movement import Layout, movement


def _layout(tensors: list[torch.Tensor], bucket_bytes: int = 2**20) -> tuple[Layout, list[Bucket]]:
    buckets = fill_buckets(tensors, bucket_bytes, lambda t: t.device)
    return Layout(tensors, [bucket.pieces for bucket in buckets]), buckets


def _moved(
    tensors: list[torch.Tensor], by: list[torch.Tensor], bucket_bytes: int = 2**20
) -> tuple[Layout, torch.Tensor]:
    layout, buckets = _layout(tensors, bucket_bytes)
    before = [bucket.pack() for bucket in buckets]
    for tensor, change in zip(tensors, by, strict=True):
        tensor.detach().add_(change)
    return layout, layout.squares([bucket.pack() for bucket in buckets], before)


@pytest.mark.parametrize("bucket_bytes", [2**20, 28, 4])
def test_squares_agree_with_the_plain_norms_however_tensors_are_cut_into_buckets(bucket_bytes: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 3, 2), torch.randn(()), torch.randn(1, 6)]
    by = [torch.randn_like(t) for t in tensors]
    layout, squares = _moved(tensors, by, bucket_bytes)
    assert [m.rows for m in layout.matrices] == [3, 2, 1]
    wanted = [
        [float(b.square().sum()), float(t.square().sum())] for t, b in zip(tensors, by, strict=True) if t.dim() >= 2
    ]
    torch.testing.assert_close(squares, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_round_that_moves_each_matrix_by_a_tenth_of_its_default_size_has_a_movement_of_a_tenth() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
    tensors: list[torch.Tensor] = list(net.parameters())
    layout, squares = _moved(tensors, [0.1 * t.detach() for t in tensors])
    assert layout.movement(squares) == pytest.approx(0.1, rel=0.1)


def test_tied_weights_count_once() -> None:
    weight = torch.randn(4, 4)
    layout, _ = _layout([weight, torch.randn(2), weight])
    assert len(layout.matrices) == 1


def test_a_matrix_that_starts_at_zero_has_its_default_size() -> None:
    weight = torch.zeros(12, 5)
    layout, squares = _moved([weight], [torch.full((12, 5), 0.01)])
    assert layout.movement(squares) == pytest.approx(0.01 * math.sqrt(60) / math.sqrt(12 / 3))


def test_growth_of_the_norm_counts_by_half() -> None:
    own = 4.0
    assert movement([[0.01, own]], [own]) == pytest.approx(0.05)
    assert movement([[0.01, 16 * own]], [own]) == pytest.approx(0.05 / 2)
    assert movement([[0.01, own / 16]], [own]) == pytest.approx(0.05)


@pytest.mark.parametrize(("odd", "wanted"), [([0.0, 1.0], 1 / 4), ([1e6, 1e6], 4.0), ([0.04, 1.0], 2.0)])
def test_one_matrix_that_stands_still_or_runs_away_counts_as_a_quarter_or_four_times_the_median(
    odd: list[float], wanted: float
) -> None:
    assert movement([*[[0.01, 1.0]] * 4, odd], [1.0] * 5) == pytest.approx(0.1 * wanted**0.2)


def test_where_most_matrices_stand_still_there_is_none() -> None:
    assert movement([[0.01, 1.0], [0.0, 1.0], [0.0, 1.0]], [1.0] * 3) == 0.0


def test_of_two_matrices_it_is_the_geometric_mean() -> None:
    assert movement([[0.01, 1.0], [0.16, 1.0]], [1.0, 1.0]) == pytest.approx(0.2)


@pytest.mark.parametrize("squares", [[], [[math.nan, 1.0]], [[1.0, math.inf]]])
def test_without_a_finite_matrix_there_is_no_movement(squares: list[list[float]]) -> None:
    assert math.isnan(movement(squares, [1.0] * len(squares)))


def test_shards_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    whole, by = torch.randn(6, 3), torch.randn(6, 3)
    _, wanted = _moved([whole.clone()], [by])
    total = torch.zeros_like(wanted)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 6)):
        shard = whole[rows].clone()
        buckets = fill_buckets([shard], 2**20, lambda t: t.device)
        layout = Layout([shard], [b.pieces for b in buckets], shapes=[whole.shape])
        before = [b.pack() for b in buckets]
        shard.add_(by[rows])
        total += layout.squares([b.pack() for b in buckets], before)
        assert layout.matrices == [(6, 2.0)]
    torch.testing.assert_close(total, wanted)


def test_a_strided_parameter_is_found() -> None:
    weight = torch.randn(4, 10)[:, ::2]
    by = torch.randn(4, 5)
    _, squares = _moved([weight], [by])
    assert float(squares[0, 0]) == pytest.approx(float(by.square().sum()), rel=1e-5)


def test_sums_over_many_elements_are_right() -> None:
    """One fp32 sum of 5e7 equal squares is several percent off."""
    weight = torch.zeros(5000, 1000)
    _, squares = _moved([weight], [torch.full_like(weight, 0.1)])
    assert float(squares[0, 0]) == pytest.approx(5e4, rel=2e-3)


def test_as_many_shapes_as_tensors() -> None:
    with pytest.raises(ValueError, match="2 shapes for 1 tensors"):
        Layout([torch.ones(2, 2)], [], shapes=[(2, 2), (3, 3)])
