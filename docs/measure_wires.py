"""Measures what differences of 8 bits would cost: the table of docs/scaling.md.

Four replicas in one process, each with its own batches and optimizer (local gradients), average every 20 steps. What a
replica sends is its difference from the last mean, plus what rounding has kept from it so far (error feedback)::

    wire_r = Q(theta_r - m + e_r),    e_r <- theta_r - m + e_r - wire_r,    m <- m + mean(wire_r)

``int8`` has a scale for each block of 256: ``Q(x) = s round(x / s)``, ``s = max |x| / 127``.

Usage: python docs/measure_wires.py [WORKLOAD ...]
"""

import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hdet.bench.regret import peers
from hdet.bench.regret.workloads import Workload, workload_of

REPLICAS, EVERY, SEEDS, BLOCK = 4, 20, 5, 256
DEFAULT = ("digits_mlp", "regression", "gru", "recommender")


def int8(x: Tensor) -> Tensor:
    """Rounded to 255 values in each block."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).flatten()[: len(x)]


WIRES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "fp32": (4.0, lambda x: x),
    "bf16": (2.0, lambda x: x.bfloat16().float()),
    "int8": (1 + 4 / BLOCK, int8),
}
"""By name: bytes to an element, and what is sent of a difference."""


def train(workload: Workload, seed: int, send: Callable[[Tensor], Tensor]) -> float:
    """The validation loss of the mean."""
    models = [peers.build(workload, seed) for _ in range(REPLICAS)]
    optimizers = [peers.optimizer_of(workload, model, workload.tuned) for model in models]
    schedules = [peers.schedule_of(workload, o, workload.tuned, workload.steps) for o in optimizers]
    generators = [peers.batches(seed * REPLICAS + r) for r in range(REPLICAS)]
    mean = parameters_to_vector(models[0].parameters()).detach()
    errors = [torch.zeros_like(mean) for _ in models]
    for step in range(1, workload.steps + 1):
        for model, optimizer, schedule, generator in zip(models, optimizers, schedules, generators, strict=True):
            peers.backward(workload, model, workload.draw(workload.batch_size, generator))
            optimizer.step()
            if step < workload.steps:
                schedule.step()
        if step % EVERY and step < workload.steps:
            continue
        wires = []
        for r, model in enumerate(models):
            difference = parameters_to_vector(model.parameters()).detach() - mean + errors[r]
            wires.append(send(difference))
            errors[r] = difference - wires[-1]
        mean = mean + torch.stack(wires).mean(0)
        for model in models:
            vector_to_parameters(mean, model.parameters())
    return peers.evaluate(workload, models[0], workload.validation())


def main(names: list[str]) -> None:
    """Print a line for each workload."""
    torch.set_num_threads(1)
    print("| | " + " | ".join(f"{name}, {size:.3g} bytes" for name, (size, _) in WIRES.items()) + " |")
    print("|---" * (len(WIRES) + 1) + "|")
    for name in names:
        workload = workload_of(name)
        losses = {wire: [train(workload, seed, send) for seed in range(SEEDS)] for wire, (_, send) in WIRES.items()}
        cells = [f"{statistics.fmean(losses['fp32']):.4f}"]
        for wire in list(WIRES)[1:]:
            over = [100 * (a / b - 1) for a, b in zip(losses[wire], losses["fp32"], strict=True)]
            cells.append(f"{statistics.fmean(over):+.2f} ± {statistics.stdev(over) / math.sqrt(SEEDS):.2f}%")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(DEFAULT))
