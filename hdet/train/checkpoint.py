"""Checkpoints: one file with the whole state of a run, replaced at once or not at all, and checked before use."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet import files
from hdet.train.config import ConfigError

VERSION = 1
"""Of the file's layout."""
# Settings that may change between a checkpoint and the run that goes on from it.
_FREE = {
    "train": {
        "device",
        "compile",
        "eval_every",
        "eval_batches",
        "log_every",
        "log_dir",
        "save_every",
        "stop_at",
        "stop_within",
        "resume",
        "total_steps",
    },
    "hdet": {"averaging.bucket_mib", "averaging.wire_dtype", "rollback"},
    "task": {"path", "val_path"},
}
_NEEDED = ("step", "config", "max_lr", "model", "optimizer", "scheduler")
_DEEP = 100
_DIGITS = 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``. A crash at any moment leaves the old file or the new one.

    Raises:
        ConfigError: naming the file, if it cannot be written: a full disk, a directory without permission, a link or a
            FIFO in its place. The old file is still there.
    """

    def write(file: IO[bytes]) -> None:
        digested = _Digested(file)
        torch.save({"version": VERSION, **state}, digested)  # type: ignore[arg-type]
        # The archive's last two bytes are the length of the comment that follows.
        file.seek(-2, os.SEEK_END)
        file.write(_DIGITS.to_bytes(2, "little") + digested.digest.hexdigest().encode())

    try:
        files.write_at_once(path, write, beside=f"{path.name}.tmp")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"Cannot write {path}: {_reason(error)}") from error


class _Digested:
    """A file, and the digest of what is written into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def load(path: Path, config: dict[str, dict[str, Any]], needed: tuple[str, ...] = _NEEDED) -> dict[str, Any]:
    """Read a checkpoint of a run under the same configuration. Executes no code from the file, and makes no objects
    from it but plain values and tensors.

    Args:
        path: the file.
        config: the settings of this run, by section and name.
        needed: what the file must hold.

    Raises:
        ConfigError: naming the file and what is wrong with it: damaged, not a checkpoint of this program, incomplete;
            or naming the setting, if it was written under another one that matters.
    """
    try:
        with files.open_to_read(path) as file:
            _verify(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is no checkpoint that can be read: {_first_line(error)}") from error
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} is no checkpoint that can be read: {_reason(error)}") from error
    _check_content(path, state, needed)
    total_steps = config.get("train", {}).get("total_steps")
    if total_steps is not None and state["step"] > total_steps:
        raise ConfigError(
            f"{path} was written after step {state['step']}, and train.total_steps={total_steps}. Pass at least as "
            "many."
        )
    for section, settings in config.items():
        saved = _flat(state["config"].get(section, {}))
        for name, value in _flat(settings).items():
            before = saved.get(name)
            if not _same(value, before) and name not in _FREE.get(section, ()):
                raise ConfigError(
                    f"{path} was written under {section}.{name}={before}, and this run has {value}. Resume under the "
                    "same setting, or start a new run in another train.log_dir."
                )
    return state


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in groups, such as ``averaging``, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def verify(path: Path) -> None:
    """Raise :class:`ConfigError` if a file that torch.save wrote is damaged. Reads all of it."""
    try:
        with files.open_to_read(path) as file:
            _verify(file)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ConfigError(f"{path} is no checkpoint that can be read: {_reason(error)}") from error


def check_fits(path: Path, state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Raise :class:`ConfigError` unless the tensors of a checkpoint are those of this model and optimizer, by name,
    shape and dtype."""
    ours = model.state_dict()
    theirs = state["model"]
    for name in (*ours, *theirs):
        if name not in theirs or name not in ours:
            raise ConfigError(f"{path}: the model's {name!r} is {'missing' if name in ours else 'unknown'}.")
        mine, saved = ours[name], theirs[name]
        if not isinstance(saved, Tensor) or mine.shape != saved.shape or mine.dtype != saved.dtype:
            raise ConfigError(
                f"{path}: the model's {name!r} is {_describe(saved)}, and this run's {_describe(mine)}. The file is of "
                "another model."
            )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _check_optimizer(path, state["optimizer"], parameters, len(optimizer.param_groups))


def _check_optimizer(path: Path, state: Any, parameters: list[Tensor], groups: int) -> None:
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict)):
        raise ConfigError(f"{path}: the optimizer's state is incomplete.")
    saved: Any = state.get("param_groups")
    known = isinstance(saved, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved)
    if not known or len(saved) != groups or sum(len(group["params"]) for group in saved) != len(parameters):
        raise ConfigError(f"{path}: the optimizer's parameter groups are not those of this run.")
    indices = [index for group in saved for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        of_one = state["state"].get(index, {})
        if not isinstance(of_one, dict):
            raise ConfigError(f"{path}: the optimizer's state of parameter {index} is no mapping.")
        for name, value in of_one.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ConfigError(
                    f"{path}: the optimizer's {name!r} of parameter {index} is {_describe(value)}, and the parameter "
                    f"{_describe(parameter)}."
                )
    if state["state"] and set(state["state"]) != set(indices):
        raise ConfigError(f"{path}: the optimizer's state is not that of all parameters of this run.")


def _verify(file: BinaryIO) -> None:
    """Raise ``ValueError`` or ``BadZipFile`` unless an archive is what was written: by the digest of the whole file,
    which :func:`save` puts into the archive's comment, and by the checksum of every part, which others write too.

    torch's loader does not compare the checksums, so that a flipped bit would be a wrong number.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("the file is empty.")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is cut short, or was not written by torch.save.")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("its archive names a part twice.")
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in archive.infolist()):
            raise ValueError("its archive is compressed, which torch.save does not do.")
        if not any(name.endswith("/data.pkl") for name in names):
            raise ValueError("its archive was not written by torch.save.")
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("it is a TorchScript program.")
        digest = archive.comment
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"it is damaged: the checksum of {damaged!r} is wrong. Use an older checkpoint.")
    if digest and digest != _digest_of(file, size - len(digest)):
        raise ValueError("it is damaged: the file's digest is wrong. Use an older checkpoint.")


def _digest_of(file: BinaryIO, length: int) -> bytes:
    """Of the first ``length`` bytes, as they were before there was a comment."""
    found = hashlib.sha256()
    file.seek(0)
    left = length - 2
    while left > 0 and (part := file.read(min(left, 2**20))):
        found.update(part)
        left -= len(part)
    found.update(b"\0\0")
    return found.hexdigest().encode()


def _check_content(path: Path, state: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(state, dict):
        raise ConfigError(f"{path} is no checkpoint of this program: it holds a {type(state).__name__}.")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ConfigError(
            f"{path} is no whole checkpoint of this program: it lacks {', '.join(missing)}. It was written by an older "
            "version, or by another program. Start a new run in another train.log_dir."
        )
    version = state.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise ConfigError(f"{path} has the layout {version!r}, and this version of hdet reads {VERSION}.")
    step = state.get("step", 0)
    if type(step) is not int or step < 0:
        raise ConfigError(f"{path}: Invalid step={step!r}. Must be a whole number >= 0.")
    config = state.get("config", {})
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise ConfigError(f"{path}: the configuration is not made of sections.")
    max_lr = state.get("max_lr", 1.0)
    if max_lr != "auto" and not (isinstance(max_lr, (int, float)) and 0 < max_lr < math.inf):
        raise ConfigError(f"{path}: Invalid max_lr={max_lr!r}. Must be finite and > 0.")
    for name, value in _leaves(state):
        if not isinstance(value, (Tensor, str, int, float, bool, type(None))) or type(value) is nn.Parameter:
            raise ConfigError(f"{path}: {name} is a {type(value).__name__}. Must be a plain value or a tensor.")
    told = list(_scheduler_steps(state.get("scheduler")))
    if "scheduler" in needed and not told:
        raise ConfigError(f"{path}: the scheduler's state is incomplete: it tells of no step.")
    for steps, name in told:
        if steps != step:
            raise ConfigError(
                f"{path}: the scheduler's {name} is {steps!r}, and the model's step is {step}. They are not of one "
                "moment: use another checkpoint."
            )


def _scheduler_steps(state: Any) -> Iterator[tuple[Any, str]]:
    """The steps that a scheduler's state tells of, with their names."""
    if isinstance(state, (list, tuple)):  # one for each shard
        for shard in state:
            yield from _scheduler_steps(shard)
    elif isinstance(state, dict):
        for name in ("last_epoch", "steps"):
            if name in state:
                yield state[name], name
        for inner in ("hdet", "schedule"):
            yield from _scheduler_steps(state.get(inner))


def _leaves(value: Any, name: str = "state", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _DEEP:
        raise ConfigError(f"{name[:60]}... is nested too deeply for a checkpoint.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, tuple)):
                yield f"a key of {name}", key
            yield from _leaves(item, f"{name}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]", depth + 1)
    else:
        yield name, value


def _same(a: Any, b: Any) -> bool:
    """Whether a saved setting is a run's; tuples may have become lists."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _reason(error: BaseException) -> str:
    cause = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}."
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n")[0].split())[:300]
    return f"{type(error).__name__}: {text}" if not isinstance(error, ValueError) else text
