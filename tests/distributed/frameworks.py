"""What the workers of the frameworks have in common: a net, its data, and plain loops to compare with."""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(rank, number):
    """A micro-batch, by its number in the run."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def loss_of(model, data):
    x, y = data
    return F.cross_entropy(model(x), y)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def are_equal(tensor):
    """Whether it is the same on every rank."""
    return all(torch.equal(tensor, other) for other in gather(tensor))


def probe(rank, precision=None):
    def loss_fn(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(model, data)

    return hdet.Probe(loss_fn=loss_fn, batches=[batch(rank, 900)])  # a resumed run begins with the first again


def one_cycle(optimizer, model, steps, **settings):
    return hdet.OneCycleLR(optimizer, 0.02, total_steps=steps, model=model, **settings)


def plain_loop(
    rank, steps, accumulate=1, converge_at=(), clip=None, precision=None, until=None, numbers=None, make=one_cycle,
    **settings,
):  # fmt: skip
    """A loop under DDP as the README has it: the model at its end, the learning rates, and the reports.

    ``numbers``: of the micro-batches, in order; ``make``: the scheduler.
    """
    numbers = range(steps * accumulate) if numbers is None else numbers
    model = DDP(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reports = []
    scheduler = make(optimizer, model, steps, monitor=reports.append, **settings)
    lrs = []
    for step in range(until or steps):
        lrs.append(scheduler.get_last_lr()[0])
        losses = []
        for k in range(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                losses.append(loss_of(model, batch(rank, numbers[step * accumulate + k])))
            (losses[-1] / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step(sum(x.detach() for x in losses) / accumulate)
        optimizer.zero_grad()
        if step + 1 in converge_at:
            scheduler.converge()
    scheduler.converge()
    return flat(model), lrs, told(reports)


def told(reports):
    """What reports say, to be compared; NaN is equal to itself."""
    return [repr((r.step, r.losses, r.next_gain, tuple(r.probe))) for r in reports]


def error_of(function, *arguments, **keywords):
    """What it raises, in words."""
    try:
        function(*arguments, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def shared_folder():
    """A folder for all ranks."""
    (path, *_) = gather(tempfile.mkdtemp() if dist.get_rank() == 0 else None)
    return Path(path)


def run(functions):
    """All scenarios, each with this rank and a folder for all ranks, in the group that this process belongs to."""
    dist.init_process_group("gloo")
    scenarios.run([in_shared_folder(function) for function in functions], Path(sys.argv[1]))


def in_shared_folder(function):
    """The scenario ``function(rank, folder)``; the folder is removed once all ranks have left it."""

    @functools.wraps(function)
    def scenario(rank, world):
        folder = shared_folder()
        result = function(rank, folder)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
        return result

    return scenario
