"""What a run says of itself at its start and at its end."""

from __future__ import annotations

from typing import NamedTuple

import hdet
from hdet import ops
from hdet.replicas.topology import Replicas
from hdet.train.config import Config
from hdet.train.log import RunLog
from hdet.train.optimization import Schedule
from hdet.train.processes import Process


class Finding(NamedTuple):
    """What ``optimizer.max_lr=auto`` has found, and the seconds that it took."""

    found: hdet.LRFinding
    seconds: float


def introduce(
    config: Config,
    parameters: int,
    replicas: Replicas,
    process: Process,
    schedule: Schedule,
    log: RunLog,
) -> None:
    """Task, size, replicas and settings of the run."""
    ensemble = schedule.ensemble
    count = replicas.size if ensemble is None else ensemble.size
    how = "spread 0: the plain schedule"
    if ensemble is not None:
        how = f"spread {config.hdet.spread:.3g}, converging every {ensemble.settings.converge_every} steps"
        how += ", learning rate by the paired probe" if config.hdet.probe and config.hdet.auto_lr else ""
        names = ", ".join(config.hdet.hyperparameters)
        how += f", exploring {names}" if names else ""
        how += f", {config.hdet.gradients} gradients" if config.hdet.gradients != "shared" else ""
    members = f" of {replicas.members} processes each" if replicas.members > 1 else ""
    log.say(
        f"{config.task.name}: {parameters / 1e6:.2f}M parameters, {count} "
        f"replica{'s' * (count > 1)}{members} on {process.device.type}, {how}"
    )
    log.say(str(ops.backend()))
    log.say(f"tensorboard --logdir {config.train.log_dir}")
    if ensemble is not None and ensemble.size == 1:
        ours = config.hdet
        moves = ours.auto_lr and ours.spread and ours.controller == "posterior"
        what = "its learning rate follows how far the weights move" if moves else "this is the plain schedule"
        log.say(f"One replica has nobody to differ from: {what}. Start more with torchrun.")


def tell_finding(finding: Finding, log: RunLog) -> None:
    """What ``find_lr`` has found, with its picture."""
    found = finding.found
    picture = log.picture(found)
    best, lr = min(zip(found.losses, found.lrs, strict=True))
    log.say(
        f"max_lr {found.max_lr:.2e} found by trying {len(found.lrs)} learning rates in "
        f"{finding.seconds:.1f} s (loss {found.start_loss:.3f}, after {found.steps} steps at {lr:.2e} "
        f"{best:.3f}): {picture}"
    )


def summarise(
    config: Config,
    validated: dict[str, float],
    lr: float,
    parameters: int,
    replicas: Replicas,
    schedule: Schedule,
    log: RunLog,
) -> None:
    """``summary.json`` of a run that has taken all its steps, and a line.

    Args:
        lr: the last step's.
    """
    ensemble = schedule.ensemble
    overhead = log.converge_seconds / log.seconds
    gains = schedule.gains
    centres = "" if ensemble is None else "".join(f"{name} {c:.3g}, " for name, c in ensemble.centres.items())
    log.summary(
        {
            **validated,
            "max_lr": config.optimizer.max_lr,
            "final_lr": lr,
            "gain": gains,
            "hyperparameters": {} if ensemble is None else ensemble.centres,
            "converge_overhead": overhead,
            "converge_seconds": log.converge_seconds,
            "wall_seconds": log.seconds,
            "steps": config.train.total_steps,
            "replicas": replicas.size if ensemble is None else ensemble.size,
            "spread": 0.0 if ensemble is None else config.hdet.spread,
            "converge_every": None if ensemble is None else ensemble.settings.converge_every,
            "parameters": parameters,
        }
    )
    log.say(
        f"Done in {log.seconds:.0f} s: validation loss {validated['validation_loss']:.4f}, "
        f"final LR {lr:.2e}, gain {', '.join(f'{name} {gain:.3f}' for name, gain in gains.items())}, {centres}"
        f"converge overhead {overhead:.2%}"
    )
