"""Training runs in real processes, whose every bit is pinned; golden_launch.py starts them.

Each case returns the three parts of :mod:`golden_machine` for its rank. Only the public surface of hdet is used here.
"""

import copy
import dataclasses
import json
import math
import os
import traceback
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_machine import HERE, digest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet

STATES = HERE / "states"
WRITES_STATES = os.environ.get("HDET_REGENERATE") == "states"
CASES: dict[str, dict] = {"four": {}, "two": {}, "one": {}, "saving": {}, "resumed": {}, "resumed_two": {}}
SAVED_AT = 11
"""Step of the saved runs: not at a round's end."""


def case(part, name=None):
    """Adds a function of (rank, out) to a part; each part runs in processes of its own."""

    def add(function):
        CASES[part][name or function.__name__] = function
        return function

    return add


# ------------------------------------------------------------------------------------------------------- what trains


class Net(nn.Module):
    """Small matmuls and elementwise ops. 5 and 3 rows are uneven shards over two ranks, and one leaves one empty."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 5, bias=False)  # before a norm a bias has no gradient but rounding errors
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.2)
        self.two = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.two(self.drop(F.softsign(self.norm(self.one(x))))) * self.scale


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    model.drop.p = 0.0
    return model


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Softsign(), nn.Linear(8, 3))


def ddp(model):
    return DDP(model, forward_sync_buffers=False)


def batch(rank, step):
    """Uniform numbers only, which every machine draws alike."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.rand(8, 6, generator=generator) * 2 - 1
    noise = torch.rand(8, 3, generator=generator) - 0.5
    return x, x[:, :3] * x[:, 3:] + x[:, :3] + 0.4 * noise


def loss_of(model, data):
    x, y = data
    return F.mse_loss(model(x), y)


def stream(rank, first=5000):
    """A data loader without end."""
    while True:
        yield batch(rank, first)
        first += 1


def sgd(model, lr=0.05, **more):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **more)


def adamw(model, lr=0.01, **more):
    return torch.optim.AdamW(model.parameters(), lr=lr, **{"weight_decay": 0.1} | more)


class Run(NamedTuple):
    """What trains together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    reports: list
    smoothing: Any = None
    """A scalar hyperparameter."""

    @property
    def ensemble(self):
        return (
            self.scheduler if isinstance(self.scheduler, hdet.Ensemble) else getattr(self.scheduler, "ensemble", None)
        )


def one_cycle(model, optimizer, max_lr, steps, **settings):
    reports: list = []
    scheduler = hdet.OneCycleLR(
        optimizer, max_lr, total_steps=steps, model=model, monitor=reports.append, **{"spread": 0.3} | settings
    )
    return Run(model, optimizer, scheduler, reports)


def ensemble(model, optimizer, schedule=None, **settings):
    reports: list = []
    scheduler = hdet.Ensemble(
        optimizer, schedule, model=model, monitor=reports.append, **{"spread": 0.3, "converge_every": 4} | settings
    )
    return Run(model, optimizer, scheduler, reports)


def train(run, rank, steps, first=0, blow=(), virtual=1):
    """Steps ``first`` to ``steps``, into the run's losses and learning rates, step by step."""
    losses, rates = [], []
    for step in range(first, steps):
        torch.manual_seed(7919 * step + rank)  # of dropout
        rates.append([float(lr) for lr in run.scheduler.get_last_lr()])
        run.optimizer.zero_grad()
        if virtual > 1:
            parts = []
            for data in run.scheduler.each([batch(virtual * rank + k, step) for k in range(virtual)]):
                loss = loss_of(run.model, data)
                (loss / virtual).backward()
                parts.append(loss.detach())
            told: Any = parts
            losses.append([float(part) for part in parts])
        else:
            told = loss_of(run.model, batch(rank, step))
            if run.smoothing is not None:
                told = told + float(run.smoothing) * run.model(batch(rank, step)[0]).square().mean()
            told.backward()
            losses.append(float(told.detach()))
        run.optimizer.step()
        if step in blow:
            told = 1e6 if rank == 0 else told
        run.scheduler.step(told, **({} if run.ensemble is None else {"batch": batch(rank, step)}))
    return losses, rates


# ------------------------------------------------------------------------------------------------- what it comes to


def plain_report(report):
    """All of a report but for the time that it took, whose it is, and what explains the rest of it."""
    left_out = ("converge_ms", "movement", "writer", "cause", "judgements", "peak_lr")
    found = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name not in left_out}
    return found | {"hyperparameters": [dataclasses.asdict(h) for h in report.hyperparameters]}


def whole(model):
    """Parameters and buffers, as this rank holds them."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return [*model.parameters(), *model.buffers()]


def norm(tensors):
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return math.sqrt(math.fsum(float(t.detach().double().square().sum()) for t in local if t.is_floating_point()))


def outcome(run, losses, rates, *, moves=True):
    """The parts of a run that has ended. ``moves``: whether rates follow the losses, and are not plain arithmetic."""
    apart = digest(whole(run.model))
    last = run.scheduler.converge()
    gains = [list(report.next_gain) for report in run.reports]
    state = run.scheduler.state_dict()
    found = run.ensemble.found_schedule()
    exact = {
        "apart": apart,
        "model": digest(whole(run.model)),
        "optimizer": digest(run.optimizer.state_dict()),
        "scheduler": digest(state),
        "losses": digest(losses),
        "reports": digest([plain_report(report) for report in run.reports]),
        "found": digest([found.lr(step) for step in range(0, run.ensemble.steps, 3)]),
    }
    plain = {
        "steps": run.ensemble.steps,
        "round": run.ensemble.round,
        "converged": last is not None,
        "keys": sorted(state.get("hdet", state)),
        "events": [[r.step, r.complete, r.rolled_back, list(r.excluded)] for r in run.reports],
        "bytes": sum(r.converge_bytes for r in run.reports),
        "writer": run.reports[-1].writer,
    }
    summary = {
        "norm": norm(whole(run.model)),
        "loss": [x if isinstance(x, float) else sum(x) / len(x) for x in (losses[0], losses[-1])],
        "gains": gains[-6:],
        "centres": list(run.ensemble.centres.values()),
        "distance": [report.distance[0] for report in run.reports[-3:]],
    }
    exact["rates"] = digest(rates)
    (summary if moves else plain)["rates"] = rates[-4:]
    return {"exact": exact, "plain": plain, "summary": summary}


def add(found, name, parts):
    """Put the parts of a run among those of others in the same case."""
    for part, values in parts.items():
        found.setdefault(part, {}).update({f"{name}, {key}": value for key, value in values.items()})


# ------------------------------------------------------------------------------------------------- in four processes


def probing(rank, **settings):
    probe = hdet.Probe(loss_fn=loss_of, batches=stream(rank))
    return {"auto_lr": True, "probe": probe, "controller": hdet.controller.Posterior(), "converge_every": 2} | settings


@case("four")
def shared_probe(rank, out):
    model = ddp(net())
    run = one_cycle(model, sgd(model), 0.002, 40, **probing(rank))
    return outcome(run, *train(run, rank, 25))


@case("four")
def shared_probe_own_batches(rank, out):
    """The probe takes the batches that step() is given, and keeps its averages in bf16."""
    model = ddp(plain())
    probe = hdet.Probe(loss_fn=loss_of, dtype=torch.bfloat16, power=0.5)
    run = one_cycle(
        model, adamw(model), 0.01, 90, auto_lr=True, probe=probe, converge_every=1, cycle_momentum=False, seed=3
    )
    return outcome(run, *train(run, rank, 46))


@case("four")
def shared_published(rank, out):
    """Without a probe; buckets of a few elements."""
    model = ddp(net())
    controller = hdet.controller.Published(warmup_rounds=1, meta_lr=2.0)
    run = one_cycle(
        model, adamw(model, betas=(0.8, 0.9)), 0.02, 40, auto_lr=True, controller=controller, converge_every=3,
        averaging=hdet.Averaging(bucket_mib=1e-4),
    )  # fmt: skip
    return outcome(run, *train(run, rank, 26))


@case("four")
def shared_rollback(rank, out):
    """Rounds that blow up, one of them at a rate far too high."""
    model = ddp(net())
    run = one_cycle(model, sgd(model), 4.0, 50, **probing(rank))
    first = train(run, rank, 18)
    second = train(run, rank, 26, first=18, blow=(20, 21))
    return outcome(run, first[0] + second[0], first[1] + second[1])


@case("four")
def shared_not_finite(rank, out):
    """A replica that is left out of an average and healed from the others."""
    model = ddp(plain())
    optimizer = sgd(model)
    run = one_cycle(model, optimizer, 0.05, 30, converge_every=5)
    first = train(run, rank, 13)
    if rank == 2:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    run.scheduler.converge()
    second = train(run, rank, 20, first=13)
    return outcome(run, first[0] + second[0], first[1] + second[1], moves=False)


@case("four")
def local_outer(rank, out):
    model = ddp(net())
    cosine = hdet.schedules.cosine(total_steps=40, warmup_steps=4)
    run = ensemble(
        model, adamw(model), cosine, gradients="local", outer=hdet.Outer(momentum=0.6, lr=0.8),
        averaging=hdet.Averaging(optimizer_state="average"),
        auto_lr=True, total_steps=40,
    )  # fmt: skip
    return outcome(run, *train(run, rank, 26))


@case("four")
def local_states(rank, out):
    """What else a converge may do with the optimizer's state."""
    found = {}
    for policy in ("keep", "reset", "auto"):
        model = ddp(plain())
        run = ensemble(
            model, sgd(model, weight_decay=0.01), gradients="local", averaging=hdet.Averaging(optimizer_state=policy)
        )
        add(found, policy, outcome(run, *train(run, rank, 14), moves=False))
    return found


@case("four")
def overlapped(rank, out):
    model = ddp(net())
    run = one_cycle(
        model,
        adamw(model),
        0.02,
        40,
        converge_every=5,
        averaging=hdet.Averaging(overlap_steps=2),
        auto_lr=True,
        controller=hdet.controller.Published(),
    )
    return outcome(run, *train(run, rank, 26))


@case("four")
def overlapped_local(rank, out):
    model = ddp(plain())
    run = ensemble(model, sgd(model), gradients="local", averaging=hdet.Averaging(overlap_steps=3), converge_every=4)
    return outcome(run, *train(run, rank, 23), moves=False)


@case("four")
def bf16_wire(rank, out):
    model = ddp(net())
    run = one_cycle(model, sgd(model), 0.05, 40, converge_every=4, averaging=hdet.Averaging(wire_dtype="bfloat16"))
    return outcome(run, *train(run, rank, 26), moves=False)


@case("four")
def bf16_wire_probe(rank, out):
    model = ddp(plain())
    run = one_cycle(model, adamw(model), 0.002, 40, averaging=hdet.Averaging(wire_dtype="bfloat16"), **probing(rank))
    return outcome(run, *train(run, rank, 25))


def exploring(rank, model, **settings):
    """A run that explores weight decay, dropout and a number that the loss reads."""
    smoothing = hdet.scalar("smoothing", 0.05, spread=0.04, bounds=(0, 0.5), neutral=0.0)
    hyperparameters = [
        hdet.param_group("weight_decay", spread=0.5),
        hdet.module_attribute(model, nn.Dropout, "p", spread=0.1),
        smoothing,
    ]
    probe = hdet.Probe(loss_fn=loss_of, batches=stream(rank, 9000), held_out=True)
    run = ensemble(
        model, adamw(model, lr=0.02), hdet.schedules.linear(total_steps=60), gradients="local", auto_lr=True,
        probe=probe, hyperparameters=hyperparameters, total_steps=60, converge_every=2,
        exploration=hdet.Exploration(controller=hdet.controller.OneSlope(step=0.5, threshold=0.2)), **settings,
    )  # fmt: skip
    return run._replace(smoothing=smoothing)


@case("four")
def hyperparameters(rank, out):
    model = ddp(net())
    model.module.drop.p = 0.2
    run = exploring(rank, model)
    return outcome(run, *train(run, rank, 27))


@case("four")
def hyperparameters_only(rank, out):
    """Under one learning rate, with shared gradients, momentum in complement space and a centre that stays."""
    model = ddp(plain())
    explored = [hdet.param_group("momentum", spread=0.4), hdet.param_group("weight_decay", spread=0.5, move=False)]
    run = ensemble(
        model, sgd(model, weight_decay=0.01), spread=0.0, hyperparameters=explored,
        probe=hdet.Probe(loss_fn=loss_of, batches=stream(rank)), averaging=hdet.Averaging(optimizer_state="average"),
        exploration=hdet.Exploration(design="independent"),
    )  # fmt: skip
    return outcome(run, *train(run, rank, 24), moves=False)


def two_groups(model, **settings):
    parts = model.module if isinstance(model, DDP) else model
    return torch.optim.SGD(
        [{"params": parts[0].parameters(), "name": "first"}, {"params": parts[2].parameters(), "lr": 0.02}],
        lr=0.01,
        momentum=0.9,
        **settings,
    )


@case("four")
def per_group(rank, out):
    model = ddp(plain())
    run = one_cycle(model, two_groups(model), [0.002, 0.004], 40, per_group=True, **probing(rank))
    return outcome(run, *train(run, rank, 27))


@case("four")
def per_group_independent(rank, out):
    model = ddp(plain())
    run = one_cycle(
        model, two_groups(model), [0.02, 0.04], 40, per_group=True, seed=7, converge_every=3,
        exploration=hdet.Exploration(design="independent"), auto_lr=True,
    )  # fmt: skip
    return outcome(run, *train(run, rank, 26))


@case("four")
def grouped(rank, out):
    """Two replicas of two ranks each, under DDP."""
    model = ddp(plain())
    run = one_cycle(model, sgd(model), 0.01, 40, gradients="grouped", replicas=2, **probing(rank))
    return outcome(run, *train(run, rank, 27))


@case("four")
def sharded(rank, out):
    """FSDP2: two replicas of two shards each."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for gradients in ("shared", "local"):
        model = net()
        for child in (model.one, model.norm, model.two, model):
            fully_shard(child, mesh=mesh)
        settings = probing(rank, gradients=gradients, replicas=mesh["replicate"])
        run = one_cycle(model, adamw(model), 0.001, 20, cycle_momentum=False, **settings)
        add(found, gradients, outcome(run, *train(run, rank, 11)))
    return found


@case("four")
def found_max_lr(rank, out):
    """max_lr="auto"."""
    model = ddp(plain())
    run = one_cycle(model, sgd(model), "auto", 40, **probing(rank))
    return outcome(run, *train(run, rank, 7))


@case("four")
def plateau(rank, out):
    model = ddp(plain())
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    run = ensemble(model, optimizer, schedule, converge_every=2)
    return outcome(run, *train(run, rank, 22))


@case("four")
def epochs(rank, out):
    """A schedule that counts epochs, Ensemble's own converge in between, and a prior that another run starts from."""
    model = ddp(plain())
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    settings = {"schedule_every": 5, "auto_lr": True, "converge_every": 4, "total_steps": 30}
    run = ensemble(model, optimizer, schedule, **settings)
    first = train(run, rank, 9)
    run.scheduler.converge()
    second = train(run, rank, 27, first=9)
    result = outcome(run, first[0] + second[0], first[1] + second[1])
    file = out / "prior.yaml"
    run.ensemble.save_prior(file)
    dist.barrier()
    model = ddp(plain(1))
    again = ensemble(model, sgd(model), hdet.schedules.constant(), prior=file, **settings)
    result["exact"] |= {"prior": digest(file.read_text())}
    result["exact"] |= {f"again, {key}": v for key, v in outcome(again, *train(again, rank, 10))["exact"].items()}
    return result


@case("four")
def no_hdet(rank, out):
    """Without the keyword-only arguments it is torch's OneCycleLR."""
    model = ddp(plain())
    optimizer = sgd(model)
    scheduler = hdet.OneCycleLR(optimizer, 0.05, total_steps=20)
    run = Run(model, optimizer, scheduler, [])
    losses, rates = train(run, rank, 15)
    exact = {"model": digest(whole(model)), "scheduler": digest(scheduler.state_dict()), "losses": digest(losses)}
    return {"exact": exact, "plain": {"rates": [row[0] for row in rates]}, "summary": {"norm": norm(whole(model))}}


# --------------------------------------------------------------------------------------- in two processes, and in one


@case("two", "virtual")
@case("one", "virtual_alone")
def virtual_probe(rank, out):
    """Two virtual replicas in each process."""
    model = ddp(plain())
    run = one_cycle(model, adamw(model), 0.002, 40, virtual_replicas=2, cycle_momentum=False, **probing(rank))
    return outcome(run, *train(run, rank, 27, virtual=2))


@case("two")
def virtual_published(rank, out):
    model = ddp(net())
    run = one_cycle(model, sgd(model), 0.03, 40, virtual_replicas=3, auto_lr=True, converge_every=3)
    return outcome(run, *train(run, rank, 26, virtual=3))


@case("two")
def two_local(rank, out):
    model = ddp(net())
    run = ensemble(model, adamw(model), gradients="local", converge_every=3)
    return outcome(run, *train(run, rank, 20), moves=False)


# ------------------------------------------------------------------------------------------------------- saved states


def build_probe(rank, *, steps=40, seed=0):
    model = ddp(net(seed))
    return one_cycle(model, adamw(model), 0.002, steps, cycle_momentum=False, **probing(rank))


def build_per_group(rank, *, steps=40, seed=0):
    model = ddp(plain(seed))
    return one_cycle(model, two_groups(model), [0.002, 0.004], steps, per_group=True, **probing(rank))


def build_hyperparameters(rank, *, steps=60, seed=0):
    model = ddp(net(seed))
    model.module.drop.p = 0.2
    return exploring(rank, model)


def build_outer(rank, *, steps=40, seed=0):
    model = ddp(net(seed))
    cosine = hdet.schedules.cosine(total_steps=steps)
    return ensemble(
        model, adamw(model), cosine, gradients="local", outer=hdet.Outer(momentum=0.6, lr=0.8),
        averaging=hdet.Averaging(optimizer_state="average"),
        auto_lr=True, total_steps=steps,
    )  # fmt: skip


BUILDS = {
    "one_cycle_probe": build_probe,
    "one_cycle_per_group": build_per_group,
    "ensemble_hyperparameters": build_hyperparameters,
    "ensemble_outer": build_outer,
}


def saved(run):
    """What a program saves."""
    run.scheduler.converge()
    return {
        "model": copy.deepcopy(run.model.state_dict()),
        "optimizer": copy.deepcopy(run.optimizer.state_dict()),
        "scheduler": copy.deepcopy(run.scheduler.state_dict()),
    }


def loaded(file, run):
    """A newly built run, with the state in a file."""
    state = torch.load(file, weights_only=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    return run


def save_case(name):
    """A run that saves after some steps, and goes on."""

    def save(rank, out):
        run = BUILDS[name](rank)
        first = train(run, rank, SAVED_AT)
        state = saved(run)
        if rank == 0:
            torch.save(state, out / f"{name}.pt")
            if WRITES_STATES:
                STATES.mkdir(exist_ok=True)
                torch.save(state, STATES / f"{name}.pt")
        second = train(run, rank, 22, first=SAVED_AT)
        result = outcome(run, first[0] + second[0], first[1] + second[1])
        result["exact"]["saved"] = digest(state)
        return result

    return save


def resume_case(name, *, folder=None, **changes):
    """A new process that goes on from a state in a file."""

    def resume(rank, out):
        run = loaded((folder or out) / f"{name}.pt", BUILDS[name](rank, seed=1, **changes))
        at = digest(run.scheduler.state_dict())
        result = outcome(run, *train(run, rank, 22, first=SAVED_AT))
        result["exact"]["loaded"] = at
        return result

    return resume


for _name in BUILDS:
    case("saving", f"saved {_name}")(save_case(_name))
    case("resumed", f"resumed {_name}")(resume_case(_name))
    case("resumed", f"old state {_name}")(resume_case(_name, folder=STATES))
    case("resumed_two", f"resumed with two {_name}")(resume_case(_name))
for _name in ("one_cycle_probe", "ensemble_outer"):
    case("resumed", f"resumed longer {_name}")(resume_case(_name, steps=70))
case("resumed", "old state longer one_cycle_per_group")(resume_case("one_cycle_per_group", folder=STATES, steps=70))


JOBS = [f"{n}:golden_cases:{part}" for n, part in zip((4, 2, 1, 4, 4, 2), CASES, strict=True)]
NAMES = [name for part in CASES.values() for name in part]


def main(out, part):
    """Run the cases of a part in this process, and write what each came to."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_all_gather_base.*", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, function in CASES[part].items():
        try:
            result = function(rank, out)
        except BaseException:
            traceback.print_exc()
            print(f"in the case {name}", flush=True)
            os._exit(1)  # the others are in a collective, and are killed
        (out / f"{name}.{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()
