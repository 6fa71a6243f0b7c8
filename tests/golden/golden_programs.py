"""Runs of the training program's command line; golden_launch.py starts them, with the imports made once.

``runpy`` does what ``python -m`` does.
"""

import runpy
import sys
from importlib import import_module

import torch
from golden_machine import HERE

VIRTUAL = ["--hdet.probe=true", "--train.accumulate=2", "--hdet.virtual_replicas=true"]
EXPLORING = [
    "--hdet.probe=held_out",
    "--hdet.gradients=local",
    "--hdet.outer.momentum=0.5",
    '--hdet.hyperparameters={"weight_decay": 0.5, "dropout": 0.1, "label_smoothing": 0.05}',
]
# part: processes, directory, arguments
RUNS = {
    "stopped": (1, "virtual", [*VIRTUAL, "--train.total_steps=18", "--train.stop_at=9"]),
    "resumed_longer": (1, "resumed", [*VIRTUAL, "--train.total_steps=24", "--resume"]),
    "two_processes": (2, "two", [*EXPLORING, "--train.total_steps=20"]),
    "fsdp": (2, "fsdp", ["--train.strategy=fsdp", "--train.replicas=1", "--train.total_steps=8"]),
    "baseline": (1, "baseline", ["--hdet.spread=0", "--train.total_steps=8"]),
}
JOBS = [f"{processes}:golden_programs:{part}" for part, (processes, _, _) in RUNS.items()]


def prepare():
    """Import what takes time, and is not hdet's."""
    for name in ("jsonargparse", "sklearn.datasets", "torch.utils.tensorboard", "tqdm", "yaml"):
        import_module(name)


def main(out, part):
    """``python -m hdet.train --config train.yaml ...``"""
    torch.set_num_threads(1)
    _, directory, arguments = RUNS[part]
    if part == "resumed_longer":
        (out / directory).mkdir()
        for file in (out / "virtual").iterdir():
            (out / directory / file.name).write_bytes(file.read_bytes())
    sys.argv = ["train", "--config", str(HERE / "train.yaml"), f"--train.log_dir={out / directory}", *arguments]
    try:
        runpy.run_module("hdet.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
