"""The ops' contract: equations, errors, autograd, torch.library, torch.compile, and life without the native library."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdet import ops
from hdet.ops import _native, _reference, _schema

FP64 = torch.float64


def pieces_of(*sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def everything(groups=2):
    """Arguments of an unpack that uses all it can do."""
    pieces = [*pieces_of(5, 1024, 0), *pieces_of(33, dtype=torch.bfloat16), *pieces_of(70, dtype=torch.float16)]
    total = sum(piece.numel() for piece in pieces)
    wire, anchor, slow = pieces_of(total, total, total, seed=1)
    factors = [factor.to(FP64) for factor in pieces_of(groups, groups, groups, seed=2)]
    lrs = [torch.zeros((), dtype=FP64 if g % 2 else torch.float32) for g in range(groups)]
    return (wire, pieces, 3.0, anchor, slow, 0.8, lrs, *factors)


def named(factors):
    return dict(zip(FACTORS, factors, strict=True))


# ------------------------------------------------------------------------------------------------- the equations


def test_pack_is_the_equation():
    pieces = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.empty(0)]
    wire, anchor = torch.empty(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])
    assert ops.pack(wire, pieces, scale=0.5, anchor=anchor) == 0
    assert wire.tolist() == [0.0, 0.5, 1.0, 1.5, 1.0]


def test_unpack_is_the_equations():
    pieces = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    anchor, slow = torch.tensor([10.0, 10.0, 10.0]), torch.tensor([0.0, 20.0, 0.0])
    lrs = [torch.zeros(()), torch.zeros(1, dtype=FP64)]
    factors = {name: torch.tensor(values, dtype=FP64) for name, values in FACTORS.items()}
    squared_distance = ops.unpack(
        torch.tensor([2.0, 4.0, 6.0]), pieces, divisor=2, anchor=anchor, slow=slow, slow_decay=0.75, lrs=lrs, **factors
    )
    assert [piece.tolist() for piece in pieces] == [[11.0, 12.0], [13.0]]
    assert anchor.tolist() == [11.0, 12.0, 13.0]
    assert slow.tolist() == [2.75, 18.0, 3.25]
    assert squared_distance == 300.0
    assert lrs[0] == torch.tensor(0.1 * 0.5 * 1.1)
    assert lrs[1].item() == 0.2 * 2.0 * 0.9


def test_scale_rates_is_the_equation():
    lrs = [torch.zeros(()), torch.zeros(1, dtype=FP64)]
    versions = [lr._version for lr in lrs]
    assert ops.scale_rates(lrs, **FACTORS) is None
    assert lrs[0] == torch.tensor(0.1 * 0.5 * 1.1)
    assert lrs[1].item() == 0.2 * 2.0 * 0.9
    assert all(lr._version > version for lr, version in zip(lrs, versions, strict=True))


RATE_ERRORS = {
    "none": (ValueError, "lrs is empty", {"lrs": [], "schedule": [], "gain": [], "multiplier": []}),
    "no list": (TypeError, "Invalid lrs=tensor", {"lrs": torch.zeros(2)}),
    "dtype": (TypeError, r"lrs\[1\] has dtype torch.float16", {"lrs": [torch.zeros(()), torch.zeros(()).half()]}),
    "shape": (ValueError, r"lrs\[0\] has shape \(2,\)", {"lrs": [torch.zeros(2), torch.zeros(())]}),
    "device": (ValueError, r"lrs\[1\] is on meta", {"lrs": [torch.zeros(()), torch.zeros((), device="meta")]}),
    "memory": (ValueError, r"lrs\[0\] and lrs\[1\] share memory", {"lrs": [(twice := torch.zeros(())), twice]}),
    "memory in part": (
        ValueError,
        r"share memory",
        {"lrs": [(eight := torch.zeros(1, dtype=FP64))[0], eight.view(torch.float32)[1]]},
    ),
    "too few": (ValueError, r"gain=\[1.0\]. It has 1 items. Must be a list of 2", {"gain": [1.0]}),
    "no number": (TypeError, r"multiplier\[1\]=None", {"multiplier": [1.0, None]}),
}


@pytest.mark.parametrize(("error", "message", "arguments"), RATE_ERRORS.values(), ids=RATE_ERRORS)
def test_what_is_wrong_with_rates_is_named_and_nothing_written(error, message, arguments):
    lrs = [torch.zeros(()), torch.zeros(())]
    given = {"lrs": lrs, **FACTORS, **arguments}
    with pytest.raises(error, match=message):
        ops.scale_rates(**given)
    if error is ValueError and given["lrs"]:
        with pytest.raises((RuntimeError, TypeError, ValueError)):  # the kernel itself refuses, too
            torch.ops.hdet.scale_rates(*given.values())
    assert lrs == [0.0, 0.0]


FACTORS = {"schedule": [0.1, 0.2], "gain": [0.5, 2.0], "multiplier": [1.1, 0.9]}


def test_nothing_at_all():
    lr = torch.zeros(())
    factors = {name: torch.ones(1, dtype=FP64) for name in FACTORS}
    assert ops.pack(torch.empty(0), []) == 0
    assert ops.unpack(torch.empty(0), [], lrs=[lr], **factors) == 0
    assert lr == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_pack_counts_what_is_not_finite(bad, dtype):
    pieces = pieces_of(3000, 7, dtype=dtype)
    for at in (0, 5, 2999):
        pieces[0][at] = bad
    pieces[1][6] = bad
    wire = torch.empty(3007, dtype=FP64 if dtype == FP64 else torch.float32)
    assert ops.pack(wire, pieces) == 4
    assert ops.pack(wire, pieces, scale=0.0) == 4  # scaling a replica away does not make it finite


def test_pack_counts_what_overflows_the_wire():
    wire = torch.empty(2, dtype=torch.bfloat16)
    assert ops.pack(wire, [torch.tensor([1.0, 3.4e38])]) == 1
    assert ops.pack(wire, [torch.tensor([1.0, 3.0e38])], scale=2.0) == 1


def test_an_anchored_bf16_wire_loses_only_what_replicas_moved():
    anchor = torch.randn(10_000)
    moved = 1e-3 * torch.randn(10_000)
    total = torch.zeros(10_000, dtype=torch.bfloat16)
    wire = torch.empty(10_000, dtype=torch.bfloat16)
    replicas = [anchor + moved, anchor - 0.5 * moved]
    for replica in replicas:
        ops.pack(wire, [replica], anchor=anchor)
        total += wire
    mean = anchor + 0.25 * moved
    anchored, plain = replicas[0].clone(), replicas[0].clone()
    ops.unpack(total, [anchored], divisor=2, anchor=anchor.clone())
    ops.unpack((sum(replicas)).bfloat16(), [plain], divisor=2)
    assert (anchored - mean).abs().max() < 2**-7 * moved.abs().max()
    assert (plain - mean).abs().max() > moved.abs().max()


def test_a_mean_is_one_rounding_of_the_sum():
    sums = torch.arange(1.0, 5000.0)
    for count in (3, 7, 8):
        (piece,) = pieces_of(sums.numel())
        ops.unpack(sums, [piece], divisor=count)
        assert torch.equal(piece, sums / torch.tensor(float(count)))


def test_replicas_that_agree_keep_their_bits():
    pieces = pieces_of(1000, 24, seed=3)
    before = [piece.clone() for piece in pieces]
    wire = torch.empty(1024)
    ops.pack(wire, pieces)
    assert ops.unpack(wire * 4, pieces, divisor=4) == 0
    assert all(map(torch.equal, pieces, before))


def test_a_distance_over_millions_of_elements_is_exact_enough():
    """A single float accumulator stops growing at 2^24 ones; here every partial sum is a double."""
    n = 2**24 + 2**20 + 5
    assert ops.unpack(torch.ones(n), [torch.zeros(n)]) == n
    x = torch.full((n,), 0.1)
    assert ops.unpack(torch.zeros(n), [x]).item() == pytest.approx(n * float(torch.tensor(0.1)) ** 2, rel=1e-12)


def test_a_slow_average_starts_at_the_mean_and_stays_at_it():
    wire = torch.randn(100)
    slow = torch.full((100,), float("nan"))
    ops.unpack(wire, pieces_of(100), slow=slow, slow_decay=0)
    assert torch.equal(slow, wire)
    ops.unpack(wire, pieces_of(100), slow=slow, slow_decay=0.8)
    assert torch.equal(slow, wire)


# ---------------------------------------------------------------------------------------------------- the errors

x, y, both = torch.ones(4), torch.ones(4), torch.ones(8)
ERRORS = {
    "int pieces": (
        TypeError,
        r"pieces\[1\] has dtype torch.int64.*torch.float32 or ",
        (both, [x, torch.ones(4).long()]),
    ),
    "int wire": (TypeError, r"wire has dtype torch.int64", (torch.ones(4).long(), [x])),
    "half wire": (TypeError, r"wire has dtype torch.float16", (torch.ones(4).half(), [x])),
    "fp64 piece": (TypeError, r"pieces\[0\] has dtype torch.float64.*wire of torch.float32", (y, [x.double()])),
    "fp32 piece": (TypeError, r"pieces\[0\] has dtype torch.float32.*Must be torch.float64", (y.double(), [x])),
    "complex": (TypeError, r"pieces\[0\] has dtype torch.complex64", (y, [torch.ones(4, dtype=torch.complex64)])),
    "another device": (ValueError, r"pieces\[1\] is on meta", (both, [x, torch.zeros(4, device="meta")])),
    "holes": (ValueError, r"pieces\[0\] has strides \(2,\) for shape \(4,\)", (y, [torch.zeros(8)[::2]])),
    "transposed": (ValueError, r"pieces\[0\] has strides \(1, 2\)", (y, [torch.zeros(2, 2).t()])),
    "expanded": (ValueError, r"pieces\[0\] has strides \(0,\)", (y, [torch.zeros(1).expand(4)])),
    "wire too long": (ValueError, r"wire has 8 elements and the pieces together have 4", (both, [x])),
    "wire too short": (ValueError, r"wire has 4 elements and the pieces together have 8", (x, [both])),
    "wire of two dimensions": (ValueError, r"wire has shape \(2, 2\)", (torch.zeros(2, 2), [x])),
    "wire with holes": (ValueError, r"wire has strides", (torch.zeros(8)[::2], [x])),
    "a piece twice": (ValueError, r"pieces\[0\] and pieces\[2\] share memory", (torch.zeros(12), [x, y, x])),
    "overlapping pieces": (
        ValueError,
        r"pieces\[1\] and pieces\[0\] share memory",
        (torch.ones(8), [both[3:7], both[:4]]),
    ),
    "piece in the wire": (ValueError, r"wire and pieces\[0\] share memory", (both[:4], [both[3:7]])),
    "one inside the other": (ValueError, r"share memory", (torch.zeros(10), [both, both[2:4]])),
}
MORE_ERRORS = {
    "anchor's dtype": (TypeError, "anchor has dtype torch.bfloat16", {"anchor": torch.zeros(4).bfloat16()}),
    "anchor's shape": (ValueError, r"anchor has shape \(3,\). Must be the wire's", {"anchor": torch.zeros(3)}),
    "anchor is a piece": (ValueError, r"pieces\[0\] and anchor share memory|anchor and pieces", {"anchor": x}),
    "slow's shape": (ValueError, r"slow has shape \(2, 2\)", {"slow": torch.zeros(2, 2)}),
    "slow is the anchor": (ValueError, "anchor and slow share memory", {"anchor": both[:4], "slow": both[2:6]}),
    "slow_decay": (ValueError, "slow_decay=1.0. Must be within", {"slow_decay": 1.0}),
    "lr's dtype": (TypeError, r"lrs\[0\] has dtype torch.float16", {"lrs": [torch.ones(()).half()]}),
    "lr's shape": (ValueError, r"lrs\[0\] has shape \(2,\)", {"lrs": [torch.ones(2)]}),
    "lr's device": (ValueError, r"lrs\[0\] is on meta", {"lrs": [torch.ones((), device="meta")]}),
    "no factors": (ValueError, "schedule is None", {"lrs": [torch.ones(())]}),
    "no gain": (ValueError, "gain is None", {"lrs": [torch.ones(())], "schedule": torch.ones(1, dtype=FP64)}),
    "fp32 factors": (
        TypeError,
        "schedule has dtype torch.float32",
        {"lrs": [torch.ones(())], "schedule": torch.ones(1)},
    ),
    "too many factors": (ValueError, r"gain has shape \(2,\). Must be \(0,\)", {"gain": torch.ones(2, dtype=FP64)}),
    "an lr twice": (
        ValueError,
        r"lrs\[0\] and lrs\[1\] share memory",
        {"lrs": [both[0], both[0]], **{name: torch.ones(2, dtype=FP64) for name in FACTORS}},
    ),
    "an lr is a factor": (
        ValueError,
        r"share memory",
        {"lrs": [(one := torch.ones(1, dtype=FP64))[0]], **dict.fromkeys(FACTORS, one)},
    ),
}


OPS = {"pack": (ops.pack, (1.0, None, math.inf)), "unpack": (ops.unpack, (1.0, None, None, 0.8, [], None, None, None))}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("error", "message", "arguments"), ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_with_pieces_is_named_and_nothing_written(name, error, message, arguments):
    op, rest = OPS[name]
    tensors = [tensor for tensor in (arguments[0], *arguments[1]) if tensor.device.type == "cpu"]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=message) as caught:
        op(*arguments)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises((RuntimeError, TypeError, ValueError)):  # the kernel itself refuses, too
        getattr(torch.ops.hdet, name)(*arguments, *rest)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize(("error", "message", "arguments"), MORE_ERRORS.values(), ids=MORE_ERRORS)
def test_what_is_wrong_with_the_rest_is_named(error, message, arguments):
    with pytest.raises(error, match=message):
        ops.unpack(y, [x], **arguments)
    if arguments.keys() == {"anchor"}:
        with pytest.raises(error, match=message):
            ops.pack(y, [x], **arguments)


def test_factors_may_share_memory():
    ones, lr = torch.ones(1, dtype=FP64), torch.zeros(())
    ops.unpack(y, [x], lrs=[lr], schedule=ones, gain=ones, multiplier=ones)
    assert lr == 1


# --------------------------------------------------------------------------------- autograd, torch.library, compile


def test_version_counters_are_bumped_by_one_call():
    wire, pieces, divisor, anchor, slow, _, lrs, *factors = everything()
    written = [*pieces, anchor, slow, *lrs]
    before = [tensor._version for tensor in (wire, *written)]
    ops.pack(wire, pieces, anchor=anchor)
    assert wire._version > before[0]
    assert [tensor._version for tensor in written] == before[1:]
    packed = wire._version
    ops.unpack(wire, pieces, divisor=divisor, anchor=anchor, slow=slow, lrs=lrs, **named(factors))
    assert wire._version == packed
    assert all(tensor._version > version for tensor, version in zip(written, before[1:], strict=True))


def test_autograd_notices_that_a_parameter_was_averaged_before_backward():
    parameter = torch.nn.Parameter(torch.ones(4))
    loss = parameter.square().sum()
    ops.unpack(torch.zeros(4), [parameter.detach().view(-1)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_are_written_without_a_graph():
    parameter = torch.nn.Parameter(torch.ones(4))
    wire = torch.empty(4)
    assert not ops.pack(wire, [parameter]).requires_grad
    assert not ops.unpack(wire * 3, [parameter]).requires_grad
    assert not wire.requires_grad
    assert parameter.is_leaf
    assert parameter.tolist() == [3.0] * 4


def test_inference_tensors():
    with torch.inference_mode():
        piece, wire = torch.ones(4), torch.empty(4)
        assert ops.pack(wire, [piece]) == 0
        assert ops.unpack(wire, [piece], divisor=2) == 1
    assert piece.tolist() == [0.5] * 4


def test_opcheck():
    wire, pieces, _, anchor, *_ = arguments = everything()
    torch.library.opcheck(torch.ops.hdet.pack.default, (wire, pieces, 2.0, anchor, math.inf))
    torch.library.opcheck(torch.ops.hdet.pack.default, (wire.bfloat16(), pieces, 1.0, None, 1.0))
    torch.library.opcheck(torch.ops.hdet.unpack.default, arguments)
    torch.library.opcheck(torch.ops.hdet.unpack.default, (wire, pieces, 1.0, None, None, 0.8, [], None, None, None))
    torch.library.opcheck(torch.ops.hdet.scale_rates.default, ([torch.zeros(())], [0.1], [2.0], [1.1]))
    doubles = [piece.double() for piece in pieces]
    torch.library.opcheck(torch.ops.hdet.pack.default, (wire.double(), doubles, 1.0, anchor.double(), math.inf))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    def converge(wire, pieces, anchor, slow, lrs, factors):
        nonfinite = ops.pack(wire, pieces, anchor=anchor)
        total = wire * 3
        squared_distance = ops.unpack(total, pieces, divisor=3, anchor=anchor, slow=slow, lrs=lrs, **named(factors))
        ops.scale_rates(lrs[:1], [0.5], [1.5], [0.25])
        return nonfinite + 1, squared_distance.sqrt(), pieces[0] * 2

    runs = []
    for function in (converge, torch.compile(converge, fullgraph=True, backend=backend)):
        wire, pieces, _, anchor, slow, _, lrs, *factors = everything()
        with torch.no_grad():
            for _ in range(2):  # the second call must see what the first has written
                pieces[1].add_(1)
                results = function(wire, pieces, anchor, slow, lrs, factors)
        assert pieces[0]._version > 0
        runs.append([*results, wire, *pieces, anchor, slow, *lrs])
    assert all(map(torch.equal, *runs))


def test_compile_says_what_is_wrong():
    function = torch.compile(lambda wire, pieces: ops.pack(wire, pieces), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="wire has 8 elements and the pieces together have 4"):
        function(both, [x])


# --------------------------------------------------------------------------------------------------- the backend


def test_backend_says_what_runs():
    backend = ops.backend()
    assert backend.cpu in ("native", "reference")
    native = Path(_native.__file__).with_name("_native_cpu.so")
    assert (backend.cpu == "native") == (native.exists() and os.environ.get("HDET_NATIVE", "1") != "0")
    assert str(backend).startswith(f"hdet ops: cpu {backend.cpu}, cuda ")
    assert backend.note in str(backend)
    assert backend.cpu == "native" or backend.note


@pytest.mark.skipif(ops.backend().cpu != "native", reason="looks at the native library")
@pytest.mark.parametrize("schema", _schema.SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_every_op_has_a_native_kernel(schema):
    """One that is missing from csrc/ops.cpp, or older than its schema, would run as plain torch and pass every test."""
    name = f"hdet::{schema.partition('(')[0]}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@pytest.mark.skipif(_native._version(torch.__version__) < _native.FIRST_TORCH, reason="this torch loads none")
def test_a_library_that_does_not_load_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "_native_cpu.so").write_text("compiled on another planet")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.delenv("HDET_NATIVE", raising=False)
    backend = _native.load()
    assert backend.cpu == "reference"
    assert "_native_cpu.so does not load" in backend.note


@pytest.mark.skipif(ops.backend().cpu != "native", reason="this is what the run without a native library tests")
def test_all_of_this_holds_without_the_native_library():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "not inductor"]
    done = subprocess.run(command, env={**os.environ, "HDET_NATIVE": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_reference_constants_are_the_kernels():
    header = (Path(__file__).parents[2] / "csrc" / "arithmetic.h").read_text()
    assert f"constexpr int kBlock = {_reference.BLOCK};" in header
    assert f"constexpr int kLanes = {_reference.LANES};" in header
    assert math.log2(_reference.BLOCK).is_integer()
