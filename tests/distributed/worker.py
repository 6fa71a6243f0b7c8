"""Run in real processes: every function decorated with @scenario, one after the other, in the same process group.

A scenario returns plain values that the tests compare; what it must do is said in the test that reads it.
"""

import contextlib
import copy
import dataclasses
import io
import random
import sys
from pathlib import Path

import numpy as np
import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet
from hdet.bench.regret import peers
from hdet.bench.regret.data import Batch
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS

SCENARIOS = []
OUT = Path(sys.argv[1])


def scenario(function):
    SCENARIOS.append(function)
    return function


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def bits(module):
    flats = [t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in tensors(module) if t.numel()]
    return [flat.view(torch.uint8).numpy().tobytes() for flat in flats]


def tensors(module):
    return [*module.parameters(), *module.buffers()]


class Zoo(nn.Module):
    """One tensor of every kind that a model may hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(37, 19))
        self.tied = self.weight
        self.big = nn.Parameter(torch.randn(300))
        self.fp16 = nn.Parameter(torch.randn(5, 3).half())
        self.bf16 = nn.Parameter(torch.randn(7).bfloat16())
        self.fp64 = nn.Parameter(torch.randn(11, dtype=torch.float64))
        self.complex64 = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(13, 17).t())
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.holes = nn.Parameter(torch.randn(9, 8)[:, ::2])
        self.unused = nn.Parameter(torch.randn(6))
        self.frozen = nn.Parameter(torch.randn(21), requires_grad=False)
        self.frozen_different = nn.Parameter(torch.randn(21), requires_grad=False)
        self.register_buffer("running", torch.randn(12))
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, False]))
        self.register_buffer("expanded", torch.randn(1, 5).expand(4, 5))
        self.register_buffer("hidden", torch.randn(3), persistent=False)


def diverge(zoo, rank):
    """Make the replicas differ everywhere but in what must stay constant."""
    generator = torch.Generator().manual_seed(100 + rank)
    with torch.no_grad():
        for name, tensor in [*zoo.named_parameters(), *zoo.named_buffers()]:
            if name in ("frozen", "mask", "flags") or tensor.numel() == 0:
                continue
            if name == "count":
                tensor.fill_(10 + rank)
            elif name == "expanded":
                tensor[:1].copy_(torch.randn(1, 5, generator=generator))
            else:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(noise.to(tensor.dtype))


@scenario
def converge_mean(rank, world):
    results = {}
    for bucket_mib in (32.0, 1e-3, 4e-6):  # everything in one bucket; split tensors; one element to a bucket
        torch.manual_seed(0)
        zoo = Zoo()
        before = {n: t.detach().clone() for n, t in [*zoo.named_parameters(), *zoo.named_buffers()]}
        pointers = [t.data_ptr() for t in tensors(zoo)]
        optimizer = torch.optim.SGD(zoo.parameters(), lr=0.1, momentum=0.9)
        scheduler = hdet.OneCycleLR(
            optimizer,
            0.1,
            total_steps=10,
            model=zoo,
            spread=0.1,
            converge_every=100,
            averaging=hdet.Averaging(bucket_mib=bucket_mib),
            monitor=lambda report: None,
        )
        diverge(zoo, rank)
        mine = {n: t.detach().clone() for n, t in [*zoo.named_parameters(), *zoo.named_buffers()]}
        versions = [t._version for t in zoo.parameters()]
        optimizer.step()
        scheduler.step(1.0)
        report = scheduler.converge()
        again = scheduler.converge()
        everyone = gather(mine)
        errors, square = {}, 0.0
        for name, tensor in [*zoo.named_parameters(), *zoo.named_buffers()]:
            theirs = torch.stack([e[name].detach() for e in everyone])
            if not (tensor.is_floating_point() or tensor.is_complex()):
                expected = theirs[0] if tensor.dtype == torch.bool else theirs.amax(0)
                errors[name] = float((tensor != expected).sum())
            elif name in ("frozen", "mask"):
                errors[name] = 0.0 if torch.equal(tensor, before[name]) else 1.0
            elif tensor.numel():
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                mean = theirs.to(wide).mean(0)
                away = mine[name].to(wide) - mean
                square += float((away[0] if name == "expanded" else away).abs().square().sum())
                # One rounding of the stored dtype, a few of the fp32 sum.
                sums = 0 if tensor.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
                unit = torch.finfo(tensor.dtype).eps + sums
                scale = theirs.to(wide).abs().amax(0)
                errors[name] = float(((tensor.detach().to(wide) - mean).abs() / scale / unit).max())
        digests = gather(bits(zoo))
        results[bucket_mib] = {
            "errors": errors,
            "equal": all(d == digests[0] for d in digests),
            "again": again,
            "in_place": pointers == [t.data_ptr() for t in tensors(zoo)],
            "versions_bumped": all(
                t._version > v for t, v in zip(zoo.parameters(), versions, strict=True) if t.numel() and t.requires_grad
            ),
            "tied": zoo.tied is zoo.weight,
            "distance": report.distance,
            "expected_distance": square**0.5,
            "bytes": report.converge_bytes,
        }
    return results


def net(seed=0, features=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def generators():
    numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), numpys, torch.get_rng_state().tolist()


@scenario
def learning_rates(rank, world):
    model = DDP(net())
    optimizer = torch.optim.SGD(
        [
            {"params": model.module[0].parameters(), "name": "first"},
            {"params": model.module[2].parameters(), "lr": 0.3},
        ],
        lr=0.1,
        momentum=0.9,
    )
    reports = []
    scheduler = hdet.OneCycleLR(
        optimizer,
        [0.1, 0.3],
        total_steps=40,
        model=model,
        spread=0.25,
        converge_every=5,
        per_group=True,
        exploration=hdet.Exploration(design="independent"),
        seed=7,
        monitor=reports.append,
    )
    twin_optimizer = torch.optim.SGD(
        [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "lr": 0.3}], lr=0.1, momentum=0.9
    )
    twin = torch.optim.lr_scheduler.OneCycleLR(twin_optimizer, [0.1, 0.3], total_steps=40)
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002 the global generator is the point
    torch.manual_seed(rank)
    seen = []
    for step in range(40):
        for _ in range(rank):  # every rank consumes the global generators differently
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        states = generators()
        rates = [group["lr"] for group in optimizer.param_groups]
        seen.append(
            {
                "lr": rates,
                "last": scheduler.get_last_lr(),
                "base": twin.get_last_lr(),
                "multipliers": [scheduler.ensemble.multipliers(g) for g in (0, 1)],
                "momentum": [group["momentum"] for group in optimizer.param_groups],
                "twin_momentum": [group["momentum"] for group in twin_optimizer.param_groups],
            }
        )
        x, y = batch(rank, step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        twin_optimizer.step()
        twin.step()
        seen[-1]["rng_untouched"] = states == generators()
    return {"steps": seen, "reports": reports}


def train(model, optimizer, step_scheduler, rank, steps, snapshots=None):
    for step in range(steps):
        x, y = batch(rank, step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if snapshots is not None:
            snapshots.append(torch.cat([p.detach().double().view(-1) for p in model.parameters()]))
        step_scheduler(loss)
    return torch.cat([p.detach().double().view(-1) for p in model.parameters()])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


@scenario
def line_identity(rank, world):
    """Just before each converge, replica r is at lerp(start, base-rate run, rho_r)."""
    results = {}
    for name, build in OPTIMIZERS.items():
        steps, every = 12, 4
        cycle = name != "sgd"
        plain = DDP(net().double())
        optimizer = build(plain.parameters())
        base = hdet.OneCycleLR(optimizer, 0.05, total_steps=steps, cycle_momentum=cycle)
        start = torch.cat([p.detach().double().view(-1) for p in plain.parameters()])
        spread_model = DDP(net().double())
        spread_optimizer = build(spread_model.parameters())
        scheduler = hdet.OneCycleLR(
            spread_optimizer,
            0.05,
            total_steps=steps,
            cycle_momentum=cycle,
            model=spread_model,
            spread=0.3,
            converge_every=every,
        )
        errors, mean_errors = [], []
        round_start = start
        for step in range(steps):
            x, y = batch(rank, step)
            x = x.double()
            rho = scheduler.ensemble.multipliers()[rank]
            # the gradient every replica applies is shared, so the base run is integrated with the same gradients
            loss = F.cross_entropy(spread_model(x), y)
            spread_optimizer.zero_grad()
            loss.backward()
            optimizer.zero_grad()
            for p, q in zip(plain.parameters(), spread_model.parameters(), strict=True):
                p.grad = q.grad.clone()
            spread_optimizer.step()
            optimizer.step()
            base.step()
            if (step + 1) % every == 0:
                here = torch.cat([p.detach().view(-1) for p in spread_model.parameters()])
                there = torch.cat([p.detach().view(-1) for p in plain.parameters()])
                line = torch.lerp(round_start, there, rho)
                errors.append(float((here - line).abs().max() / (there - round_start).abs().max()))
                round_start = there.clone()
            scheduler.step(loss)
            if (step + 1) % every == 0:
                here = torch.cat([p.detach().view(-1) for p in spread_model.parameters()])
                mean_errors.append(float((here - round_start).abs().max()))
        results[name] = {"line": errors, "mean": mean_errors}
    return results


@torch.no_grad()
def average_in_process(copies):
    for parts in zip(*(m.parameters() for m in copies), strict=True):
        mean = torch.stack([p.double() for p in parts]).mean(0)
        for p in parts:
            p.copy_(mean)


@scenario
def simulation(rank, world):
    """N processes, against N copies of the model in one process fed with the same data."""
    results = {}
    for gradients in ("shared", "local"):
        steps, every = 10, 4
        model = net()
        wrapped = DDP(model) if gradients == "shared" else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = hdet.OneCycleLR(
            optimizer,
            0.02,
            total_steps=steps,
            model=model,
            spread=0.2,
            converge_every=every,
            auto_lr=True,
            controller=hdet.controller.Published(warmup_rounds=0),
            averaging=hdet.Averaging(optimizer_state="keep"),  # as the simulation does
            gradients=gradients,
        )
        real = train(wrapped, optimizer, scheduler.step, rank, steps)
        scheduler.converge()
        real = torch.cat([p.detach().double().view(-1) for p in model.parameters()])

        copies = [net() for _ in range(world)]
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in copies]
        bases = [torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=steps) for o in optimizers]
        control, state = hdet.controller.Published(warmup_rounds=0), hdet.controller.ControllerState()
        sums = [0.0] * world
        gains = []

        for step in range(steps):
            rho = hdet.explore.spread.assignment(world, 0.2, seed=0, round=step // every, hyperparameter="lr/0")
            losses = []
            for r, m in enumerate(copies):
                x, y = batch(r, step)
                m.zero_grad()
                losses.append(F.cross_entropy(m(x), y))
                losses[-1].backward()
                sums[r] += losses[-1].item()
            if gradients == "shared":
                for parts in zip(*(m.parameters() for m in copies), strict=True):
                    mean = torch.stack([p.grad for p in parts]).mean(0)
                    for p in parts:
                        p.grad = mean.clone()
            for r, o in enumerate(optimizers):
                base = o.param_groups[0]["lr"]
                o.param_groups[0]["lr"] = base * (state.gain * rho[r])
                o.step()
                o.param_groups[0]["lr"] = base
            if (step + 1) % every == 0:
                average_in_process(copies)
                seen = hdet.controller.Observation(tuple(s / every for s in sums), rho, bases[0].get_last_lr()[0])
                state, _ = control.update(state, seen)
                gains.append(state.gain)
                sums = [0.0] * world
            for b in bases:
                b.step()
        average_in_process(copies)
        simulated = torch.cat([p.detach().double().view(-1) for p in copies[0].parameters()])
        results[gradients] = {
            "error": float((real - simulated).abs().max()),
            "gain": scheduler.ensemble.gains[0],
            "simulated_gain": gains[-1],
        }
    return results


@scenario
def excluded(rank, world):
    """A replica that holds a NaN is left out and healed; its loss is ignored."""
    reports = []
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(float(rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    scheduler = hdet.OneCycleLR(
        optimizer, 0.1, total_steps=9, model=model, spread=0.1, converge_every=2, auto_lr=True, monitor=reports.append,
        rollback=False,
    )  # fmt: skip
    bad = world - 1
    optimizer.step()
    scheduler.step(float("nan") if rank == bad else 1.0 + rank)
    if rank == bad:
        with torch.no_grad():
            model.weight[1, 2] = float("nan")
    before = gather(model.bias.detach().clone())
    optimizer.step()
    scheduler.step(1.0 + rank)
    result = {
        "excluded": reports[0].excluded,
        "weight": model.weight.detach().clone(),
        "bias_error": float((model.bias.detach() - torch.stack(before[:bad]).mean(0)).abs().max()),
        "losses": reports[0].losses,
        "mean_loss": reports[0].mean_loss,
        "gain": scheduler.ensemble.gains,
        "distance": reports[0].distance,
    }
    with torch.no_grad():
        model.bias.fill_(float("inf"))
    saved = model.bias.detach().clone()
    optimizer.step()
    scheduler.step(1.0)
    try:
        scheduler.converge()
        result["all_bad"] = None
    except hdet.DivergedError as error:
        result["all_bad"] = str(error)
    result["untouched"] = torch.equal(saved, model.bias)
    return result


@scenario
def blow_ups(rank, world):
    """What is not finite on all replicas, in what was finite; and what is infinite by design."""
    nan, inf = float("nan"), float("inf")
    results = {}

    def train(
        case, poison, at, *, steps=12, converges_at=-9, buffers=None, moves=None, kind=torch.optim.AdamW, **settings
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        for name, value in (buffers or {}).items():
            model.register_buffer(name, value.clone())
        optimizer = kind(model.parameters(), 1e-2)
        reports = []
        settings = {"auto_lr": True, "controller": hdet.controller.Published(), "gradients": "local"} | settings
        ensemble = hdet.Ensemble(
            optimizer, model=model, spread=0.2, converge_every=4, total_steps=200, monitor=reports.append, **settings
        )
        start = copy.deepcopy(model.state_dict())
        generator = torch.Generator().manual_seed(rank)
        begun, error = None, None
        try:
            for step in range(steps):
                optimizer.zero_grad()
                model(torch.randn(8, 4, generator=generator)).square().mean().backward()
                for p in model.parameters():
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)
                optimizer.step()
                if step - 1 == converges_at:
                    begun = [float(group["lr"]) for group in optimizer.param_groups]
                with torch.no_grad():
                    if step == at:
                        poison(model, optimizer)
                    if moves is not None:
                        moves(model, step)
                ensemble.step(1.0)
                if step == converges_at:
                    ensemble.converge()
        except hdet.DivergedError as raised:
            error = str(raised)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        finite = all(bool(p.isfinite().all()) for p in model.parameters()) and all(
            bool(v.isfinite().all()) for s in optimizer.state.values() for v in s.values()
        )
        results[case] = {
            "undone": [r.step for r in reports if r.rolled_back],
            "excluded": [r.excluded for r in reports],
            "nonfinite": [r.nonfinite for r in reports],
            "rescaled": [r.rescaled for r in reports],
            "gains": [r.next_gain[0] for r in reports],
            "lr": begun,
            "error": error,
            "finite": finite,
            "equal": len({str(digest) for digest in gather(bits(model))}) == 1,
            "start": all(torch.equal(value, start[name]) for name, value in model.state_dict().items()),
            "buffers": {name: value.double() for name, value in model.named_buffers()},  # float8 cannot be pickled
            "first": next(iter(tensors.values())).detach().clone(),
        }

    def in_state(key):
        def poison(model, optimizer):
            optimizer.state[model[0].weight][key][0, 0] = inf

        return poison

    def in_statistics(model, optimizer):
        model[1].running_mean[0] = inf

    def in_parameters(model, optimizer):
        model[0].bias[1] = nan

    train("state", in_state("exp_avg"), 7)
    train("frozen", in_state("exp_avg_sq"), 7, auto_lr=False)
    train("frozen, kept", in_state("exp_avg_sq"), 13, auto_lr=False, steps=84,
          averaging=hdet.Averaging(optimizer_state="keep"))  # fmt: skip
    train("statistics", in_statistics, 7)
    train("statistics, one", lambda m, o: in_statistics(m, o) if rank == 0 else None, 7)
    train("statistics, not undone", in_statistics, 7, auto_lr=False)
    train("first round", in_parameters, 2, steps=4)
    train("inside", in_parameters, 5, steps=8, converges_at=5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        train(
            f"alike, {dtype}", lambda m, o: m.ema.view(-1)[:1].fill_(nan), 1, auto_lr=False,
            buffers={"ema": torch.ones(2).to(dtype)},
        )  # fmt: skip

    observers = {"low": torch.full((2,), inf), "high": torch.full((2,), -inf), "mask": torch.tensor([0.0, -inf])}

    def observe(model, step):
        if rank == 0 and step >= 5:  # the others see nothing
            model.low[0], model.high[0] = -2.0, 3.0

    train("by design", lambda m, o: None, 0, buffers=observers, moves=observe)

    def lengthen(model, step):
        if step == 6:
            model.mask = torch.full((3, 3), -inf).triu(1)

    train("a longer mask", lambda m, o: None, 0, buffers={"mask": torch.zeros(1, 1)}, moves=lengthen)

    def lengthen_unlike(model, step):
        if step == 5:
            model.mask, model.other = torch.full((3,), -inf if rank == 0 else 1.0), torch.full((2,), float(rank))

    others = {"mask": torch.zeros(1), "other": torch.zeros(1)}
    train("infinite on one", lambda m, o: None, 0, buffers=others, moves=lengthen_unlike)

    def enlarge(model, optimizer):
        model[0].weight.fill_(3e38 if rank == 0 else 2e38)
        optimizer.state[model[0].weight]["exp_avg_sq"].fill_(3e38)

    for name, overlap, wire in (("sum", 0, "float32"), ("late sum", 1, "float32"), ("differences", 0, "bfloat16")):
        train(
            name, enlarge, 7, auto_lr=False, steps=8 + overlap,
            kind=lambda params, lr: torch.optim.Adam(params, lr=0.0),
            averaging=hdet.Averaging(overlap_steps=overlap, wire_dtype=wire),
        )  # fmt: skip

    def stir(model, step):
        for name, value in {"flag": rank == 0, "small": rank + 1.0, "count": rank}.items():
            getattr(model, name).fill_(value)

    stirred = {
        "flag": torch.tensor([True, False]),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
        "count": torch.zeros(2, dtype=torch.uint8),
    }
    train("late dtypes", lambda m, o: None, 0, auto_lr=False, steps=5, buffers=stirred, moves=stir,
          averaging=hdet.Averaging(overlap_steps=1))  # fmt: skip
    return results


@scenario
def agreed_before(rank, world):
    """From the second converge on the first bucket travels with what the replicas tell one another."""
    return {bucket_mib: _agreed_before(rank, world, bucket_mib) for bucket_mib in (32.0, 6e-3)}  # in one bucket; in two


def _agreed_before(rank, world, bucket_mib):
    torch.manual_seed(0)
    model = nn.Module()
    model.weight, model.big = nn.Parameter(torch.zeros(7, 3)), nn.Parameter(torch.zeros(2000))
    model.register_buffer("moving", torch.zeros(5))
    model.register_buffer("constant", torch.randn(6))
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ensemble = hdet.Ensemble(
        optimizer, model=model, spread=0.1, converge_every=1000, averaging=hdet.Averaging(bucket_mib=bucket_mib)
    )
    before, bad = model.constant.clone(), world - 1

    @torch.no_grad()
    def converge(**values):
        optimizer.step()
        ensemble.step(1.0)
        for name, value in {"big": float(rank), "moving": 10.0 + rank, "count": rank, **values}.items():
            getattr(model, name).fill_(value)
        model.weight.copy_(torch.arange(21.0).view(7, 3) + rank)
        try:
            report = ensemble.converge()
        except (hdet.ReplicaMismatchError, hdet.DivergedError) as error:
            return type(error).__name__, model.big[0].item()
        digests = gather(bits(model))
        return {
            "weight": model.weight[1, 2].item() - 5,
            "big": (model.big[0].item(), model.big[-1].item()),
            "moving": model.moving[0].item(),
            "count": model.count.item(),
            "excluded": report.excluded,
            "again": ensemble.converge(),
            "equal": all(d == digests[0] for d in digests) and torch.equal(model.constant, before),
        }

    nan, inf = float("nan"), float("inf")
    result = {
        "first": converge(),
        "second": converge(),
        "third": converge(),
        "bad_parameter": converge(big=nan if rank == bad else float(rank)),
        "bad_buffer": converge(moving=nan if rank == bad else 10.0 + rank),
        "all_bad": converge(big=inf),
        "bad_alike": converge(moving=-inf),
        "after": converge(),
    }
    model.weight.requires_grad_(rank != bad)
    result["layout"] = converge()
    model.weight.requires_grad_(True)
    result["layout_restored"] = converge()
    model.weight.requires_grad_(False)
    result["frozen"] = converge()
    result["frozen_again"] = converge()
    if rank == bad:
        model.moving = model.moving.clone()  # elsewhere, on one rank only
    result["elsewhere"] = converge()
    result["elsewhere_again"] = converge()
    return result


@scenario
def bfloat16_wire(rank, world):
    """Trainable parameters travel as bf16 differences from the last converged mean."""
    results = {}
    cases = {
        "one bucket": {},
        "two buckets": {"mib": 6e-3},
        "probe": {"probe": lambda model, batch: model.weight.square().sum() * batch},
        "outer momentum": {"gradients": "local", "outer": hdet.Outer(momentum=0.5)},
        "rollback": {"blows_up_at": 3},
        "resume": {"resumes_at": 3},
        "bad replica": {"bad_at": 2},
    }
    for case, settings in cases.items():
        settings = dict(settings)
        blows_up, resumes, bad = (settings.pop(key, None) for key in ("blows_up_at", "resumes_at", "bad_at"))
        averaging = hdet.Averaging(wire_dtype="bfloat16", bucket_mib=settings.pop("mib", 64))
        torch.manual_seed(0)
        model = nn.Module()
        model.weight, model.big = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(2000))
        model.fp64, model.bf16 = nn.Parameter(torch.randn(9).double()), nn.Parameter(torch.randn(9).bfloat16())
        model.register_buffer("moving", torch.zeros(5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ensemble = hdet.Ensemble(
            optimizer, model=model, spread=0.1, converge_every=1, total_steps=100,
            auto_lr=case in ("probe", "rollback"), averaging=averaging, seed=1, **settings,
        )  # fmt: skip
        rows = []
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for step in range(6):
                if step == resumes:
                    ensemble.load_state_dict(ensemble.state_dict())
                optimizer.step()
                for p in model.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
                model.moving.fill_(rank)
                if step == bad and rank == world - 1:
                    model.weight[0, 0] = float("nan")
                mine = [p.detach().double() for p in model.parameters()]
                everyone = gather(mine)
                ensemble.step(1e9 if step == blows_up else 1.0, batch=1.0 if case == "probe" else None)
                chosen = everyone[:-1] if step == bad else everyone
                means = [torch.stack(theirs).mean(0) for theirs in zip(*chosen, strict=True)]
                now = [p.detach().double() for p in model.parameters()]
                digests = gather(bits(model))
                rows.append(
                    {
                        "errors": [float((a - b).abs().max()) for a, b in zip(now, means, strict=True)],
                        "equal": all(d == digests[0] for d in digests),
                        "bytes": ensemble.last_report.converge_bytes,
                        "excluded": ensemble.last_report.excluded,
                        "rolled_back": ensemble.last_report.rolled_back,
                        "moving": model.moving[0].item(),
                    }
                )
        results[case] = rows
    return results


@scenario
def overlap(rank, world):
    """theta += mean(snapshot) - snapshot, tau steps late, against the same sum done by hand in float64."""
    reports = []
    every, late, steps = 5, 2, 14
    model = nn.Linear(3, 3, bias=False).double()
    model.register_buffer("count", torch.tensor(0))
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = hdet.OneCycleLR(
        optimizer, 0.1, total_steps=20, cycle_momentum=False, model=model, spread=0.3, converge_every=every,
        averaging=hdet.Averaging(overlap_steps=late), monitor=reports.append, gradients="local",
    )  # fmt: skip
    value, snapshot, path, reported = 1.0, None, [], []
    for step in range(steps):
        gradient = 1.0 + rank + step
        value -= optimizer.param_groups[0]["lr"] * gradient
        model.weight.grad = torch.full_like(model.weight, gradient)
        model.count += 1
        optimizer.step()
        scheduler.step(1.0)
        done = step + 1
        if done % every == 0:
            snapshot = value
        if snapshot is not None and done % every == late and done > every:
            value += sum(gather(snapshot)) / world - snapshot
        path.append((float(model.weight[1, 2]), value))
        reported.append([report.step for report in reports])
    before = gather(value)
    scheduler.converge()
    result = {"path": path, "reported": reported, "reports": reports, "count": int(model.count)}
    result["final"] = (float(model.weight[0, 0]), sum(before) / world)
    result["equal"] = len({str(b) for b in gather(bits(model))}) == 1
    # a forced converge while an average is under way lands it first
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        scheduler.step(1.0)
    scheduler.converge()
    result["equal_in_flight"] = len({str(b) for b in gather(bits(model))}) == 1
    result["reported"].append([report.step for report in reports])
    return result


@scenario
def mismatches(rank, world):
    """Ranks that differ get the same error everywhere, and nobody hangs."""

    def attempt(features=4, lr=0.1, ensemble=False, **settings):
        model = nn.Linear(features, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        settings = {"model": model, "spread": 0.1, "converge_every": 3} | settings
        scheduler = hdet.OneCycleLR(optimizer, lr, total_steps=30, **settings)
        try:
            for _ in range(3):
                optimizer.step()
                scheduler.step(1.0)
            scheduler.converge()
        except hdet.ReplicaMismatchError as error:
            return str(error)
        return None

    odd = rank == world - 1
    return {
        "spread": attempt(spread=0.2 if odd else 0.1),
        "no_spread": attempt(spread=0.0 if odd else 0.1),
        "converge_every": attempt(converge_every=5 if odd else 3),
        "seed": attempt(seed=int(odd)),
        "controller": attempt(auto_lr=True, controller=hdet.controller.Published(momentum=0.5 if odd else 0.8)),
        "max_lr": attempt(lr=0.2 if odd else 0.1),
        "shape": attempt(features=5 if odd else 4),
        "none": attempt(),
    }


@scenario
def bad_input(rank, world):
    """A bad argument raises on the rank that has it, before anything is sent: it can try again, and nobody hangs."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    errors = []
    for bad in ({"spread": -0.1}, {"spread": 1.0}, {"converge_every": 0}, {"total_steps": None}, {"model": None}):
        arguments = {"total_steps": 20, "model": model, "spread": 0.1, "converge_every": 2}
        try:
            hdet.OneCycleLR(optimizer, 0.1, **arguments | (bad if rank == world - 1 else {}))
            errors.append(None)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    scheduler = hdet.OneCycleLR(optimizer, 0.1, **arguments | {"model": model})
    for bad in (3, True, torch.ones(2), torch.tensor(3), "loss"):
        optimizer.step()
        try:
            scheduler.step(bad if rank == world - 1 else 0.5)
            errors.append(None)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
            scheduler.step(float("nan"))  # and a NaN is no error
    scheduler.converge()
    return {"errors": errors, "steps": scheduler.ensemble.steps, "losses": scheduler.ensemble.last_report.losses}


@scenario
def monitors(rank, world):
    """TensorBoard and JSON lines are written by one rank; the callback is called on all of them."""
    reports = []
    directory = OUT / "monitors"
    model = DDP(net())
    optimizer = torch.optim.Adam(
        [
            {"params": model.module[0].parameters(), "name": "body"},
            {"params": model.module[2].parameters(), "name": "head"},
        ]
    )
    board = hdet.TensorBoard(directory / f"tensorboard{rank}")
    lines = hdet.JsonLines(directory / f"reports{rank}.jsonl")
    scheduler = hdet.OneCycleLR(
        optimizer,
        0.02,
        total_steps=30,
        model=model,
        spread=0.2,
        converge_every=5,
        auto_lr=True,
        controller=hdet.controller.Published(),
        monitor=[board, lines, reports.append],
    )
    train(model, optimizer, scheduler.step, rank, 23)
    scheduler.converge()
    board.close()
    lines.close()
    lone = []  # a monitor on one rank only must not leave the others waiting
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = hdet.OneCycleLR(
        optimizer,
        0.02,
        total_steps=6,
        model=model,
        spread=0.2,
        converge_every=3,
        monitor=lone.append if rank == world - 1 else None,
        gradients="local",
    )
    train(model, optimizer, scheduler.step, rank, 6)
    return {"reports": reports, "directory": str(directory), "lone": lone}


@scenario
def resume(rank, world):
    """Rank 0's checkpoint, loaded on every rank, continues bit for bit, at a round's end and inside a round."""

    def build():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = hdet.OneCycleLR(
            optimizer,
            0.02,
            total_steps=24,
            model=model,
            spread=0.2,
            converge_every=4,
            auto_lr=True,
            controller=hdet.controller.Published(warmup_rounds=1),
        )
        return model, optimizer, scheduler

    def advance(model, optimizer, scheduler, start, stop, converge_at=()):
        for step in range(start, stop):
            x, y = batch(rank, step)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            for (
                p
            ) in model.parameters():  # not DDP: it lays its buckets anew after one step, and so sums in another order
                dist.all_reduce(p.grad, dist.ReduceOp.SUM)
                p.grad /= world
            optimizer.step()
            scheduler.step(loss)
            if step + 1 in converge_at:
                scheduler.converge()

    results = {}
    for at in (8, 10):
        whole = build()
        advance(*whole, 0, 24, converge_at=(at,))
        first = build()
        advance(*first, 0, at, converge_at=(at,))
        model, optimizer, scheduler = first
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        file = io.BytesIO()
        torch.save(state, file)
        saved = gather(file.getvalue())
        loaded = torch.load(io.BytesIO(saved[0]), weights_only=True)
        second = build()
        second[0].load_state_dict(loaded["model"])
        order = (1, 2) if at == 8 else (2, 1)  # the optimizer's state first, or the scheduler's
        for i in order:
            second[i].load_state_dict(loaded[["model", "optimizer", "scheduler"][i]])
        lr_match = second[2].get_last_lr() == first[2].get_last_lr() == [second[1].param_groups[0]["lr"]]
        advance(*second, at, 24)
        results[at] = {
            "equal": bits(second[0]) == bits(whole[0]),
            "gain": (second[2].ensemble.gains, whole[2].ensemble.gains),
            "lr_match": lr_match,
            "scheduler_equal": len({repr(s) for s in gather(state["scheduler"])}) == 1,
            "optimizer_lr_equal": len({s["param_groups"][0]["lr"] for s in gather(state["optimizer"])}) == 1,
            "lrs_differ": len({lr for (lr,) in gather(first[2].get_last_lr())}),
        }
    # Another number of replicas: gains and step are kept, multipliers drawn anew.
    state = copy.deepcopy(loaded["scheduler"])
    state["hdet"]["replicas"] = world + 1
    state["hdet"]["round_losses"].append([1.0, 1])
    model, optimizer, scheduler = build()
    scheduler.load_state_dict(state)
    results["resized"] = {
        "gain": (scheduler.ensemble.gains[0], loaded["scheduler"]["hdet"]["controller"][0][0]),
        "steps": scheduler.ensemble.steps,
        "lr": optimizer.param_groups[0]["lr"]
        == scheduler.ensemble.get_base_lr()[0] * (scheduler.ensemble.gains[0] * scheduler.ensemble.multipliers()[rank]),
    }
    return results


@scenario
def groups(rank, world):
    """replicas= takes a ProcessGroup or a 1-D DeviceMesh; sub-groups average among themselves."""
    halves = [dist.new_group([r for r in range(world) if r % 2 == parity]) for parity in (0, 1)]
    results = {}
    for name, group in {
        "mesh": init_device_mesh("cpu", (world,), mesh_dim_names=("replicate",)),
        "half": halves[rank % 2],
        "world": None,
    }.items():
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(float(rank))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ensemble = hdet.Ensemble(optimizer, model=model, spread=0.1, converge_every=2, replicas=group)
        for _ in range(2):
            ensemble.step(1.0)
        results[name] = (float(model.weight[0, 0]), ensemble.replicas.size, len(set(ensemble.multipliers())))
    try:
        shape = (1, world)
        hdet.Ensemble(optimizer, replicas=init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")))
    except ValueError as error:
        results["2d"] = str(error)
    try:
        hdet.Ensemble(optimizer, replicas=halves[1 - rank % 2])
    except (ValueError, TypeError) as error:
        results["foreign"] = f"{type(error).__name__}: {error}"
    return results


@scenario
def schedulers(rank, world):
    """Ensemble around torch's own schedulers: the mean of the replicas' rates is the plain scheduler's."""
    lr_scheduler = torch.optim.lr_scheduler
    makers = {
        "none": lambda o: None,
        "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
        "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        "sequential": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
        ),
        "chained": lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
        ),
        "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 3),
        "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        "function": lambda o: hdet.schedules.cosine(total_steps=12),
    }
    results = {}
    for name, make in makers.items():
        for tensor in (False, True):
            if tensor and name == "cyclic":
                continue
            rates = [torch.tensor(0.5), torch.tensor(0.5)] if tensor else [0.5, 0.5]
            model = nn.Linear(2, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=rates[0], momentum=0.9)
            identity = id(optimizer.param_groups[0]["lr"]) if tensor else None
            ensemble = hdet.Ensemble(optimizer, make(optimizer), model=model, spread=0.2, converge_every=3)
            twin = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=rates[1], momentum=0.9)
            plain = make(twin)
            if callable(plain) and not isinstance(plain, lr_scheduler.LRScheduler):
                plain = lr_scheduler.LambdaLR(twin, plain)
            worst = 0.0
            for _ in range(14):
                mine = float(optimizer.param_groups[0]["lr"])
                worst = max(worst, abs(mine - float(twin.param_groups[0]["lr"]) * ensemble.multipliers()[rank]))
                optimizer.step()
                ensemble.step(1.0)
                twin.step()
                if plain is not None:
                    plain.step()
            results[name, tensor] = (worst, identity is None or id(optimizer.param_groups[0]["lr"]) == identity)
    return results


@scenario
def plateau(rank, world):
    """ReduceLROnPlateau sees the replicas' mean loss, so all ranks reduce together."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    ensemble = hdet.Ensemble(optimizer, schedule, model=model, spread=0.2, converge_every=2)
    bases = []
    # this replica's own loss falls or rises; the mean rises from the second round on
    for step in range(8):
        ensemble.step(1.0 + step * (2.0 if rank == 0 else -0.1))
        bases.append(ensemble.get_base_lr()[0])
    return {"bases": bases}


def probe_setting(seed=0, lr=0.2, features=64, **settings):
    """The digits workload of the regret benchmark, replica by replica."""
    workload = dataclasses.replace(WORKLOADS["digits_mlp"], steps=40)
    model = DDP(peers.build(workload, seed))
    optimizer = peers.optimizer_of(workload, model, lr)
    settings = {
        "model": model,
        "spread": 0.11,
        "converge_every": 4,
        "auto_lr": True,
        "probe": hdet.Probe(
            loss_fn=lambda model, batch: workload.loss(model(batch.inputs), batch.targets),
            batches=probe_batches(workload),
        ),
    } | settings
    scheduler = hdet.OneCycleLR(
        optimizer, lr, total_steps=settings.pop("total_steps", 40), cycle_momentum=False, **settings
    )
    return workload, model, optimizer, scheduler


def probe_batches(workload):
    generator = torch.Generator().manual_seed(300)
    while True:
        batch = workload.draw(workload.batch_size, generator)
        yield Batch(*(tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in batch))


def probe_step(workload, model, optimizer, scheduler, generator, rank, world):
    batch = workload.draw(workload.batch_size, generator)
    part = Batch(*(tensor.chunk(world)[rank] for tensor in batch))
    optimizer.zero_grad()
    loss = workload.loss(model(part.inputs), part.targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step(loss, batch=part)
    return loss.item()


@scenario
def paired_probe(rank, world):
    reports, flags = [], []
    # So few and short rounds say little of how far the weights should move.
    controller = hdet.controller.Posterior(rest_below=0.2, bounds=(0.5, 2.0))
    workload, model, optimizer, scheduler = probe_setting(monitor=reports.append, controller=controller)
    generator = peers.batches(0)
    state = torch.get_rng_state()
    for step in range(40):
        probe_step(workload, model, optimizer, scheduler, generator, rank, world)
        flags.append(model.training and all(module.training for module in model.modules()))
        if step == 19:
            scheduler.converge()
            saved = io.BytesIO()
            torch.save([model.module.state_dict(), optimizer.state_dict(), scheduler.state_dict()], saved)
    loss = peers.evaluate(workload, model.module, workload.validation())
    simulated = simulate(workload, 0.2, 0, Setting(replicas=world, rounds=10, exact=True, controller=controller))
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    _, resumed, other, again = probe_setting(controller=controller)
    resumed.module.load_state_dict(states[0])
    other.load_state_dict(states[1])
    again.load_state_dict(states[2])
    parts = [part for pair in again.ensemble._phases.converge.slow.state() for part in pair]
    return {
        "gains": [report.next_gain[0] for report in reports],
        "slopes": [tuple(report.probe) for report in reports],
        "loss": loss,
        "simulated_gains": simulated.details["gains"],
        "simulated_loss": simulated.loss,
        "digests": gather(bits(model)),
        "generator_untouched": torch.equal(torch.get_rng_state(), state),
        "training": all(flags),
        "resumed_gain": again.ensemble.gains[0],
        "resumed_slow": all(
            torch.equal(a, b)
            for a, b in zip(parts, [x for y in states[2]["hdet"]["slow_average"] for x in y], strict=True)
        ),
        "resumed_rounds": again.ensemble._phases.converge.slow.rounds,
    }


@scenario
def probe_failure(rank, world):
    calls = []

    def failing(model, batch):
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise ValueError("out of luck")
        return F.cross_entropy(model(batch.inputs), batch.targets)

    workload, model, optimizer, scheduler = probe_setting(probe=failing, converge_every=16, total_steps=300)
    generator = peers.batches(0)
    error = None
    try:
        for _ in range(70):
            probe_step(workload, model, optimizer, scheduler, generator, rank, world)
    except (RuntimeError, ValueError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "digests": gather(bits(model)), "training": model.training}


@scenario
def rollback(rank, world):
    reports = []
    controller = hdet.controller.Posterior(bounds=(0.1, 2.0))
    workload, model, optimizer, scheduler = probe_setting(monitor=reports.append, lr=0.1, controller=controller)
    generator = peers.batches(0)
    snapshots = {}
    for step in range(40):
        if step == 18:  # in the fifth round
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(float("nan"))
        probe_step(workload, model, optimizer, scheduler, generator, rank, world)
        if step in (15, 19):
            momenta = [optimizer.state[p]["momentum_buffer"].numpy().tobytes() for p in model.parameters()]
            snapshots[step] = (bits(model), momenta)
    return {
        "rolled_back": [report.rolled_back for report in reports],
        "gains": [report.next_gain[0] for report in reports],
        "restored": snapshots[15] == snapshots[19],
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "digests": gather(bits(model)),
    }


@scenario
def last_step(rank, world):
    """An optimizer.step() that no scheduler.step() follows is averaged all the same."""
    workload, model, optimizer, scheduler = probe_setting(auto_lr=False, probe=None)
    generator = peers.batches(0)
    for _ in range(8):  # two rounds
        probe_step(workload, model, optimizer, scheduler, generator, rank, world)
    nothing = scheduler.converge()
    if rank == 0:  # on one rank only: GradScaler may skip the others'
        optimizer.step()
    different = len({str(digest) for digest in gather(bits(model))})
    report = scheduler.converge()
    return {
        "nothing": nothing,
        "different": different,
        "averaged": report is not None,
        "digests": gather(bits(model)),
        "again": scheduler.converge(),
    }


@scenario
def find_lr(rank, world):
    torch.manual_seed(3)
    workload = WORKLOADS["digits_mlp"]
    model = DDP(peers.build(workload, 0))
    optimizer = peers.optimizer_of(workload, model, 0.1)
    generator = torch.Generator().manual_seed(rank)
    model(workload.draw(4, generator).inputs).sum().backward()
    optimizer.step()
    before = (bits(model), [p.grad.clone() for p in model.parameters()], optimizer.state_dict())
    before = copy.deepcopy(before)
    found, coarse = (
        hdet.find_lr(
            model,
            optimizer,
            lambda model, batch: F.cross_entropy(model(batch.inputs), batch.targets),
            (workload.draw(16, generator) for _ in range(10**6)),
            low=1e-3,
            high=10,
            steps=40,
            auto_lr=auto_lr,
        )
        for auto_lr in (False, True)
    )
    after = (bits(model), [p.grad for p in model.parameters()], optimizer.state_dict())
    same_state = all(
        torch.equal(a["momentum_buffer"], b["momentum_buffer"])
        for a, b in zip(before[2]["state"].values(), after[2]["state"].values(), strict=True)
    )
    return {
        "found": dataclasses.asdict(found),
        "coarse": dataclasses.asdict(coarse),
        "restored": before[0] == after[0]
        and all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
        and same_state
        and before[2]["param_groups"] == after[2]["param_groups"],
    }


def explored(rank, world, count, group, steps=100):
    """A run of 4 replicas in all, ``count`` to a process: its parameters after a last converge, and its gains."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(steps, 4, 8, 6, generator=generator, dtype=torch.float64)
    targets = inputs[..., :3].argmax(-1)

    def loss_fn(model, batch):
        return F.cross_entropy(model(inputs[batch]), targets[batch])

    torch.manual_seed(3)
    size = dist.get_world_size(group)
    own = range(dist.get_rank(group) * count, dist.get_rank(group) * count + count)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    model = DDP(model, process_group=group) if size > 1 else model
    optimizer = torch.optim.Adam(model.parameters())
    reports = []
    scheduler = hdet.OneCycleLR(
        optimizer,
        0.05,
        steps,
        model=model,
        spread=0.3,
        converge_every=4,
        auto_lr=True,
        probe=hdet.Probe(loss_fn=loss_fn, batches=[(step, r) for step in range(3, steps, 4) for r in own]),
        virtual_replicas=count,
        replicas=group,
        monitor=reports.append,
    )
    for step in range(steps):
        losses = []
        for batch in scheduler.each([(step, r) for r in own]):
            last = len(losses) == count - 1
            with contextlib.nullcontext() if size == 1 or last else model.no_sync():
                loss = loss_fn(model, batch)
                (loss / count).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(losses)
    scheduler.converge()
    return {
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "gains": [report.next_gain[0] for report in reports],
        "losses": [report.losses for report in reports],
        "slopes": [tuple(report.probe) for report in reports],
        "size": scheduler.ensemble.size,
    }


@scenario
def virtual(rank, world):
    alone = [dist.new_group([r]) for r in range(world)]
    pairs = [dist.new_group([r, r + 1]) for r in range(0, world - 1, 2)]
    runs = {"virtual": explored(rank, world, 4, alone[rank])}
    if world != 3:
        runs["pairs"] = explored(rank, world, 2, pairs[rank // 2])
    if world == 4:
        runs["real"] = explored(rank, world, 1, dist.group.WORLD)
    return runs


@scenario
def hyperparameters(rank, world):
    """Weight decay, dropout and a scalar of the user's, in local mode, with a probe on held-out data."""
    generator = torch.Generator().manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    smoothing = hdet.scalar("label_smoothing", 0.1, spread=0.05, bounds=(0, 0.5), neutral=0.0)
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
    probed, held, reports = [], [], []

    def draw(size):
        x = torch.randn(size, 6, generator=generator)
        return x, (x @ weights + torch.randn(size, 3, generator=generator)).argmax(-1)

    def loss_fn(model, batch):
        probed.append((float(smoothing), model[2].training, optimizer.param_groups[0]["weight_decay"]))
        return F.cross_entropy(model(batch[0]), batch[1])

    def held_out():
        while True:
            yield draw(64)

    def build():
        return hdet.OneCycleLR(
            optimizer,
            0.01,
            200,
            cycle_momentum=False,
            model=model,
            spread=0.2,
            converge_every=10,
            auto_lr=True,
            gradients="local",
            probe=hdet.Probe(loss_fn=loss_fn, batches=held_out(), held_out=True),
            hyperparameters=[
                hdet.param_group("weight_decay", spread=0.5),
                hdet.module_attribute(model, nn.Dropout, "p", spread=0.1),
                smoothing,
            ],
            exploration=hdet.Exploration(controller=hdet.controller.OneSlope(threshold=0.0)),  # anything moves them
            monitor=reports.append,
        )

    scheduler = build()
    for step in range(200):
        x, y = draw(16)
        smoothed = float(smoothing)
        if step % 10 == 0:
            group = optimizer.param_groups[0]
            held.append((group["lr"], group["weight_decay"], model[2].p, smoothed))
        loss = F.cross_entropy(model(x), y, label_smoothing=smoothed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        if step == 99:
            state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            centres = scheduler.ensemble.centres
            values = (optimizer.param_groups[0]["weight_decay"], model[2].p, float(smoothing))
    after = scheduler.ensemble.centres
    again = build()
    optimizer.load_state_dict(state[0])
    again.load_state_dict(state[1])
    return {
        "held": held,
        "reports": [dataclasses.asdict(h) for report in reports[:20] for h in report.hyperparameters],
        "replica_lr": [report.replica_lr[0] for report in reports[:20]],
        "probed": probed,
        "saved_weight_decay": state[0]["param_groups"][0]["weight_decay"],
        "centres": centres,
        "after": after,
        "values": values,
        "resumed_centres": again.ensemble.centres,
        "resumed_values": (optimizer.param_groups[0]["weight_decay"], model[2].p, float(smoothing)),
    }


def main():
    dist.init_process_group("gloo")
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
