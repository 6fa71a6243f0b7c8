"""Packing: every element of every tensor is in exactly one piece, and comes back where it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdet import ops
from hdet.converge.buckets import fill_buckets, wire_dtype
from hdet.model.fingerprint import fingerprint
from hdet.ops import _reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@st.composite
def tensor(draw):
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-99, 99, shape, generator=generator).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "holes", "expanded", "offset"]))
    if layout == "transposed" and values.dim() > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "holes" and values.dim():
        values = values.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "expanded":
        values = values.unsqueeze(0).expand(3, *values.shape)
    elif layout == "offset":
        values = torch.cat([values.reshape(-1)[:0], torch.zeros(1, dtype=dtype), values.reshape(-1)])[1:]
    return values


@settings(max_examples=300, deadline=None)
@given(st.lists(tensor(), max_size=8), st.integers(1, 300))
def test_pack_and_unpack_touch_every_element_once(tensors, bucket_bytes):
    before = [t.clone() for t in tensors]
    buckets = fill_buckets(tensors, bucket_bytes, lambda t: t.device)
    distinct = sum(
        (2 if t.is_complex() else 1) * (t.numel() // (3 if t.dim() and t.stride(0) == 0 and t.size(0) == 3 else 1))
        for t in tensors
    )
    assert sum(bucket.numel for bucket in buckets) == distinct
    for bucket in buckets:
        assert bucket.numel == sum(piece.numel() for piece in bucket.pieces)
        capacity = max(1, bucket_bytes // bucket.dtype.itemsize)
        assert bucket.numel <= capacity or bucket.pieces[-1].dim() > 1  # only a tensor with holes stays whole
        assert all(wire_dtype(piece.dtype) == bucket.dtype for piece in bucket.pieces)
        wire = bucket.pack()
        distance = bucket.unpack(wire * 6 if bucket.dtype.is_floating_point else wire, 3)
        assert distance == (wire.double().square().sum() if bucket.dtype.is_floating_point else 0)
    for old, new in zip(before, tensors, strict=True):
        # A scaling by 2 of every element, once: an element missed or written twice would show.
        factor = 2 if old.is_floating_point() or old.is_complex() else 1
        assert torch.equal(new, old * factor if factor == 2 else old)


@settings(max_examples=300, deadline=None)
@given(tensor(), st.data())
def test_afingerprint_sees_any_single_change(values, data):
    values = values.contiguous()
    if not values.numel():
        return
    changed = values.clone().reshape(-1)
    at = data.draw(st.integers(0, changed.numel() - 1))
    changed[at] = ~changed[at] if values.dtype == torch.bool else changed[at] + data.draw(st.sampled_from([1, -3, 64]))
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(changed.view(values.shape)) != fingerprint(values)


def test_afingerprint_sees_positions_signs_and_constants():
    x = torch.arange(10_000.0)
    assert fingerprint(x) != fingerprint(x.flip(0))
    assert fingerprint(torch.zeros(64)) != fingerprint(torch.ones(64))
    assert fingerprint(torch.zeros(64)) != fingerprint(-torch.zeros(64))
    assert fingerprint(torch.full((64,), 0.5)) != fingerprint(torch.full((64,), 0.25))


def test_finite():
    def finite(tensors):
        return all(bucket.is_finite() for bucket in fill_buckets(tensors, 2**20, lambda t: t.device))

    good = [
        torch.ones(3),
        torch.ones(2, dtype=torch.float64) * 1e300,
        torch.ones(2).half(),
        torch.ones(2, dtype=torch.int64),
        torch.ones(4, 4)[:, ::2],
    ]
    assert finite(good)
    assert finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
            assert not finite([*good, torch.tensor([1.0, bad, 2.0]).to(dtype)])
            assert not finite([*good, torch.tensor([[1.0, 0.0], [bad, 2.0]]).to(dtype).expand(2, 2, 2)[..., :1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (3, 70_000), (3, 199_999)])
def test_all_finite_finds_one_element_among_many(dtype, place):
    pieces = [torch.zeros(size, dtype=dtype) for size in (1, 1023, 0, 200_000)]
    assert ops.all_finite(pieces)
    pieces[place[0]][place[1]] = float("nan")
    assert not ops.all_finite(pieces)
    assert not _reference.all_finite(pieces, float("inf"))
