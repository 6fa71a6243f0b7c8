"""Checkpoints: one file with the whole state of a run, replaced at once or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from hdet.train.config import ConfigError

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
        "resume",
        "total_steps",
    },
    "hdet": {"averaging.bucket_mib", "averaging.wire_dtype", "rollback"},
    "task": {"path", "val_path"},
}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``. A crash at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # else a power failure may undo the rename
    finally:
        os.close(directory)


def load(path: Path, config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Read a checkpoint of a run under the same configuration. Executes no code from the file.

    Raises:
        ConfigError: naming the setting, if it was written under another one that matters.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
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
            if value != before and name not in _FREE.get(section, ()):
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
