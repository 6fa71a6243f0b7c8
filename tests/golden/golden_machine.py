"""Golden values: what was pinned, on which machine, and how what is found now is compared with it.

A file of golden values has a key of the machine's arithmetic, and of every case three parts:

    exact     SHA-256 hashes; compared where the key is this machine's
    plain     results of pure Python; compared exactly where its mathematical functions are the same
    summary   floats that say what the hashes stand for; compared to a tolerance where the key is another one

On a machine with another key a case that agrees to that is reported as skipped, with the reason.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REGENERATE = bool(os.environ.get("HDET_REGENERATE"))
TOLERANCE = 1e-4


def digest(value):
    """SHA-256 of plain values and tensors, nested in any way. Order in dicts does not count; names of types do not,
    but a list is no tuple and an int no float."""
    found = hashlib.sha256()
    _feed(value, found.update)
    return found.hexdigest()


def _feed(value, update):
    if isinstance(value, torch.Tensor):
        value = value.to_local() if hasattr(value, "to_local") else value
        value = value.detach().cpu().contiguous()
        update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        update(value.view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        update(f"dict {len(value)}:".encode())
        for key in sorted(value, key=repr):
            update(f"{key!r}=".encode())
            _feed(value[key], update)
    elif isinstance(value, (list, tuple)):
        update(f"{'tuple' if isinstance(value, tuple) else 'list'} {len(value)}:".encode())
        for part in value:
            _feed(part, update)
    elif dataclasses.is_dataclass(value):
        _feed({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, update)
    elif value is None or isinstance(value, (bool, int, float, str)):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"no golden value can be made of a {type(value).__name__}")


@functools.cache
def fingerprint():
    """The key of this machine's arithmetic. The training run uses torch only, with the ops that the cases use."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "training": _training(),
        "python": _python(),
    }


def _python():
    """Of the mathematical functions that Python takes from the platform."""
    points = [0.01 * k for k in range(1, 400)]
    functions = (math.exp, math.expm1, math.log, math.cos, math.sqrt, lambda x: x**0.37, lambda x: 0.9**x)
    return digest([function(x) for function in functions for x in points])


def _training():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return digest([_train_small(), _train_classifier(), _other_ops()])
    finally:
        torch.set_num_threads(threads)


def _train_small():
    """The model of the processes: matmuls, softsign, batch norm, dropout, AdamW."""
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Softsign(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(6):
        loss = F.mse_loss(model(torch.rand(8, 6) * 2 - 1), torch.rand(8, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def _train_classifier():
    """The models of the simulation and of the training program: convolutions, embeddings, larger matmuls, SGD."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.Tanh(),
    )
    head = nn.Linear(64, 10)
    table = nn.Embedding(50, 64)
    parameters = [*model.parameters(), *head.parameters(), *table.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(6):
        x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
        loss = F.cross_entropy(head(model(x) + table(torch.randint(50, (64,)))), y)
        loss = loss + F.binary_cross_entropy_with_logits(head(table.weight).mean(1), torch.rand(50))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return [p.detach() for p in parameters]


def _other_ops():
    """What an average is made of."""
    x, y = torch.randn(1000), torch.rand(1000)
    return [torch.lerp(x, y, 0.3), (x - y).square().sum(), torch.linalg.vector_norm(x), (x * y).bfloat16(), x.mean()]


def merged(by_rank):
    """One result for all ranks: a value that they share as it is, others under ``by rank``."""
    return {
        part: {
            name: value
            if all(same(other[part][name], value) for other in by_rank)
            else {"by rank": [other[part][name] for other in by_rank]}
            for name, value in by_rank[0][part].items()
        }
        for part in ("exact", "plain", "summary")
    }


def same(one, other):
    """Equality, in which NaN is NaN."""
    return json.dumps(one) == json.dumps(other)


def close(one, other, tolerance):
    """Whether two nests of plain values agree: floats to a relative tolerance, all else exactly."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return same(one, other) or math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-9)
    return one == other


class Golden:
    """The golden values of one file.

    Args:
        name: of the file, in this folder.
    """

    def __init__(self, name):
        self._path = HERE / f"{name}.json"

    def check(self, name, exact=None, plain=None, summary=None, tolerance=TOLERANCE):
        """Compare a case with what was pinned; with ``HDET_REGENERATE=1`` pin it.

        ``tolerance`` is for a machine with another key. A run that amplifies rounding errors needs a wide one.
        """
        found = {"exact": exact or {}, "plain": plain or {}, "summary": summary or {}}
        found = json.loads(json.dumps(found))
        if REGENERATE:
            self._pin(name, found)
        kept = json.loads(self._path.read_text())
        pinned, here = kept["machine"], fingerprint()
        case = kept["cases"][name]
        math_is_same = pinned["python"] == here["python"]
        _expect(name, "plain", found, case, 0.0 if math_is_same else 1e-9)
        if pinned == here:
            _expect(name, "summary", found, case, 0.0)
            _expect(name, "exact", found, case, 0.0)
            return
        assert found["exact"].keys() == case["exact"].keys()
        _expect(name, "summary", found, case, tolerance)
        if case["exact"]:
            other = ", ".join(key for key in here if pinned.get(key) != here[key])
            pytest.skip(f"agrees to {tolerance:g}; the hashes are of a machine with another {other}")

    def _pin(self, name, found):
        kept = json.loads(self._path.read_text()) if self._path.exists() else {"machine": {}, "cases": {}}
        cases = kept["cases"] if kept["machine"] == fingerprint() else {}
        cases = dict(sorted((cases | {name: found}).items()))
        lines = [f' "machine": {json.dumps(fingerprint())},\n "cases": {{']
        for i, (case, parts) in enumerate(cases.items()):
            lines.append(f"  {json.dumps(case)}: {{")
            for j, (part, values) in enumerate(parts.items()):
                rows = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
                body = "{\n" + ",\n".join(rows) + "\n   }" if rows else "{}"
                lines.append(f"   {json.dumps(part)}: {body}{',' if j < 2 else ''}")
            lines.append("  }," if i < len(cases) - 1 else "  }")
        self._path.write_text("{\n" + "\n".join(lines) + "\n }\n}\n")


def _expect(name, part, found, case, tolerance):
    wrong = {
        key: {"found": found[part].get(key), "pinned": case[part].get(key)}
        for key in found[part].keys() | case[part].keys()
        if not (key in found[part] and key in case[part] and close(found[part][key], case[part][key], tolerance))
    }
    assert not wrong, f"{name}: {part} differs:\n" + "\n".join(f"{key}: {json.dumps(v)}" for key, v in wrong.items())
