"""``python -m hdet.bench.regret.real``: the same runs with real processes, beside their simulation.

Each replica is a process of its own with ``DistributedDataParallel``, ``hdet.OneCycleLR`` and a probe, over gloo. It
sees the part of each batch that the simulation gives it. The simulation takes the gradient at the mean of the replicas
and not at their points, unless ``--exact``; two runs that differ by rounding drift apart, as any two trainings do.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hdet
from hdet.bench import processes
from hdet.bench.regret import peers
from hdet.bench.regret.data import Batch
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS, Workload

# Batch norm's statistics stay a replica's own; torch 2.13 has another name for it.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_STATISTICS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def train(workload: Workload, max_lr: float, seed: int, setting: Setting) -> Iterator[Outcome]:
    """One run in a process group; every process must call it. Yields rank 0's outcome."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    model = DistributedDataParallel(peers.build(workload, seed), **_OWN_STATISTICS)
    optimizer = peers.optimizer_of(workload, model.module, max_lr)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return workload.loss(model(batch.inputs), batch.targets)

    def mine(generator: torch.Generator) -> Batch:
        batch = workload.draw(workload.batch_size, generator)
        return Batch(*(tensor.chunk(world)[rank] for tensor in batch))

    def probe_batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed + 300)
        while True:
            yield mine(generator)

    gains: list[float] = []
    scheduler = hdet.OneCycleLR(
        optimizer,
        max_lr,
        total_steps=workload.steps,
        cycle_momentum=False,
        model=model,
        spread=setting.spread,
        converge_every=max(1, workload.steps // setting.rounds),
        auto_lr=True,
        probe=hdet.Probe(loss_fn=loss_fn, batches=probe_batches(), power=setting.power) if setting.probe else None,
        controller=setting.controller,
        monitor=lambda report: gains.append(report.next_gain[0]),
    )
    generator = peers.batches(seed)
    for _ in range(workload.steps):
        optimizer.zero_grad()
        loss = loss_fn(model, mine(generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step(loss)
    scheduler.converge()
    loss_at_end = peers.evaluate(workload, model.module, workload.validation())
    yield Outcome(loss_at_end, math.nan, gains[-1], {"gains": gains})


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print both; returns the exit status."""
    options = _parser().parse_args(argv)
    workload = WORKLOADS[options.workload]
    if options.steps:
        workload = replace(workload, steps=options.steps)
    setting = Setting(replicas=options.replicas, exact=options.exact, probe=options.probe)
    print("| start | real loss | simulated loss | difference | real gain | simulated gain |\n|---|---|---|---|---|---|")
    for start in options.starts:
        arguments = (options.workload, options.steps, start, options.seed, setting)
        (real,) = processes.run(_in_process, options.replicas, arguments, device="cpu", limit=options.limit)
        simulated = simulate(workload, start * workload.tuned, options.seed, setting)
        difference = real.loss / simulated.loss - 1
        print(
            f"| {start:.3g} | {real.loss:.4f} | {simulated.loss:.4f} | {difference:+.2%} | {real.gain:.3g} | "
            f"{simulated.gain:.3g} |",
            flush=True,
        )
    return 0


def _in_process(name: str, steps: int | None, start: float, seed: int, setting: Setting) -> Iterator[Outcome]:
    workload = WORKLOADS[name]
    if steps:
        workload = replace(workload, steps=steps)
    yield from train(workload, start * workload.tuned, seed, setting)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.real", description=__doc__)
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="char_lm")
    add("--starts", nargs="+", type=float, default=[0.01, 1.0, 8.0], help="in units of the tuned max_lr")
    add("--replicas", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="default: the workload's")
    add("--no-probe", dest="probe", action="store_false", help="by how far the weights move alone")
    add("--exact", action="store_true", help="simulate gradients at the replicas' points")
    add("--limit", type=float, default=1800.0, help="seconds until a run's processes are killed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
