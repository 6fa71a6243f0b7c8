"""Run in 4 real processes: replicas of two ranks each, sharded (FSDP2) or copies, and gradient modes.

As in worker.py, a scenario returns plain values; what it must do is said in the test that reads it.
"""

import copy
import math
import sys
import warnings
from pathlib import Path

import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet
from hdet.explore.spread import assignment
from hdet.replicas.topology import Replicas

SCENARIOS = []
OUT = Path(sys.argv[1])
REPLICAS, MEMBERS = 2, 2
MESH = None


def scenario(function):
    SCENARIOS.append(function)
    return function


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Net(nn.Module):
    """Shards that are uneven (5 and 3 rows over two ranks) and empty (one row), and buffers."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.two = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.two(torch.tanh(self.norm(self.one(x).float()))) * self.scale


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def shard(model, **options):
    for child in model.children():
        if isinstance(child, nn.BatchNorm1d):  # its buffers are fp32
            fully_shard(child, mesh=MESH)
        elif any(True for _ in child.parameters()):
            fully_shard(child, **{"mesh": MESH, **options})
    return fully_shard(model, **{"mesh": MESH, **options})


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(model, data):
    x, y = data
    return F.cross_entropy(model(x).float(), y)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).double().view(-1) for p in model.parameters()])


def train(model, optimizer, scheduler, rank, steps, first=0, gradients=None):
    for step in range(first, steps):
        loss = loss_of(model, batch(rank, step))
        optimizer.zero_grad()
        loss.backward()
        if gradients is not None:
            gradients.append(torch.cat([local(p.grad).view(-1).clone() for p in model.parameters()]))
        optimizer.step()
        scheduler.step(loss)


def square(by_rank, rank, member):
    """Squared distance of a rank's buffers from those of the ranks that hold the same shard."""
    kept = [b.double() for b in by_rank[rank][1]]
    mean = [torch.stack([by_rank[r][1][i].double() for r in (member, 2 + member)]).mean(0) for i in range(len(kept))]
    return sum(float((a - b).square().sum()) for a, b in zip(kept, mean, strict=True))


@scenario
def converged_mean(rank, world):
    results = {}
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, options in {"fp32": {}, "bf16": {"mp_policy": precision}}.items():
        model = shard(net(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reports = []
        scheduler = hdet.OneCycleLR(
            optimizer, 0.1, total_steps=20, cycle_momentum=False, model=model, spread=0.25, converge_every=4,
            replicas=MESH["replicate"], averaging=hdet.Averaging(bucket_mib=1e-4), monitor=reports.append,
        )  # fmt: skip
        replicas = scheduler.ensemble.replicas
        lrs = [scheduler.get_last_lr()[0]]
        train(model, optimizer, scheduler, rank, 3)
        lrs.append(scheduler.get_last_lr()[0])
        pointers = [local(p).data_ptr() for p in model.parameters()]
        dtypes = {str(local(p).dtype) for p in model.parameters()}
        empty = [local(p).numel() == 0 for p in model.parameters()]
        before, buffers = full(model), [b.clone() for b in model.buffers()]
        with torch.no_grad():  # the root keeps its parameters whole after this
            loss_of(model.eval(), batch(rank, 99))
        report = scheduler.converge()
        after = full(model)
        by_rank = gather((before, buffers))
        mean = torch.stack([by_rank[r][0] for r in (0, 2)]).mean(0)
        mine = [by_rank[r][1] for r in (rank % 2, 2 + rank % 2)]
        results[name] = {
            "error": float((after - mean).abs().max()),
            "apart": float((by_rank[0][0] - by_rank[2][0]).abs().max()),
            "again": scheduler.converge(),
            "in_place": pointers == [local(p).data_ptr() for p in model.parameters()],
            "dtypes": dtypes,
            "empty": empty,
            "buffers": all(
                torch.allclose(b, (x.double() + y.double()).div(2).to(b.dtype) if b.is_floating_point() else x)
                for b, x, y in zip(model.buffers(), *mine, strict=True)
            ),
            "equal": [bool(torch.equal(a, after)) for a in gather(after)],
            "lrs": lrs,
            "place": (replicas.size, replicas.rank, replicas.members, replicas.member, replicas.writer),
            "distance": report.distance,
            "expected_distance": [
                math.sqrt(
                    (by_rank[r][0] - mean).square().sum() + sum(square(by_rank, r + m, m) for m in range(MEMBERS))
                )
                for r in (0, 2)
            ],
            "reports": [
                {k: v for k, v in vars(r).items() if k not in ("writer", "converge_ms", "converge_bytes")}
                for r in reports
            ],
        }
    return results


@scenario
def losses_and_health(rank, world):
    """Losses by rank; then one member with a NaN loss; then one member with a NaN parameter; then every replica."""
    model = shard(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ensemble = hdet.Ensemble(
        optimizer, model=model, spread=0.1, converge_every=2, replicas=MESH["replicate"], rollback=False
    )
    losses = []
    for step in range(4):
        ensemble.step(math.nan if step == 2 and rank == 1 else float(rank + step % 2))
        if step % 2:
            losses.append(ensemble.last_report.losses)
    start = full(model)
    with torch.no_grad():
        if rank == 3:
            local(model.one.weight).fill_(math.nan)
        elif rank < 2:
            local(model.one.weight).add_(1.0)
    report = ensemble.converge()
    healed = full(model) - start
    with torch.no_grad():
        model.norm.running_mean.fill_(math.inf if rank == 1 else rank)
    buffer_report = ensemble.converge()
    ensemble.step(1.0)
    buffer_report = ensemble.converge() or buffer_report
    with torch.no_grad():
        if rank in (1, 2):
            local(model.one.weight).fill_(math.inf)
    try:
        ensemble.converge()
        error = None
    except hdet.DivergedError as raised:
        error = str(raised)
    return {
        "losses": losses,
        "excluded": report.excluded,
        "healed": (float(healed.min()), float(healed.max())),
        "buffer": None if buffer_report is None else buffer_report.excluded,
        "running_mean": model.norm.running_mean.tolist(),
        "error": error,
    }


def simulated(replicas, members, gradients, steps, every, spread, outer=(0.0, 1.0), build=None):
    """The same training in one process: the mean model after the last step, off a round's end or on it."""
    models = [plain() for _ in range(replicas)]
    optimizers = [build(m.parameters()) for m in models]
    base = optimizers[0].param_groups[0]["lr"]
    anchor = velocity = None
    for step in range(steps):
        rho = assignment(replicas, spread, seed=0, round=step // every, hyperparameter="lr/0")
        for r, model in enumerate(models):
            model.zero_grad()
            data = [batch(r * members + member, step) for member in range(members)]
            (sum(loss_of(model, d) for d in data) / members).backward()
        if gradients == "shared":
            for parts in zip(*(m.parameters() for m in models), strict=True):
                mean = torch.stack([p.grad for p in parts]).mean(0)
                for p in parts:
                    p.grad = mean.clone()
        for r, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["lr"] = base * rho[r]
            optimizer.step()
        complete = (step + 1) % every == 0
        if complete or step == steps - 1:
            with torch.no_grad():
                mean = torch.stack([nn.utils.parameters_to_vector(m.parameters()) for m in models]).mean(0)
                if complete and anchor is None:
                    anchor, velocity = mean.clone(), torch.zeros_like(mean)
                elif complete:
                    mu, nu = outer
                    displacement = anchor - mean
                    velocity = mu * velocity + displacement
                    anchor = mean = anchor - nu * (displacement + mu * velocity)
                for model in models:
                    nn.utils.vector_to_parameters(mean.clone(), model.parameters())
    return mean.double()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.02)


# name: how the model is wrapped, replicas=, gradients=, (N, M)
def modes():
    replicate, members = MESH["replicate"], MESH.get_group("shard")
    return {
        "ddp_shared": (DDP, None, "shared", (4, 1)),
        "ddp_local": (DDP, None, "local", (4, 1)),
        "ddp_grouped": (DDP, 2, "grouped", (2, 2)),
        "ddp_pairs_shared": (DDP, 2, "shared", (2, 2)),
        "ddp_of_members_local": (lambda m: DDP(m, process_group=members), replicate, "local", (2, 2)),
        "ddp_of_members_grouped": (lambda m: DDP(m, process_group=members), replicate, "grouped", (2, 2)),
        "hsdp_shared": (shard, replicate, "shared", (2, 2)),
        "hsdp_local": (shard, replicate, "local", (2, 2)),
        "hsdp_grouped": (shard, replicate, "grouped", (2, 2)),
        "hsdp_int_local": (shard, 2, "local", (2, 2)),
        "fsdp_local": (lambda m: shard(m, mesh=MESH["shard"]), replicate, "local", (2, 2)),
    }


@scenario
def gradient_modes(rank, world):
    results = {}
    for name, (wrap, replicas, gradients, (size, members)) in modes().items():
        model = wrap(plain())
        optimizer = sgd(model.parameters()) if "ddp" in name else adam(model.parameters())
        seen = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ensemble = hdet.Ensemble(
                optimizer, model=model, spread=0.3, converge_every=3, replicas=replicas, gradients=gradients,
                averaging=hdet.Averaging(optimizer_state="keep"),  # as the simulation does
            )  # fmt: skip
            train(model, optimizer, ensemble, rank, 8, gradients=seen)
            ensemble.converge()
        everyone = gather(torch.stack(seen))
        pairs = [(0, 1), (2, 3)] if "ddp" in name else []
        across = [(0, 2), (1, 3)]
        build = sgd if "ddp" in name else adam
        wanted = "shared" if gradients == "shared" else "local"
        reference = simulated(size, members, wanted, 8, 3, 0.3, build=build)
        results[name] = {
            "inside_equal": all(torch.equal(everyone[a], everyone[b]) for a, b in pairs),
            "across_equal": all(torch.equal(everyone[a], everyone[b]) for a, b in across),
            "error": float((full(model) - reference).abs().max()),
            "equal": all(torch.equal(x, full(model)) for x in gather(full(model))),
            "said": [str(w.message) for w in said],
        }
    return results


@scenario
def switches(rank, world):
    """no_sync() inside local mode; and back to shared gradients by the next ensemble on the module."""

    def spread_out(model, step=0):
        model.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        mine = torch.cat([local(p.grad).reshape(-1) for p in model.parameters()])
        rows = gather(mine)
        return not torch.equal(rows[0], rows[2])

    results = {}
    for name, wrap, replicas, mode in (
        ("ddp", DDP, None, "local"),
        ("grouped", DDP, 2, "grouped"),
        ("hsdp", shard, MESH["replicate"], "local"),
    ):
        model = wrap(plain())
        optimizer = sgd(model.parameters())
        settings = {"model": model, "spread": 0.1, "converge_every": 2, "replicas": replicas}
        seen = []
        for gradients in (mode, "shared", mode, "shared"):
            hdet.Ensemble(optimizer, gradients=gradients, **settings)
            if name == "ddp":
                with model.no_sync():
                    loss_of(model, batch(rank, 5)).backward()
            seen.append(spread_out(model))
        results[name] = seen
    return results


@scenario
def guards(rank, world):
    """What is said where the gradients are not what the mode says."""
    said = {}
    cases = {
        "local, bare model": (DDP(plain()), "local", True),
        "shared, no DDP": (plain(), "shared", False),
        "no gradients": (plain(), "shared", False),
    }
    for name, (model, gradients, unwrap) in cases.items():
        optimizer = sgd(model.parameters())
        given = model.module if unwrap else model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ensemble = hdet.Ensemble(optimizer, model=given, spread=0.1, converge_every=2, gradients=gradients)
            errors = []
            for step in range(4):
                loss = loss_of(model, batch(rank, step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if name == "no gradients":
                    optimizer.zero_grad()
                try:
                    ensemble.step(loss)
                except hdet.ReplicaMismatchError as error:
                    errors.append(str(error))
                    break
        said[name] = [*errors, *(str(w.message) for w in caught)]
    return said


@scenario
def outer(rank, world):
    results = {}
    for name, (wrap, replicas, size, members) in {
        "ddp": (DDP, None, 4, 1),
        "hsdp": (shard, MESH["replicate"], 2, 2),
    }.items():
        for momentum, lr in ((0.0, 1.0), (0.6, 0.7), (0.0, 0.5)):
            model = wrap(plain())
            optimizer = sgd(model.parameters())
            settings = {"spread": 0.3, "converge_every": 3, "replicas": replicas, "gradients": "local"}
            averaging = hdet.Averaging(bucket_mib=1e-4, optimizer_state="keep")
            settings |= {"outer": hdet.Outer(momentum=momentum, lr=lr), "averaging": averaging}
            ensemble = hdet.Ensemble(optimizer, model=model, **settings)
            train(model, optimizer, ensemble, rank, 9)
            saved, halfway = (
                copy.deepcopy(ensemble.state_dict()),
                [local(p).detach().clone() for p in model.parameters()],
            )
            momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
            train(model, optimizer, ensemble, rank, 14, first=9)
            ensemble.converge()
            end = full(model)
            reference = simulated(size, members, "local", 14, 3, 0.3, outer=(momentum, lr), build=sgd)

            model = wrap(plain(1))
            optimizer = sgd(model.parameters())
            ensemble = hdet.Ensemble(optimizer, model=model, **settings)
            with torch.no_grad():
                for p, kept, buffer in zip(model.parameters(), halfway, momenta, strict=True):
                    local(p).copy_(kept)
                    optimizer.state[p]["momentum_buffer"] = buffer
            ensemble.load_state_dict(saved)
            train(model, optimizer, ensemble, rank, 14, first=9)
            ensemble.converge()
            results[name, momentum, lr] = {
                "error": float((end - reference).abs().max()),
                "resumed": torch.equal(full(model), end),
                "equal": all(torch.equal(x, end) for x in gather(end)),
                "parts": len(saved["outer"]),
                "shard": saved["shard"],
            }
    return results


@scenario
def overlap(rank, world):
    model = shard(plain())
    optimizer = sgd(model.parameters())
    ensemble = hdet.Ensemble(
        optimizer,
        model=model,
        spread=0.3,
        converge_every=4,
        averaging=hdet.Averaging(overlap_steps=2),
        replicas=MESH["replicate"],
    )
    train(model, optimizer, ensemble, rank, 11)
    before = gather(full(model))
    ensemble.converge()
    after = full(model)
    return {
        "apart": not torch.equal(before[0], before[2]),
        "equal": all(torch.equal(x, after) for x in gather(after)),
        "finite": bool(after.isfinite().all()),
    }


@scenario
def optimizer_state(rank, world):
    """Shards of the state are averaged along the replicas, or verified; a poisoned member heals with its replica."""
    results = {}
    for gradients in ("shared", "local"):
        for poison in (False, True):
            model = shard(plain())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            reports = []
            ensemble = hdet.Ensemble(
                optimizer, model=model, spread=0.3, converge_every=4, gradients=gradients, monitor=reports.append,
                replicas=MESH["replicate"],
            )  # fmt: skip
            train(model, optimizer, ensemble, rank, 3)
            loss = loss_of(model, batch(rank, 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if poison and rank == 3:
                for state in optimizer.state.values():
                    local(state["exp_avg"]).fill_(float("nan"))
            before = gather([local(state["exp_avg"]).double() for state in optimizer.state.values()])
            ensemble.step(loss)
            after = [local(state["exp_avg"]).double() for state in optimizer.state.values()]
            givers = [rank % 2] if poison else [rank % 2, rank % 2 + 2]
            expected = [torch.stack([before[r][i] for r in givers]).mean(0) for i in range(len(after))]
            peers = gather([(a + 0.0).numpy().tobytes() for a in after])
            results[gradients, poison] = {
                "error": max(float((a - e).abs().max()) for a, e in zip(after, expected, strict=True) if a.numel()),
                "equal": peers[rank % 2] == peers[rank % 2 + 2],
                "excluded": reports[0].excluded,
                "policy": ensemble._rounds._plain_settings()["averaging.optimizer_state"],
            }
    return results


def probing(model, rank, spread=0.3, max_lr=0.02, **settings):
    optimizer = adam(model.parameters())
    reports = []

    def batches():
        while True:
            yield batch(rank, 500 + scheduler.ensemble.round)

    scheduler = hdet.OneCycleLR(
        optimizer, max_lr, total_steps=40, cycle_momentum=False, model=model, spread=spread, converge_every=2,
        auto_lr=True, probe=hdet.Probe(loss_fn=loss_of, batches=batches()),
        replicas=MESH["replicate"], monitor=reports.append,
        **settings,
    )  # fmt: skip
    return optimizer, scheduler, reports


@scenario
def probe(rank, world):
    results = {}
    for gradients in ("shared", "local"):
        model = shard(net())
        bounded = hdet.controller.Posterior(bounds=(0.8, 2.0))  # the weights move enough for a blow-up
        optimizer, scheduler, reports = probing(model, rank, max_lr=0.04, gradients=gradients, controller=bounded)
        train(model, optimizer, scheduler, rank, 17)
        good = scheduler.ensemble.gains
        train(model, optimizer, scheduler, rank, 18, first=17)
        rollbacks = [r.step for r in reports if r.rolled_back]
        converged = full(model)
        moments = [local(s["exp_avg"]).clone() for s in optimizer.state.values()]
        for step in (18, 19):  # a round that blows up, seen by one member only
            loss = loss_of(model, batch(rank, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(1e6 if rank == 2 else loss)
        undone = torch.equal(full(model), converged)
        state_undone = all(
            torch.equal(local(s["exp_avg"]), m) for s, m in zip(optimizer.state.values(), moments, strict=True)
        )
        train(model, optimizer, scheduler, rank, 40, first=20)
        results[gradients] = {
            "slopes": [tuple(r.probe) for r in reports],
            "gain": [r.next_gain for r in reports],
            "good": good,
            "rollbacks": rollbacks,
            "rolled_back": [r.step for r in reports if r.rolled_back],
            "undone": undone,
            "state_undone": state_undone,
            "equal": all(torch.equal(x, full(model)) for x in gather(full(model))),
            "loss": float(loss_of(model, batch(rank, 900)).detach()),
        }
    return results


@scenario
def probe_against_whole_models(rank, world):
    """The slopes of two replicas of two ranks: sharded, and as copies of whole models under DDP."""
    slopes = {}
    for name, wrap in (("hsdp", shard), ("ddp", DDP)):
        model = wrap(plain())
        optimizer, scheduler, reports = probing(model, rank)
        train(model, optimizer, scheduler, rank, 12)
        slopes[name] = [tuple(r.probe) for r in reports], [r.distance for r in reports], [r.losses for r in reports]
    return slopes


@scenario
def probe_failures(rank, world):
    errors = {}
    for where in ("after the forward pass", "batch"):
        model = shard(net())
        optimizer = adam(model.parameters())
        calls = []

        def loss_fn(model, data, where=where, calls=calls):
            loss = loss_of(model, data)
            calls.append(1)
            if where != "batch" and rank == 3 and len(calls) == 6:
                raise KeyError("no such label")
            return loss

        def batches(where=where):
            yield batch(rank, 1)
            if where == "batch" and rank == 1:
                raise OSError("the disk is gone")
            yield batch(rank, 2)

        scheduler = hdet.OneCycleLR(
            optimizer, 0.02, total_steps=40, cycle_momentum=False, model=model, spread=0.3, converge_every=2,
            auto_lr=True, probe=hdet.Probe(loss_fn=loss_fn, batches=batches()), replicas=MESH["replicate"],
        )  # fmt: skip
        try:
            train(model, optimizer, scheduler, rank, 8)
            errors[where] = None
        except (RuntimeError, KeyError, OSError) as error:
            errors[where] = f"{type(error).__name__}: {error}", scheduler.ensemble.steps
    return errors


@scenario
def resume(rank, world):
    """Every rank's own shards, optimizer state and scheduler state, halfway and on."""

    def state(optimizer):
        return [{k: local(v).clone() for k, v in s.items()} for s in optimizer.state.values()]

    whole = shard(net())
    optimizer, scheduler, reports = probing(whole, rank, gradients="local")
    train(whole, optimizer, scheduler, rank, 10)
    saved = {
        "model": {k: local(v).clone() for k, v in whole.state_dict().items()},
        "optimizer": state(optimizer),
        "scheduler": copy.deepcopy(scheduler.state_dict()),
    }
    train(whole, optimizer, scheduler, rank, 20, first=10)
    end, gains = full(whole), scheduler.ensemble.gains

    model = shard(net(1))
    optimizer, scheduler, again = probing(model, rank, gradients="local")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            local(tensor).copy_(saved["model"][name])
        for p, kept in zip(model.parameters(), saved["optimizer"], strict=True):
            as_p = {k: DTensor.from_local(v, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                    if v.dim() else v for k, v in kept.items()}  # fmt: skip
            optimizer.state[p] = as_p
    scheduler.load_state_dict(saved["scheduler"])
    train(model, optimizer, scheduler, rank, 20, first=10)
    others = gather(saved["scheduler"])
    try:
        scheduler.load_state_dict(others[rank ^ 1])
        wrong = None
    except ValueError as error:
        wrong = str(error)
    return {
        "equal": torch.equal(full(model), end),
        "buffers": all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True)),
        "gains": (scheduler.ensemble.gains, gains),
        "slopes": ([tuple(r.probe) for r in again], [tuple(r.probe) for r in reports[-len(again) :]]),
        "rates": ([r.base_lr for r in again], [r.base_lr for r in reports[-len(again) :]]),
        "wrong_shard": wrong,
    }


def refused(build):
    try:
        build()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@scenario
def refusals(rank, world):
    def ensemble(model, **settings):
        optimizer = sgd(model.parameters())
        settings = {"spread": 0.1, "converge_every": 2, "model": model} | settings
        return lambda: hdet.Ensemble(optimizer, **settings)

    flat = init_device_mesh("cpu", (4,))
    tensor_parallel = plain()
    tensor_parallel[0].weight = nn.Parameter(distribute_tensor(tensor_parallel[0].weight.detach(), flat, [Shard(1)]))
    inside = plain()
    inside[0].weight = nn.Parameter(distribute_tensor(inside[0].weight.detach(), MESH["shard"], [Shard(1)]))
    hooked = DDP(plain())
    hooked.register_comm_hook(None, lambda state, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future())
    fsdp1 = FullyShardedDataParallel(plain(), process_group=MESH.get_group("shard"), device_id=torch.device("cpu"))
    sharded = shard(plain())
    return {
        "int": refused(ensemble(DDP(plain()), replicas=3)),
        "zero": refused(ensemble(DDP(plain()), replicas=0)),
        "bool": refused(ensemble(DDP(plain()), replicas=True)),
        "flattened": refused(ensemble(DDP(plain()), replicas=MESH)),
        "fsdp over the world": refused(ensemble(shard(plain(), mesh=flat))),
        "fsdp over the world, local": refused(ensemble(shard(plain(), mesh=flat), gradients="local")),
        "hsdp, replicas forgotten": refused(ensemble(sharded)),
        "hsdp, group": refused(ensemble(sharded, replicas=MESH.get_group("replicate"))),
        "hsdp, wrong axis": refused(ensemble(sharded, replicas=MESH["shard"])),
        "tensor parallel over the world": refused(ensemble(tensor_parallel)),
        "tensor parallel inside": refused(ensemble(inside, replicas=MESH["replicate"])),
        "fsdp1": refused(ensemble(fsdp1, replicas=MESH["replicate"])),
        "hook": refused(ensemble(hooked, replicas=2, gradients="grouped")),
        "grouped of one": refused(ensemble(DDP(plain()), gradients="grouped")),
        "grouped without": refused(ensemble(plain(), replicas=2, gradients="grouped")),
        "local of several": refused(ensemble(DDP(plain()), replicas=2, gradients="local")),
        "find_lr": refused(
            lambda: hdet.find_lr(sharded, sgd(sharded.parameters()), loss_of, [batch(0, 0)], replicas=MESH["replicate"])
        ),
    }


@scenario
def mismatches(rank, world):
    errors = {}
    for name, settings in {
        "spread": {"spread": 0.1 if rank != 3 else 0.2},
        "replicas": {"replicas": MESH["replicate"] if rank != 3 else 2},
        "mode": {"outer": hdet.Outer(lr=0.5 if rank == 1 else 1.0), "gradients": "local"},
        "none": {},
    }.items():
        model = shard(plain())
        optimizer = sgd(model.parameters())
        settings = {"spread": 0.1, "converge_every": 2, "model": model, "replicas": MESH["replicate"]} | settings
        ensemble = hdet.Ensemble(optimizer, **settings)
        try:
            train(model, optimizer, ensemble, rank, 4)
            errors[name] = None
        except hdet.ReplicaMismatchError as error:
            errors[name] = str(error)
    return errors


@scenario
def topologies(rank, world):
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("shard", "replicate", "tensor"))
    found = {}
    for name, given in {
        "world": None,
        "int": 2,
        "one": 1,
        "mesh": MESH["replicate"],
        "cube": cube["replicate"],
        "group": MESH.get_group("shard"),
    }.items():
        replicas = Replicas(given)
        rows = replicas.all_gather([float(rank)])
        peers = replicas.all_gather_peers([float(rank)])
        total = torch.tensor(float(rank))
        work = replicas.all_reduce(total, dist.ReduceOp.SUM)
        if work is not None:
            work.wait()
        found[name] = {
            "ranks": replicas.ranks,
            "own": replicas.own_ranks,
            "rows": [int(row[0]) for row in rows],
            "peers": [int(row[0]) for row in peers],
            "sum": total.item(),
            "writer": replicas.writer,
        }
    return found


def main():
    global MESH
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (REPLICAS, MEMBERS), mesh_dim_names=("replicate", "shard"))
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
