"""Scenarios of optimizer state, health, precision and guards, run by torchrun. Usage: state_worker.py OUT"""

import copy
import logging
import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path

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
                "policy": scheduler.config.optimizer_state,
                "resolved": scheduler._settings()["optimizer_state"],
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
            optimizer, model=model, spread=0.1, converge_every=100, gradients="local", bucket_mib=1e-3
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
        scheduler = hdet.Ensemble(optimizer, model=model, spread=0.2, converge_every=3, optimizer_state=policy)
        with Lines() as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradients are local, and nobody said so
            try:
                train(model, optimizer, scheduler, rank, 3)
                error = None
            except hdet.ReplicaMismatchError as raised:
                error = str(raised)
        everyone = gather(bits_of(states(optimizer)))
        results[policy] = {
            "error": error,
            "lines": lines,
            "equal": all(e == everyone[0] for e in everyone),
            "empty": not states(optimizer),
            "resolved": scheduler._settings()["optimizer_state"],
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
        "keep": {"gradients": "local", "optimizer_state": "keep"},
        "overlap": {"gradients": "local", "overlap_steps": 1},
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


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    only = os.environ.get("HDET_SCENARIOS", "").split(",") if os.environ.get("HDET_SCENARIOS") else None
    for function in SCENARIOS:
        if only and function.__name__ not in only:
            continue
        try:
            torch.manual_seed(0)
            result = function(rank, world)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others are in a collective: torchrun ends them
        (OUT / f"{function.__name__}.{rank}.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
