"""Malformed calls of the ops: a clean error, or what the reference does, bit for bit. In a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hdet import ops
from hdet.bench.faults.sections import Outcome, cases
from hdet.ops import _reference

FULL = 5000
_FACTORS = ("schedule", "gain", "multiplier")
_CLEAN = (TypeError, ValueError)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OTHER_DTYPES = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)


def run(share: float, seed: int) -> Outcome:
    """Try the share of them; a process that dies is a failure."""
    count = cases(FULL, share)
    command = [sys.executable, "-m", "hdet.bench.faults.ops", str(count), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=False
    )
    outcome = Outcome(count)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        told = {"failures": [f"the process ended with status {done.returncode}: {done.stderr[-500:]}"]}
    outcome.failures = told["failures"]
    outcome.refused = Counter(told.get("refused", {}))
    return outcome


def _tensor(chance: random.Random, numel: int, dtype: torch.dtype) -> Tensor:
    values = torch.tensor([chance.choice((0.0, -1.5, 3.25, 1e30, float("inf"), float("nan"))) for _ in range(numel)])
    return values.to(dtype)


def _good(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A call that is as it should be."""
    wire_dtype = chance.choice((torch.float32, torch.bfloat16, torch.float64))
    kinds = (torch.float64,) if wire_dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)
    sizes = [chance.choice((0, 1, 3, 7, 513)) for _ in range(chance.randint(1, 4))]
    pieces = [_tensor(chance, n, chance.choice(kinds)) for n in sizes]
    total, accumulator = sum(sizes), _reference.accumulator(wire_dtype)
    anchor = _tensor(chance, total, accumulator) if chance.random() < 0.4 else None
    name = chance.choice(("pack", "unpack", "all_finite", "scale_rates"))
    if name == "scale_rates":
        count = chance.randint(1, 3)
        return name, {
            "lrs": _rates(chance, count),
            **{key: [chance.random() for _ in range(count)] for key in _FACTORS},
        }
    if name == "all_finite":
        return name, {"pieces": [_tensor(chance, n, chance.choice(_DTYPES)) for n in sizes]}
    arguments: dict[str, Any] = {"wire": _tensor(chance, total, wire_dtype), "pieces": pieces, "anchor": anchor}
    if name == "pack":
        return name, arguments | {"scale": chance.choice((1.0, 0.5, 3.0))}
    arguments |= {"divisor": chance.choice((1.0, 3.0, 4.0)), "slow_decay": chance.choice((0.0, 0.8))}
    arguments["slow"] = _tensor(chance, total, accumulator) if chance.random() < 0.4 else None
    if chance.random() < 0.4:
        count = chance.randint(1, 3)
        arguments["lrs"] = _rates(chance, count)
        arguments |= {key: torch.rand(count, dtype=torch.float64) for key in _FACTORS}
    return name, arguments


def _rates(chance: random.Random, count: int) -> list[Tensor]:
    return [torch.zeros((), dtype=chance.choice((torch.float32, torch.float64))) for _ in range(count)]


def _spoil_tensor(chance: random.Random, tensor: Tensor, others: list[Tensor]) -> Any:
    """Something else in the place of a tensor."""
    if not _is_plain(tensor):
        return None  # spoiled already; torch itself dies of some that are spoiled twice
    n = tensor.numel()

    def narrowed() -> Tensor:
        return torch.empty(2 * n + 2, dtype=tensor.dtype)[::2][:n]

    ways: list[Callable[[], Any]] = [
        lambda: tensor.to(chance.choice(_OTHER_DTYPES)),
        lambda: tensor.to(chance.choice(_DTYPES)),
        lambda: tensor.to("meta"),
        narrowed,
        lambda: torch.zeros(n + chance.choice((-1, 1, 5)) if n else 2, dtype=tensor.dtype),
        lambda: tensor.new_zeros(1).expand(n),
        lambda: tensor.new_zeros(()),
        lambda: tensor.new_zeros(0),
        lambda: tensor.reshape(1, -1),
        lambda: tensor.reshape(-1, 1).t() if n else tensor.new_zeros(0, 3),
        lambda: nn.Parameter(tensor),
        lambda: chance.choice(others),
        lambda: chance.choice(others)[1:],
        lambda: chance.choice(others).view(torch.uint8) if chance.choice(others).is_contiguous() else None,
        lambda: tensor.to_sparse(),
        lambda: torch._neg_view(tensor),
        lambda: torch.zeros(2, 3, dtype=tensor.dtype).t(),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(max(1, n)), 0.1, 0, torch.quint8),
        lambda: tensor.numpy(),
        lambda: tensor.tolist(),
        lambda: None,
        lambda: 3,
        lambda: "x",
        lambda: _inference(n, tensor.dtype),
        lambda: torch.view_as_real(torch.ones(max(1, n), dtype=torch.complex64))[:, 0],
    ]
    for _ in range(5):
        with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return chance.choice(ways)()
    return None


def _inference(n: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(n, dtype=dtype)


def _spoil(chance: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with one or two things wrong."""
    spoiled = dict(arguments)
    for _ in range(chance.choice((1, 1, 2))):
        others = [t for v in spoiled.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        key = chance.choice(list(spoiled))
        value = spoiled[key]
        if isinstance(value, float):
            spoiled[key] = chance.choice(
                (float("nan"), float("inf"), 0.0, -1.0, 1e308, "1", None, True, 1, torch.tensor(1.0), 10**400)
            )
        elif isinstance(value, list) and value and chance.random() < 0.8:
            index = chance.randrange(len(value))
            spoiled[key] = [
                *value[:index],
                _spoil_tensor(chance, value[index], others or [torch.ones(2)]),
                *value[index + 1 :],
            ]
        elif isinstance(value, list):
            spoiled[key] = chance.choice(
                ([], None, "x", iter(value), tuple(value), value * 2, value[:-1], torch.ones(3), {0: 1})
            )
        elif isinstance(value, Tensor):
            spoiled[key] = _spoil_tensor(chance, value, others)
        else:
            spoiled[key] = chance.choice((3, "x", torch.ones(2), torch.ones(2, dtype=torch.float64), [torch.ones(2)]))
    return spoiled


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not (x.is_nested or x.is_neg() or x.is_quantized)


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in memory of their own; nothing is aliased in a call that succeeds."""
    copy: Callable[[Any], Any] = lambda x: x.detach().clone() if _is_plain(x) else x  # noqa: E731
    return {k: type(v)(map(copy, v)) if isinstance(v, (list, tuple)) else copy(v) for k, v in arguments.items()}


def _by_reference(name: str, arguments: dict[str, Any]) -> Tensor | None:
    given = dict(arguments)
    if name == "all_finite":
        return _reference.all_finite(given["pieces"], math.inf)
    if name == "pack":
        return _reference.pack(given["wire"], given["pieces"], given["scale"], given["anchor"], math.inf)
    if name == "scale_rates":
        _reference.scale_rates(**given)
        return None
    rest = [given.get(key) for key in _FACTORS]
    lrs = given.get("lrs", ())
    return _reference.unpack(
        given["wire"],
        given["pieces"],
        given["divisor"],
        given["anchor"],
        given["slow"],
        given["slow_decay"],
        lrs,
        *rest,
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        a, b = a.resolve_neg(), b.resolve_neg()
        if a.is_meta or b.is_meta:
            return a.is_meta and b.is_meta and a.shape == b.shape and a.dtype == b.dtype
        return (
            a.dtype == b.dtype
            and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            and torch.equal(a.isnan(), b.isnan())
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


def _try(chance: random.Random) -> tuple[str | None, str | None]:
    """One call. What went wrong, and by what it was refused."""
    name, arguments = _good(chance)
    spoiled = _spoil(chance, arguments)
    what = f"{name}({', '.join(f'{k}={_described(v)}' for k, v in spoiled.items())})"
    twin = _copied(spoiled)
    try:
        result = getattr(ops, name)(**spoiled)
    except _CLEAN as error:
        return None, type(error).__name__
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}", None
    try:
        expected = _by_reference(name, twin)
    except Exception as error:
        return f"{what}: accepted, and the reference says {type(error).__name__}: {error}", None
    if not _same(result, expected) or not all(_same(spoiled[key], twin[key]) for key in spoiled):
        return f"{what}: another result than the reference's", None
    return None, None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"{value.dtype} {value.layout} {tuple(value.shape) if not value.is_nested else 'nested'} on {value.device}"
        )
    return f"[{', '.join(map(_described, value))}]" if isinstance(value, (list, tuple)) else repr(value)[:40]


def main(count: int, seed: int) -> None:
    """Make the calls, and print what became of them as JSON."""
    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    torch.manual_seed(seed)
    failures, refused = [], Counter[str]()
    for _ in range(count):
        fault, rule = _try(chance)
        failures += [fault] if fault else []
        refused.update([rule] if rule else [])
    print(json.dumps({"failures": failures, "refused": refused}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
