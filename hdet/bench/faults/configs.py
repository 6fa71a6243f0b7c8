"""Generated configurations, good and bad, in files and on the command line: each starts, or is refused by name.

Asked for: exit status 0, or 2 with one message that names a setting that was given, or the file; no traceback; nothing
executed or imported.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from hdet.bench.faults.sections import Outcome, cases
from hdet.train import __main__ as program
from hdet.train.annotations import settings
from hdet.train.config import Config
from hdet.train.trainer import Trainer

FULL = 500
_TRAINED = 20
"""Of so many cases one is trained for a step; the others end before it."""
_SMALL = {
    "task": {"name": "digits"},
    "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "channels": 1},
    "train": {"total_steps": 2, "batch_size": 2, "eval_every": 0, "eval_batches": 1},
}
_NUMBERS = [0, 1, 2, 3, -1, 0.5, 0.1, 1e-3, 0.999, 1.0, 1.5, 1e300, -1e300, 10**30, 2**63, 1e-320]
_STRANGE: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "auto",
    "cpu",
    "1",
    "nan",
    [],
    [1, 2],
    [0.9, 0.99],
    [[]],
    {},
    {"a": 1},
]
_STRANGE += [{"": 0}, {"a": {"b": [None]}}, "\x00", "é" * 300, "../../..", "/dev/null", "/dev/stdin", float("nan")]
_STRANGE += [float("inf"), -float("inf"), "!!python/name:os.system", "${oc.env:HOME}", "hdet.Probe", "os.system"]
_GOOD: dict[str, list[Any]] = {
    "task.name": ["char_lm", "digits"],
    "optimizer.name": ["adamw", "sgd"],
    "schedule.name": ["one_cycle", "cosine", "linear", "nothing"],
    "hdet.gradients": ["shared", "local", "grouped"],
    "hdet.rollback": [True, False, "cpu"],
    "hdet.probe": [True, False, "held_out"],
    "hdet.hyperparameters": [{"weight_decay": 0.5}, {"momentum": 0.1}, {"nothing": 1}, {"dropout": -1}],
    "schedule.options": [{"warmup_steps": 1}, {"warmup_steps": "x"}, {"warmup_steps": [1]}, {"total_steps": -1}],
}
_LEFT_OUT = {"optimizer.max_lr": ["auto"], "train.strategy": ["deepspeed"], "train.compile": ["True"]}
"""What would only take long."""
_TOGETHER = ("task.name", "model.n_head", "model.n_embd", "train.total_steps", "train.batch_size", "train.eval_batches")
"""What a good configuration leaves as it is in the small one."""


def run(share: float, seed: int) -> Outcome:
    """Try the section."""
    chance = random.Random(f"configs {seed}")
    outcome = Outcome()
    names = [name for name, _ in settings(Config) if name != "train.log_dir"]
    with tempfile.TemporaryDirectory() as directory, _canary(Path(directory)) as touched:
        os.mkfifo(f"{directory}/fifo")
        for number in range(cases(FULL, share)):
            arguments, known = _generate(chance, names, Path(directory), number)
            status, told = _start(arguments, trains=number % _TRAINED == 0)
            outcome.tried += 1
            wrong = _judge(status, told, known)
            if status != 0 and not known:
                wrong = "a good configuration does not start"
            if touched():
                wrong = "something was executed or imported"
            if wrong:
                outcome.failures.append(f"{wrong}: status {status}, {arguments}\n{told[-1500:]}")
            elif status == 2:
                outcome.refused["a setting or file that is named"] += 1
    return outcome


def _judge(status: object, told: str, known: list[str]) -> str:
    """What is wrong with an outcome; empty if nothing."""
    if "Traceback" in told:
        return "traceback"
    if status == 0:
        return ""
    if status != 2:
        return "neither a start nor a refusal"
    if told.count("error: ") < 1:
        return "no message"
    return "" if any(name in told for name in known) else f"none of {known} is named"


def _generate(chance: random.Random, names: list[str], directory: Path, number: int) -> tuple[list[str], list[str]]:
    """A command line, and what a refusal may name; nothing, if it must start."""
    base = directory / "base.yaml"
    base.write_text(yaml.safe_dump(_SMALL))
    arguments = [f"--config={base}"]
    kind = chance.choice(["file", "file", "line", "line", "text", "path", "class", "good", "good", "good"])
    file = directory / f"case{number}.yaml"
    if kind == "good":
        chosen = chance.sample([name for name in names if name not in _TOGETHER], 5)
        arguments += [f"--{name}={_as_text(_near(chance, name))}" for name in chosen]
        return [*arguments, f"--train.log_dir={directory}/run{number}"], []
    known = [file.name]
    if kind == "text":
        file.write_bytes(_damaged(chance))
        arguments.append(f"--config={file}")
    elif kind == "path":
        places = ["fifo", "", "missing.yaml", "base.yaml/x", "\0"]
        place = directory / chance.choice(places)
        arguments.append(f"--{chance.choice(['config', 'task.path', 'task.val_path'])}={place}")
        arguments += ["--task.name=text"] * chance.randrange(2)
        known += ["config", "task.path", "task.val_path"]
    else:
        tree: dict[str, Any] = {}
        for name in chance.sample(names, chance.randint(1, 3)):
            value = _class(chance, directory) if kind == "class" else _value(chance, name)
            if chance.random() < 0.05:
                name += chance.choice(["z", ".x", ".class_path"])
            known += [name, name.rpartition(".")[2], name.rpartition(".")[0]]
            if kind == "line" or (kind == "class" and chance.random() < 0.5):
                arguments.append(f"--{name}={_as_text(value)}")
            else:
                _put(tree, name.split("."), value)
        if tree:
            file.write_text(yaml.safe_dump(tree, allow_unicode=True))
            arguments.append(f"--config={file}")
    return [*arguments, f"--train.log_dir={directory}/run{number}"], [name for name in known if name]


def _value(chance: random.Random, name: str) -> Any:
    good = _GOOD.get(name)
    pool = chance.choice([good, good, _NUMBERS, _STRANGE] if good else [_NUMBERS, _NUMBERS, _STRANGE])
    value = chance.choice(pool or _NUMBERS)
    return 1 if str(value) in _LEFT_OUT.get(name, ()) else value


def _default(name: str) -> Any:
    value: Any = Config()
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _near(chance: random.Random, name: str) -> Any:
    """A default, or what is as good. What controllers are made of keeps its default: only one of them may change."""
    value = _default(name)
    if isinstance(value, float) and 0 < value < 1 and name.count(".") == 1:
        return chance.choice([value, 0.9 * value])
    return list(value) if isinstance(value, tuple) else value


def _class(chance: random.Random, directory: Path) -> Any:
    """What asks for something to be imported or made."""
    name = chance.choice(["hdet_canary.Touch", "hdet_canary.touch", "os.system", "hdet_canary"])
    inner: Any = {"class_path": name, "init_args": {"command": f"touch {directory}/touched"}}
    return chance.choice(
        [inner, {"x": inner}, {"weight_decay": inner}, [inner], name, {"x": [inner]}, {"class_path": 3}]
    )


def _damaged(chance: random.Random) -> bytes:
    """A file that is no configuration."""
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    texts = [
        "schedule: &a {options: *a}",
        "schedule: {options: &a {x: *a}}",
        bomb,
        "train: {total_steps: 2",
        "- 1\n- 2",
    ]
    texts += ["train: !!python/object/apply:os.system ['touch touched']", "? {a: b}\n: 1", "3", "train: {<<: 3}"]
    texts += [
        "train: {total_steps: 2, total_steps: 3}",
        "[" * 20_000,
        "a: " + "9" * 10_000,
        "\t",
        "--- 1\n--- 2",
        "%YAML 9",
    ]
    texts += ["train: 3", "hdet: {published: 3}", "trian: {}", "train: {total_stepz: 1}", "schedule: {options: {1: 2}}"]
    chosen = chance.choice([*texts, None])
    if chosen is not None:
        return chosen.encode()
    return bytes(chance.randrange(256) for _ in range(200))


def _as_text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()
    )


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        inner = tree.get(name)
        tree[name] = tree = inner if isinstance(inner, dict) else {}
    tree[path[-1]] = value


def _start(arguments: list[str], *, trains: bool) -> tuple[object, str]:
    """Exit status and output of the training program, in this process."""
    told = io.StringIO()
    instead: Any = contextlib.nullcontext() if trains else mock.patch.object(Trainer, "run", return_value=0)
    with (
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
        mock.patch.object(sys, "argv", ["hdet.train", *arguments]),
        instead,
    ):
        try:
            return program.main(), told.getvalue()
        except BaseException as error:
            return repr(error), told.getvalue()


@contextlib.contextmanager
def _canary(directory: Path) -> Iterator[Callable[[], bool]]:
    """A module that can be imported and leaves a file if it is; whether there is one."""
    touched = directory / "touched"
    code = f"open({str(touched)!r}, 'w').close()\n"
    (directory / "hdet_canary.py").write_text(
        f"{code}def touch(*a, **k):\n    {code}class Touch:\n    __init__ = touch\n"
    )
    sys.path.insert(0, str(directory))
    try:
        yield touched.exists
    finally:
        sys.path.remove(str(directory))
        sys.modules.pop("hdet_canary", None)
