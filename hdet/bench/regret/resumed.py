"""``python -m hdet.bench.regret.resumed``: a run that is stopped half-way and goes on with twice its length.

With the library itself, in one process with virtual replicas, from the tuned max_lr: the schedule and the ensemble are
saved, built anew with another ``total_steps``, and loaded. Shown is the final loss over that of torch's OneCycleLR,
which is stopped and goes on likewise; and the same of runs that have the second length from the start.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.optim.lr_scheduler import OneCycleLR

import hdet
from hdet.bench.regret import peers
from hdet.bench.regret.data import Batch
from hdet.bench.regret.summary import excess, mean_and_error
from hdet.bench.regret.workload import Workload
from hdet.bench.regret.workloads import WORKLOADS, unavailable
from hdet.lr_scheduler import recompute
from hdet.monitor.tables import markdown

_REPLICAS, _SPREAD, _ROUNDS = 4, 0.11, 100
_DEFAULT = ("films", "home_runs", "nitrogen", "deaths", "word_pairs")
"""Their loss is a mean over examples, so that parts of a batch can be taken one by one."""


def train(workload: Workload, seed: int, *, ours: bool, stop: int = 0) -> float:
    """The validation loss after ``workload.steps`` steps; with ``stop``, of a run that was to have ``2 stop`` steps and
    was stopped then."""
    model = peers.build(workload, seed)
    optimizer = peers.optimizer_of(workload, model, workload.tuned)

    def schedule(steps: int) -> OneCycleLR:
        if not ours:
            return OneCycleLR(optimizer, workload.tuned, steps, cycle_momentum=False)
        return hdet.OneCycleLR(
            optimizer,
            workload.tuned,
            steps,
            cycle_momentum=False,
            model=model,
            spread=_SPREAD,
            virtual_replicas=_REPLICAS,
            converge_every=max(1, steps // _ROUNDS),
            auto_lr=True,
            probe=hdet.Probe(loss_fn=lambda model, batch: workload.loss(model(batch.inputs), batch.targets)),
        )

    scheduler, generator = schedule(2 * stop or workload.steps), peers.batches(seed)
    for step in range(workload.steps):
        if step == stop > 0:
            scheduler = _go_on(scheduler, schedule, workload.steps)
        batch = workload.draw(workload.batch_size, generator)
        if isinstance(scheduler, hdet.OneCycleLR):
            optimizer.zero_grad()
            losses = []
            for part in scheduler.each(_parts(batch)):
                loss = workload.loss(model(part.inputs), part.targets)
                (loss / _REPLICAS).backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step(losses, batch=batch)
        else:
            peers.backward(workload, model, batch)
            optimizer.step()
            if step + 1 < workload.steps:
                scheduler.step()
    if isinstance(scheduler, hdet.OneCycleLR):
        scheduler.close()
    return peers.evaluate(workload, model, workload.validation())


def _go_on(scheduler: OneCycleLR, schedule: Callable[[int], OneCycleLR], steps: int) -> OneCycleLR:
    """A scheduler of another length, at the same step."""
    if not isinstance(scheduler, hdet.OneCycleLR):
        other = schedule(steps)
        recompute(other, scheduler.last_epoch)
        return other
    scheduler.converge()
    saved = copy.deepcopy((scheduler.optimizer.state_dict(), scheduler.state_dict()))
    scheduler.close()
    other = schedule(steps)
    other.optimizer.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    return other


def _parts(batch: Batch) -> list[Batch]:
    pairs = zip(batch.inputs.chunk(_REPLICAS), batch.targets.chunk(_REPLICAS), strict=True)
    return [Batch(inputs, targets) for inputs, targets in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs and print the table; returns the exit status."""
    options = _parser().parse_args(argv)
    if reason := unavailable(options.workloads):
        print(reason, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    rows, means = [], []
    for name in options.workloads:
        own = WORKLOADS[name]
        long = replace(own, steps=2 * own.steps)
        over: list[tuple[float, float]] = []
        for seed in range(options.seeds):
            pairs = [
                (train(long, seed, ours=True, stop=stop), train(long, seed, ours=False, stop=stop))
                for stop in (own.steps // 2, 0)
            ]
            over.append((excess(*pairs[0]), excess(*pairs[1])))
        resumed, straight = zip(*over, strict=True)
        rows.append((name, mean_and_error(resumed), mean_and_error(straight)))
        means.append((statistics.fmean(resumed), statistics.fmean(straight)))
    print("Over OneCycle in percent, mean over seeds ± standard error; last, over workloads.\n")
    last = [mean_and_error(column) for column in zip(*means, strict=True)]
    print(markdown([("", "stopped and gone on", "of that length from the start"), *rows, ("all", *last)], padded=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.regret.resumed", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(_DEFAULT), metavar="NAME", help="by name")
    add("--seeds", type=int, default=4, metavar="N", help="how many; default: 4")
    return parser


if __name__ == "__main__":
    sys.exit(main())
