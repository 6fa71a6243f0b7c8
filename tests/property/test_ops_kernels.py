"""Every kernel gives the reference's bits, for random lists of shapes, dtypes, alignments and non-finite values.

The CUDA kernels run on a GPU where there is one, and anywhere there is g++ in ``csrc/cuda/emulation.h``: their source
compiled for the CPU, thread by thread.
"""

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdet import ops
from hdet.ops import _reference
from hdet.ops._schema import SCHEMAS

BUILD = Path(__file__).parents[2] / "csrc" / "build_native.py"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=["cpu", "emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def kernels(request):
    """The ops as torch's dispatcher picks them for ``device``."""
    name, device, definitions = "hdet", request.param, None
    if request.param == "emulated":
        name, device, definitions = "hdet_emulated", "cpu", emulate(request.getfixturevalue("tmp_path_factory"))
    namespace = getattr(torch.ops, name)
    ops = {name: getattr(namespace, name) for name in (schema.partition("(")[0] for schema in SCHEMAS)}
    return SimpleNamespace(device=device, definitions=definitions, **ops)


def emulate(tmp_path_factory):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs a C++ compiler and setuptools")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    subprocess.run([sys.executable, BUILD, "emulate", library], check=True)
    definitions = torch.library.Library("hdet_emulated", "DEF")
    for schema in SCHEMAS:
        definitions.define(schema)
    torch.ops.load_library(library)
    return definitions


def flat(draw, size, dtype, device, guard=3):
    """Random values between two guards, of which the first decides how well the tensor is aligned."""
    before = draw(st.integers(0, guard))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    exponent = draw(st.sampled_from([-40, -8, 0, 5]))
    values = (torch.randn(before + size + guard, generator=generator, dtype=torch.float64) * 2.0**exponent).to(dtype)
    values[:before] = values[before + size :] = 77
    return values.to(device)[before : before + size]


def guards_hold(tensor):
    everything = tensor.new_empty(0).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    outside = torch.cat([everything[:start], everything[start + tensor.numel() :]])
    return bool((outside == 77).all())


def spoil(draw, tensor):
    for value in draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]), max_size=2)):
        if tensor.numel():
            tensor[draw(st.integers(0, tensor.numel() - 1))] = value


LIMITS = st.one_of(
    st.sampled_from(
        [0.0, 1e-45, 6e-8, 1.0, 65504.0, 65519.0, 3.38e38, 3.402e38, torch.finfo(torch.float32).max, 1e300, math.inf]
    ),
    st.floats(0, 1e6),
)
SIZES = st.one_of(
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.sampled_from([1023, 1024, 1025, 2047, 2048, 2049, 4096, 8192, 12300]), max_size=3),
    st.tuples(st.integers(1, 2), st.integers(200, 2600)).map(lambda few: [few[0]] * few[1]),  # several launches
)


def draw_case(draw, device):
    wire_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    real = _reference.accumulator(wire_dtype)
    dtypes = [torch.float64] if real == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    if draw(st.booleans()):
        dtypes = [draw(st.sampled_from(dtypes))]
    sizes = draw(SIZES)
    if len(sizes) > 100:  # drawing each piece would be slow: cut one buffer
        pieces = list(flat(draw, sum(sizes), dtypes[0], device, guard=0).split(sizes))
    else:
        pieces = [flat(draw, size, draw(st.sampled_from(dtypes)), device) for size in sizes]
    for piece in pieces[:3]:
        spoil(draw, piece)
    total = sum(sizes)
    wire = flat(draw, total, wire_dtype, device)
    anchor = flat(draw, total, real, device) if draw(st.booleans()) else None
    slow = flat(draw, total, real, device) if draw(st.booleans()) else None
    return wire, pieces, anchor, slow


def clone(tensors):
    """Copies with the same alignment and guards."""

    def one(tensor):
        if tensor is None:
            return None
        storage = tensor.untyped_storage().clone()
        return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return [one(tensor) for tensor in tensors]


def same_bits(a, b):
    """Equal bit for bit, but for the payloads of NaNs, which torch itself does not keep alike."""
    a, b = a.reshape(-1), b.reshape(-1)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(integer), b[~nan].view(integer))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pack_gives_the_references_bits(kernels, data):
    wire, pieces, anchor, _ = draw_case(data.draw, kernels.device)
    scale = data.draw(st.sampled_from([1.0, 0.125, -0.3, 1e30]))
    (expected,) = clone([wire])
    before = clone([*pieces, anchor])
    limit = data.draw(LIMITS)
    beyond = kernels.pack(wire, pieces, scale, anchor, limit)
    assert int(_reference.pack(expected, pieces, scale, anchor, limit)) == int(beyond)
    assert int((~(wire.double().abs() <= limit) | wire.isinf()).sum()) == int(beyond)
    assert same_bits(wire, expected)
    assert guards_hold(wire)
    assert all(same_bits(old, new) for old, new in zip(before, [*pieces, anchor], strict=True) if old is not None)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unpack_gives_the_references_bits(kernels, data):
    wire, pieces, anchor, slow = draw_case(data.draw, kernels.device)
    spoil(data.draw, wire)
    divisor = data.draw(st.sampled_from([1.0, 2, 3, 8, 7.5]))
    decay = data.draw(st.sampled_from([0.8, 0.0, 0.5]))
    groups = data.draw(st.sampled_from([0, 1, 3, 150]))
    generator = torch.Generator().manual_seed(groups)
    factors = [torch.rand(groups, generator=generator, dtype=torch.float64).to(kernels.device) for _ in range(3)]
    lrs = [
        torch.zeros((), dtype=torch.float64 if g % 2 else torch.float32, device=kernels.device) for g in range(groups)
    ]

    written = [*pieces, anchor, slow, *lrs]
    expected = clone(written) if len(pieces) <= 100 else [None if t is None else t.clone() for t in written]
    n = len(pieces)
    squared_distance = kernels.unpack(wire, pieces, divisor, anchor, slow, decay, lrs, *factors)
    reference = _reference.unpack(
        wire, expected[:n], divisor, expected[n], expected[n + 1], decay, expected[n + 2 :], *factors
    )
    assert same_bits(squared_distance, reference)
    for a, b in zip(written, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or same_bits(a, b)
    if n <= 100:
        assert all(guards_hold(t) for t in [*pieces, anchor, slow] if t is not None and t.numel())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_scale_rates_gives_the_references_bits(kernels, data):
    groups = data.draw(st.sampled_from([1, 3, 64, 150]))
    numbers = st.lists(
        st.sampled_from([0.0, -0.0, -1.5, math.inf, math.nan]) | st.floats(1e-40, 1e30),
        min_size=groups,
        max_size=groups,
    )
    factors = [data.draw(numbers) for _ in range(3)]
    lrs = [torch.zeros((), dtype=torch.float64 if g % 2 else torch.float32) for g in range(groups)]
    written = [lr.to(kernels.device) for lr in lrs]
    kernels.scale_rates(written, *factors)
    _reference.scale_rates(lrs, *factors)
    assert all(same_bits(a.cpu(), b) for a, b in zip(written, lrs, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_finite_looks_at_every_element_and_at_no_other(kernels, data):
    """In any mix of dtypes; one element decides, wherever it lies, and what lies around the pieces does not."""
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    sizes = data.draw(SIZES.filter(lambda sizes: sum(sizes) > 0))
    memory = [torch.full((size + 7,), float("nan"), dtype=data.draw(dtypes)) for size in sizes[:12]]
    memory += [torch.full((size + 7,), float("nan")) for size in sizes[12:]]
    pieces = [flat.to(kernels.device)[3 : 3 + size] for flat, size in zip(memory, sizes, strict=True)]
    for piece in pieces:
        piece.fill_(-1.5)
    assert bool(kernels.all_finite(pieces, 1.5))
    assert not bool(kernels.all_finite(pieces, math.nextafter(1.5, 0)))
    spoilt = data.draw(st.sampled_from([piece for piece in pieces if piece.numel()]))
    spoilt[data.draw(st.integers(0, spoilt.numel() - 1))] = data.draw(st.sampled_from([float("nan"), -float("inf")]))
    assert not bool(kernels.all_finite(pieces, math.inf))
    assert not bool(_reference.all_finite(pieces, math.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_finite_compares_with_the_limit_exactly(kernels, dtype, data):
    limit = data.draw(LIMITS)
    most = torch.finfo(dtype).max
    value = torch.tensor(min(limit, most), dtype=dtype, device=kernels.device).reshape(1)
    for one in (value, value * 1.01, value * 0.99, -value):
        fits = bool(one.isfinite()) and abs(one.item()) <= limit
        assert bool(kernels.all_finite([one], limit)) == bool(_reference.all_finite([one], limit)) == fits


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_element_is_packed_and_unpacked_once(kernels, data):
    sizes = data.draw(SIZES)
    pieces = [torch.empty(size, device=kernels.device) for size in sizes]
    for piece, start in zip(pieces, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False):
        piece.copy_(torch.arange(start, start + piece.numel()))
    wire = torch.full((sum(sizes),), -1.0, device=kernels.device)
    assert kernels.pack(wire, pieces, 1.0, None, math.inf) == 0
    assert torch.equal(wire.cpu(), torch.arange(float(sum(sizes))))
    # Each element moves by exactly 1: one written twice, or missed, would show in it or in the distance.
    moved = kernels.unpack(wire + 1, pieces, 1.0, None, None, 0.8, [], None, None, None)
    assert moved == sum(sizes)
    assert torch.equal(torch.cat([wire[:0], *pieces]), wire + 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_packing_again_after_unpacking_gives_zeros(kernels, data):
    """Converging twice is converging once: the anchor is what the pieces hold, whatever their dtype and the wire's."""
    wire, pieces, anchor, _ = draw_case(data.draw, kernels.device)
    if anchor is None:
        anchor = torch.zeros_like(wire, dtype=_reference.accumulator(wire.dtype))
    for tensor in (wire, *pieces):
        tensor.nan_to_num_(0, 1, -1).clamp_(-8, 8)
    kernels.unpack(wire, pieces, 3.0, anchor, None, 0.8, [], None, None, None)
    assert kernels.pack(wire, pieces, 1.0, anchor, math.inf) == 0
    assert not wire.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_16_bit_values_widen_and_round_like_torch(kernels, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(kernels.device)
    wire = torch.empty(2**16, device=kernels.device)
    assert kernels.pack(wire, [every], 1.0, None, math.inf) == (~every.isfinite()).sum()
    assert same_bits(wire, every.float())

    # To nearest, ties to even: every value, the middles between neighbours, and one bit to either side of them.
    finite = wire[wire.isfinite()].double().sort().values
    middles = ((finite[1:] + finite[:-1]) / 2).float().view(torch.int32)
    numbers = torch.cat([(middles + step).view(torch.float32) for step in (-1, 0, 1)] + [wire])
    numbers = torch.cat([numbers, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45, -1e-45], device=kernels.device)])
    piece = torch.zeros(numbers.numel(), dtype=dtype, device=kernels.device)
    kernels.unpack(numbers, [piece], 1.0, None, None, 0.8, [], None, None, None)
    assert same_bits(piece, numbers.to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_statistics_do_not_depend_on_threads(threads):
    generator = torch.Generator().manual_seed(0)
    sizes = [100_000, 3, 77_777, 0, 250_001]
    values = torch.randn(sum(sizes), generator=generator)
    wire = torch.randn(sum(sizes), generator=generator)
    expected = _reference.unpack(wire, list(values.clone().split(sizes)), 3.0, None, None, 0.8, [], None, None, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert ops.unpack(wire, list(values.split(sizes)), divisor=3) == expected
    finally:
        torch.set_num_threads(before)
