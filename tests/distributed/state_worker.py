"""Scenarios of optimizer state, health, precision and guards, run in real processes. Usage: state_worker.py OUT"""

import copy
import logging
import sys
import warnings
from pathlib import Path

import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet

OUT = Path(sys.argv[1])
SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def train(model, optimizer, scheduler, rank, steps, first=0):
    for step in range(first, first + steps):
        x, y = batch(rank, step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        scheduler.step(loss)


def states(optimizer):
    """Every tensor and number in the state, by parameter and key."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (i, key): value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for i, p in enumerate(parameters)
        for key, value in optimizer.state.get(p, {}).items()
    }


def bits_of(state):
    return {
        key: value.double().numpy().tobytes() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


class Lines(logging.Handler):
    """What hdet logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("hdet").addHandler(self)
        return self.lines

    def __exit__(self, *_):
        logging.getLogger("hdet").removeHandler(self)


TORCHS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "Adam, weight decay": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.05, weight_decay=0.1),
}


def _schedule_free(parameters):
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=0.05)


class EightBit(torch.optim.Optimizer):
    """Momentum in eight bits, with a scale: what quantised optimizers keep."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["codes"] = torch.zeros_like(p, dtype=torch.uint8)
                state["scale"] = torch.zeros(1)
            momentum = 0.9 * (state["codes"].float() - 128) * state["scale"] + p.grad
            state["scale"].copy_(momentum.abs().max() / 127)
            state["codes"].copy_((momentum / state["scale"]).round() + 128)
            p.sub_(self.param_groups[0]["lr"] * momentum)


OTHERS = {"Schedule-Free": _schedule_free, "8-bit": lambda p: EightBit(p, lr=0.05)}


@scenario
def every_optimizer(rank, world):
    """What auto comes to, and what is equal after a converge, under shared and under local gradients."""
    results = {}
    for name, build in {**TORCHS, **OTHERS}.items():
        for gradients in ("shared", "local"):
            model = DDP(net())
            optimizer = build([*model.parameters()])
            if hasattr(optimizer, "train"):
                optimizer.train()
            scheduler = hdet.Ensemble(optimizer, model=model, spread=0.3, converge_every=3, gradients=gradients)
            with Lines() as lines:
                train(model, optimizer, scheduler, rank, 8)
                before = states(optimizer)
                train(model, optimizer, scheduler, rank, 1, first=8)
            after = states(optimizer)
            everyone = gather(bits_of(after))
            unequal = sorted({str(key[1]) for key in after if any(e.get(key) != everyone[0][key] for e in everyone)})
            results[name, gradients] = {
                "policy": scheduler.settings.given["averaging"].optimizer_state,
                "resolved": scheduler._rounds._plain_settings()["averaging.optimizer_state"],
                "unequal": unequal,
                "keys": sorted({str(key[1]) for key in before}),
                "empty": not after,
                "lines": lines,
            }
    return results


@scenario
def averaged_state(rank, world):
    """The mean of the replicas' moments, in fp32, in place; the largest of their counters."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = net().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ensemble = hdet.Ensemble(
            optimizer,
            model=model,
            spread=0.1,
            converge_every=100,
            gradients="local",
            averaging=hdet.Averaging(bucket_mib=1e-3),
        )
        for p in model.parameters():
            p.grad = torch.full_like(p, float(rank))
        optimizer.step()
        ensemble.step(1.0)
        ensemble.converge()
        generator = torch.Generator().manual_seed(rank)
        for p in model.parameters():
            state = optimizer.state[p]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(torch.rand(p.shape, generator=generator))
            state["step"].fill_(10 + rank)
        pointers = [state[key].data_ptr() for state in optimizer.state.values() for key in state]
        everyone = gather(states(optimizer))
        optimizer.zero_grad()
        with torch.no_grad():
            next(model.parameters()).add_(float(rank))
        ensemble.converge()
        after = states(optimizer)
        errors = []
        for key, value in after.items():
            theirs = torch.stack([e[key].double() for e in everyone])
            expected = theirs.amax(0) if key[1] == "step" else theirs.mean(0)
            errors.append(float(((value.double() - expected).abs() / expected.abs().clamp_min(1e-3)).max()))
        results[str(dtype)] = {
            "error": max(errors),
            "equal": len({str(e) for e in gather(bits_of(after))}) == 1,
            "in_place": pointers == [state[key].data_ptr() for state in optimizer.state.values() for key in state],
        }
    return results


@scenario
def policies(rank, world):
    """verify raises everywhere and says where; auto turns to averaging; keep and reset do what they say."""
    results = {}
    for policy in ("verify", "auto", "keep", "reset", "average"):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scheduler = hdet.Ensemble(
            optimizer, model=model, spread=0.2, converge_every=3, averaging=hdet.Averaging(optimizer_state=policy)
        )
        with Lines() as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                train(model, optimizer, scheduler, 0, 1)  # the same gradients, as was said
                train(model, optimizer, scheduler, rank, 2, first=1)  # and then each replica's own
                error = None
            except hdet.ReplicaMismatchError as raised:
                error = str(raised)
        everyone = gather(bits_of(states(optimizer)))
        results[policy] = {
            "error": error,
            "lines": lines,
            "equal": all(e == everyone[0] for e in everyone),
            "empty": not states(optimizer),
            "resolved": scheduler._rounds._plain_settings()["averaging.optimizer_state"],
        }
        if error is None:
            train(model, optimizer, scheduler, rank, 3, first=3)
            results[policy]["finite"] = all(bool(p.isfinite().all()) for p in model.parameters())
    return results


@scenario
def missing_state(rank, world):
    """A parameter that got gradients on some replicas only: the others get its state, nobody hangs; state of another
    shape is an error everywhere."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ensemble = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=2, gradients="local")
    parameters = list(model.parameters())
    for _ in range(2):
        for i, p in enumerate(parameters):
            p.grad = torch.full_like(p, 1.0 + rank) if i < 2 or rank == 1 else None
        optimizer.step()
        ensemble.step(1.0)
    after = states(optimizer)
    everyone = gather(bits_of(after))
    result = {
        "equal": all(e == everyone[0] for e in everyone),
        "parameters": sorted({i for i, _ in after}),
        "steps": [float(optimizer.state[p]["step"]) for p in parameters],
        "from_one": float(optimizer.state[parameters[3]]["exp_avg"][0]),
        "expected": 2.0 * (1 - 0.9**2),
    }
    for p in parameters:
        p.grad = torch.ones_like(p)
        if rank == 1:
            optimizer.state[p]["exp_avg"] = torch.zeros(5)
    try:
        ensemble.step(1.0)
        ensemble.converge()
        result["error"] = None
    except hdet.ReplicaMismatchError as error:
        result["error"] = str(error)
    return result


@scenario
def health(rank, world):
    """A replica whose parameters, or whose state alone, are not finite is left out of both averages and healed."""
    results = {}
    bad = world - 1
    for name, settings in {
        "local": {"gradients": "local"},
        "verify": {},
        "keep": {"gradients": "local", "averaging": hdet.Averaging(optimizer_state="keep")},
        "overlap": {"gradients": "local", "averaging": hdet.Averaging(overlap_steps=1)},
        "8-bit": {"gradients": "local"},
    }.items():
        for poison in ("parameters", "state"):
            if poison == "state" and name in ("keep", "overlap", "8-bit"):
                continue
            model = net()
            wrapped = DDP(model)
            optimizer = EightBit(model.parameters(), 0.05) if name == "8-bit" else torch.optim.Adam(model.parameters())
            reports = []
            ensemble = hdet.Ensemble(
                optimizer, model=wrapped, spread=0.2, converge_every=3, monitor=reports.append, **settings
            )
            with Lines() as lines:
                train(wrapped, optimizer, ensemble, rank, 2)
                x, y = batch(rank, 2)
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
                if rank == bad:
                    with torch.no_grad():
                        for p in model.parameters():
                            state = optimizer.state[p]
                            state["scale" if name == "8-bit" else "exp_avg"].fill_(float("nan"))
                            if poison == "parameters":
                                p.view(-1)[0] = float("nan")
                before = gather(states(optimizer))
                ensemble.step(float("nan") if rank == bad else 1.0)
                if name == "overlap":
                    train(wrapped, optimizer, ensemble, rank, 1, first=3)
            after = states(optimizer)
            everyone = gather(bits_of(after))
            good = torch.stack([before[r][0, "scale" if name == "8-bit" else "exp_avg"] for r in range(bad)])
            if name == "local":
                expected = good.double().mean(0)
            else:  # the first good replica's, for those who were bad
                expected = good[0] if rank == bad else before[rank][0, "scale" if name == "8-bit" else "exp_avg"]
            now = after[0, "scale" if name == "8-bit" else "exp_avg"]
            results[name, poison] = {
                "excluded": reports[0].excluded,
                "finite": all(bool(v.isfinite().all()) for v in after.values()),
                "models_finite": all(bool(p.isfinite().all()) for p in model.parameters()),
                "equal": all(e == everyone[0] for e in everyone),
                "error": float((now.double() - expected.double()).abs().max()),
                "losses": reports[0].losses,
                "lines": lines,
            }
    return results


@scenario
def rollbacks(rank, world):
    """All replicas bad: in the first round after a resume, and again and again."""
    reports = []

    def build():
        model = DDP(net())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer

    def attach(model, optimizer):
        return hdet.OneCycleLR(
            optimizer, 0.01, total_steps=200, model=model, spread=0.2, converge_every=3, auto_lr=True,
            cycle_momentum=False, monitor=reports.append,
        )  # fmt: skip

    first = build()
    scheduler = attach(*first)
    train(*first, scheduler, rank, 6)
    saved = copy.deepcopy([first[0].state_dict(), first[1].state_dict(), scheduler.state_dict()])
    model, optimizer = build()
    scheduler = attach(model, optimizer)
    scheduler.load_state_dict(saved[2])  # in the order that is least convenient
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0])

    def poisoned_round(first_step):
        for i in range(3):
            train(model, optimizer, scheduler, rank, 1, first=first_step + i)
            if i == 1:
                with torch.no_grad():
                    for p in model.parameters():
                        p.fill_(float("nan"))

    with Lines() as lines:
        poisoned_round(6)
    result = {
        "rolled_back": reports[-1].rolled_back,
        "gain": scheduler.ensemble.gains[0],
        "saved_gain": saved[2]["hdet"]["controller"][0][0],
        "model": all(torch.equal(model.state_dict()[k], saved[0][k]) for k in saved[0]),
        "state": all(
            torch.equal(state[key], saved[1]["state"][i][key])
            for i, state in enumerate(optimizer.state.values())
            for key in state
        ),
        "lines": lines,
    }
    count, error = 1, None
    try:
        for _ in range(20):
            poisoned_round(6 + 3 * count)
            count += 1
    except hdet.DivergedError as raised:
        error = str(raised)
    return result | {"count": count, "error": error}


def loss_of(model, data):
    return F.cross_entropy(model(data[0]), data[1])


class Batches:
    """A probe's batches that depend on the round alone."""

    def __init__(self, rank):
        self.rank, self.ensemble = rank, None

    def __iter__(self):
        while True:
            yield batch(self.rank, 10_000 + self.ensemble.round)


@scenario
def resume(rank, world):
    """Rank 0's checkpoint on every rank continues bit for bit, whatever has state; on a round's end and off it."""
    results = {}
    kinds = {
        "posterior": {"probe": True, "auto_lr": True},
        "evidence": {"probe": True, "auto_lr": True, "controller": hdet.controller.Posterior(until=0.0)},
        "hyperparameters": {"probe": True, "explored": True, "gradients": "local"},
        "local": {"gradients": "local"},
        "outer momentum": {"gradients": "local", "outer": hdet.Outer(momentum=0.5)},
        "reset": {"gradients": "local", "averaging": hdet.Averaging(optimizer_state="reset")},
    }
    for name, kind in kinds.items():

        def build(kind=kind):
            settings = dict(kind)
            model = net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
            batches = Batches(rank)
            if settings.pop("probe", False):
                settings["probe"] = hdet.Probe(loss_fn=loss_of, batches=batches)
            if settings.pop("explored", False):
                settings["hyperparameters"] = [hdet.param_group("betas[0]", spread=0.3)]
            scheduler = hdet.OneCycleLR(
                optimizer, 0.02, total_steps=40, cycle_momentum=False, model=model, spread=0.2, converge_every=4,
                **settings,
            )  # fmt: skip
            batches.ensemble = scheduler.ensemble
            return model, optimizer, scheduler

        def advance(model, optimizer, scheduler, start, stop, shared):
            for step in range(start, stop):
                x, y = batch(rank, step)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                if shared:  # not DDP: it lays its buckets anew after one step, and so sums in another order
                    for p in model.parameters():
                        dist.all_reduce(p.grad)
                        p.grad /= world
                optimizer.step()
                scheduler.step(loss)

        shared = kind.get("gradients") != "local"
        for at in (16, 18):
            if at == 18 and name in ("posterior", "reset"):
                continue  # movement counts from the resume on; each replica's state is its own inside a round
            whole, first, second = build(), build(), build()
            for run in (whole, first):
                advance(*run, 0, at, shared)
                run[2].converge()
            states_ = copy.deepcopy([part.state_dict() for part in first])
            everyone = gather([bits_of(states(first[1])), repr(states_[2])])
            box = [states_]
            dist.broadcast_object_list(box)
            for part, state in zip(second, box[0], strict=True):
                part.load_state_dict(state)
            advance(*whole, at, 32, shared)
            advance(*second, at, 32, shared)
            results[name, at] = {
                "same": all(e == everyone[0] for e in everyone),
                "model": all(
                    torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True)
                ),
                "state": bits_of(states(whole[1])) == bits_of(states(second[1])),
                "gain": (whole[2].ensemble.gains, second[2].ensemble.gains),
                "centres": (whole[2].ensemble.centres, second[2].ensemble.centres),
            }
    return results


@scenario
def precision(rank, world):
    """Rounds stay in step whatever the numbers look like, and the replicas are equal after a converge."""
    results = {}

    def finish(name, model, scheduler, **more):
        scheduler.converge()
        everyone = gather([p.detach().double().numpy().tobytes() for p in model.parameters()])
        results[name] = more | {
            "equal": all(e == everyone[0] for e in everyone),
            "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
            "steps": scheduler.ensemble.steps if hasattr(scheduler, "ensemble") else scheduler.steps,
        }

    # bfloat16 autocast, shared gradients
    model = DDP(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=4)
    for step in range(10):
        x, y = batch(rank, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    finish("autocast", model, scheduler, policy=scheduler._rounds._plain_settings()["averaging.optimizer_state"])

    # A GradScaler that skips steps on one rank only
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=4, gradients="local")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(10):
        x, y = batch(rank, step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if rank == world - 1 and step in (2, 5):
            next(model.parameters()).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        scheduler.step(loss)
        scales.append(scaler.get_scale())
    counts = gather(float(optimizer.state[next(model.parameters())]["step"]))
    finish("skipped", model, scheduler, scales=gather(scales[-1]), counts=counts)

    # bfloat16 parameters: the mean is taken in fp32, and rounded once
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.full_like(p, 1.0 + 2**-7 * rank))
    scheduler.converge()
    values = [1.0 + 2**-7 * r for r in range(world)]
    expected = torch.tensor(sum(values) / world).bfloat16()
    finish("bfloat16", model, scheduler, error=float((next(model.parameters())[0, 0].detach() - expected).abs()))

    # Gradient accumulation under no_sync
    model = DDP(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=3)
    for step in range(7):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(2):
            x, y = batch(rank, 10 * step + micro)
            with model.no_sync() if micro == 0 else warnings.catch_warnings():
                loss = F.cross_entropy(model(x), y) / 2
                loss.backward()
            total += loss.item()
        optimizer.step()
        scheduler.step(total)
    finish("accumulation", model, scheduler)

    # Two optimizers, each with a scheduler that owns the submodule it trains; and two that own the same
    for name, own in (("two optimizers", True), ("rivals", False)):
        model = net()
        wrapped = DDP(model)
        parts = (model[0], model[2])
        optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in parts]
        pair = [
            hdet.Ensemble(o, model=part if own else model, spread=0.2, converge_every=3)
            for o, part in zip(optimizers, parts, strict=True)
        ]
        with Lines() as lines:
            for step in range(9):
                x, y = batch(rank, step)
                loss = F.cross_entropy(wrapped(x), y)
                loss.backward()
                for o, ensemble in zip(optimizers, pair, strict=True):
                    o.step()
                    ensemble.step(loss)
                    o.zero_grad()
        distances = [ensemble.last_report.excluded for ensemble in pair]
        finish(name, model, pair[0], lines=lines, excluded=distances)
    return results


@scenario
def surroundings(rank, world):
    """Batch norm under DDP, SyncBatchNorm, and accelerate's stepping once per process."""
    results = {}

    class Normed(nn.Module):
        def __init__(self, norm):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 4)
            self.norm = norm

        def forward(self, x):
            return self.norm(self.inner(x))

    def warned(norm, gradients="shared", **settings):
        # On the CPU, DDP takes no SyncBatchNorm.
        model = Normed(norm) if isinstance(norm, nn.SyncBatchNorm) else DDP(Normed(norm), **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hdet.Ensemble(
                torch.optim.SGD(model.parameters(), lr=0.1), model=model, spread=0.2, converge_every=3,
                gradients=gradients,
            )  # fmt: skip
        return [str(one.message) for one in caught if "batch norm" in str(one.message) or "Batch" in str(one.message)]

    results["broadcast"] = warned(nn.BatchNorm1d(4))
    results["no broadcast"] = warned(nn.BatchNorm1d(4), broadcast_buffers=False)
    results["local"] = warned(nn.BatchNorm1d(4), gradients="local")
    results["layer norm"] = warned(nn.LayerNorm(4))
    results["sync"] = warned(nn.SyncBatchNorm(4))

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = hdet.OneCycleLR(
        optimizer, 0.01, total_steps=20, model=model, spread=0.2, converge_every=3, cycle_momentum=False
    )
    prepared = accelerator.prepare(model, optimizer, scheduler)
    x, y = batch(rank, 0)
    loss = F.cross_entropy(prepared[0](x), y)
    accelerator.backward(loss)
    prepared[1].step()
    try:
        prepared[2].step(loss)
        results["accelerate"] = None
    except RuntimeError as error:
        results["accelerate"] = str(error)
    scheduler.step(loss)  # the way out
    results["steps"] = scheduler.ensemble.steps
    return results


def main():
    dist.init_process_group("gloo")
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
