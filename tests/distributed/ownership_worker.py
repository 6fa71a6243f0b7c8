"""Scenarios of who owns the optimizer and the model, run in real processes. Usage: ownership_worker.py OUT"""

import copy
import logging
import sys
import warnings
from pathlib import Path

import scenarios
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import lr_scheduler as torch_lr
from torch.optim.swa_utils import SWALR

import hdet

OUT = Path(sys.argv[1])
SCENARIOS = []
SPREAD = {"spread": 0.3, "converge_every": 4}


def scenario(function):
    SCENARIOS.append(function)
    return function


def build(lr=0.01, kind=torch.optim.SGD, groups=1, unused=False, **more):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    given = [{"params": [model.weight]}, {"params": [model.bias]}] if groups == 2 else model.parameters()
    return model, DDP(model, find_unused_parameters=unused), kind(given, lr=lr, **more)


def train(model, optimizer, scheduler, steps, batches=None):
    for step in range(steps):
        x = torch.ones(2, 3) if batches is None else batches(step)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def own_batches(rank):
    def batch(step):
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * step + rank))

    return batch


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def error_of(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("hdet").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


@scenario
def shared_tensor(rank, world):
    _, ddp, optimizer = build(torch.tensor(0.1), torch.optim.AdamW, groups=2)
    ensemble = hdet.Ensemble(optimizer, None, model=ddp, **SPREAD)
    at_start = rates(optimizer), ensemble.multipliers()[rank]
    train(ddp, optimizer, ensemble, 5)
    return {"start": at_start, "later": (rates(optimizer), ensemble.multipliers()[rank])}


@scenario
def by_hand(rank, world):
    writes = {
        "x": lambda lr: 1e-4,
        "y": lambda lr: lr * 0.5,
        "third": lambda lr: lr / 3,
        "digits": lambda lr: 3.14159e-3,
    }
    schedules = {
        "constant": lambda optimizer: None,
        "chained": lambda optimizer: torch_lr.ExponentialLR(optimizer, 0.9),
        "closed": lambda optimizer: lambda step: 0.9**step,
    }
    found = {}
    for is_tensor in (False, True):
        for at in (1, 3, 4):  # inside a round, at its last step, after its end
            for write, change in writes.items():
                for name, make in schedules.items():
                    _, ddp, optimizer = build(torch.tensor(0.01) if is_tensor else 0.01)
                    ensemble = hdet.Ensemble(optimizer, make(optimizer), model=ddp, **SPREAD)
                    train(ddp, optimizer, ensemble, at)
                    base = float(ensemble.get_base_lr()[0])
                    for group in optimizer.param_groups:
                        new = change(float(group["lr"]))
                        if is_tensor:
                            group["lr"].fill_(new)
                        else:
                            group["lr"] = new
                    train(ddp, optimizer, ensemble, 1)
                    soon = float(ensemble.get_base_lr()[0])
                    train(ddp, optimizer, ensemble, 4)
                    later = float(ensemble.get_base_lr()[0])
                    own = rates(optimizer)[0] / ensemble.multipliers()[rank]
                    found[is_tensor, at, write, name] = base, soon, later, own
    return found


@scenario
def a_shared_tensor_by_hand(rank, world):
    """Halved by hand just before a round ends: each replica has rounded another number."""
    found = []
    for k in range(12):
        _, ddp, optimizer = build(torch.tensor(0.1), groups=2)
        peak = 0.05 * (1 + k / 7)
        scheduler = hdet.OneCycleLR(optimizer, peak, 100, cycle_momentum=False, model=ddp, **SPREAD)
        every = SPREAD["converge_every"]
        train(ddp, optimizer, scheduler, every - 1)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        found.append(error_of(lambda: train(ddp, optimizer, scheduler, every + 1)))  # noqa: B023
    return found


@scenario
def by_hand_unlike(rank, world):
    errors = []
    for new in (1.0 if rank == 0 else None, 1.0 + rank):
        _, ddp, optimizer = build()
        ensemble = hdet.Ensemble(optimizer, None, model=ddp, **SPREAD)
        train(ddp, optimizer, ensemble, 1)
        if new is not None:
            optimizer.param_groups[0]["lr"] = new
        errors.append(error_of(lambda: train(ddp, optimizer, ensemble, 4)))  # noqa: B023
    return errors


@scenario
def after_the_last_converge(rank, world):
    """A run that ends, and one that another scheduler takes over after converge()."""
    _, ddp, optimizer = build()
    scheduler = hdet.OneCycleLR(optimizer, 0.01, 6, model=ddp, cycle_momentum=False, **SPREAD)
    train(ddp, optimizer, scheduler, 6)
    scheduler.converge()
    ended = rates(optimizer), scheduler.ensemble.get_base_lr()
    train(ddp, optimizer, None, 3)
    after = weights(ddp)

    model, ddp, optimizer = build()
    scheduler = hdet.OneCycleLR(optimizer, 0.01, 21, model=ddp, cycle_momentum=False, **SPREAD)
    train(ddp, optimizer, scheduler, 16)
    scheduler.converge()
    swa = SWALR(optimizer, 0.02, anneal_epochs=5)
    train(ddp, optimizer, swa, 10)
    saved = optimizer.state_dict()["param_groups"][0]["lr"]
    return {"ended": ended, "after": after, "swa": (weights(model), rates(optimizer), saved)}


@scenario
def converge_changes_nothing_else(rank, world):
    """Evaluating more often leaves a run as it is, learning rates put aside and all."""
    runs = []
    for is_tensor in (False, True):
        for evaluates in (False, True):
            _, ddp, optimizer = build(torch.tensor(0.01) if is_tensor else 0.01, torch.optim.SGD, weight_decay=0.1)
            decay = hdet.param_group("weight_decay", spread=0.5, move=False, regularises=False)
            scheduler = hdet.Ensemble(
                optimizer, torch_lr.ExponentialLR(optimizer, 0.9), model=ddp, hyperparameters=[decay], **SPREAD
            )
            seen = []
            for _ in range(3):
                train(ddp, optimizer, scheduler, 4)
                seen.append(scheduler.get_last_lr())
                if evaluates:
                    scheduler.converge()
                    seen[-1] = scheduler.get_last_lr()
                    scheduler.converge()
                    assert rates(optimizer) == [float(lr) for lr in scheduler.get_base_lr()]
                    assert abs(optimizer.param_groups[0]["weight_decay"] - 0.1) < 1e-12
                    saved = optimizer.state_dict()["param_groups"][0]
                    assert float(saved["lr"]) == rates(optimizer)[0]
            runs.append((weights(ddp), [float(lr[0]) for lr in seen], rates(optimizer)))
    return runs


@scenario
def closing(rank, world):
    found = {}
    # By hand, twice; local gradients are synchronised again, and hooks are gone.
    _, ddp, optimizer = build()
    dropped = hdet.module_attribute(nn.Sequential(dropout := nn.Dropout(0.2)), nn.Dropout, "p", spread=0.1, move=False)
    scheduler = hdet.Ensemble(optimizer, None, model=ddp, gradients="local", hyperparameters=[dropped], **SPREAD)
    train(ddp, optimizer, scheduler, 3, own_batches(rank))
    found["apart"] = weights(ddp)
    scheduler.close()
    scheduler.close()
    found["together"] = weights(ddp)
    found["dropout"] = dropout.p
    found["rates"] = rates(optimizer)
    found["errors"] = [
        error_of(scheduler.step),
        error_of(lambda: list(scheduler.each([1]))),
        error_of(lambda: scheduler.load_state_dict(scheduler.state_dict())),
    ]
    found["converge"] = scheduler.converge()
    found["hooks"] = len(optimizer._optimizer_state_dict_post_hooks) + len(optimizer._optimizer_step_pre_hooks)
    train(ddp, optimizer, None, 3, own_batches(rank))
    found["synchronised"] = weights(ddp)
    found["written"] = error_of(scheduler.converge)

    # A later ensemble's local gradients are not switched off by an earlier one's close().
    _, ddp, optimizer = build()
    first = hdet.Ensemble(optimizer, None, model=ddp, gradients="local", **SPREAD)
    second = hdet.Ensemble(optimizer, None, model=ddp, gradients="local", **SPREAD)
    first.close()
    found["second"] = ddp.require_backward_grad_sync, rates(optimizer)[0] / second.multipliers()[rank]
    second.close()
    found["both"] = ddp.require_backward_grad_sync

    # A with block, and one that an exception ends on one rank only: nothing is sent.
    _, ddp, optimizer = build()
    with hdet.OneCycleLR(
        optimizer, 0.01, 20, model=ddp, cycle_momentum=False, gradients="local", **SPREAD
    ) as scheduler:
        train(ddp, optimizer, scheduler, 6, own_batches(rank))
    found["with"] = weights(ddp), rates(optimizer), error_of(scheduler.step)
    if rank == 0:
        local = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(local.parameters(), 0.01)
        try:
            with hdet.Ensemble(optimizer, None, model=local, gradients="local", **SPREAD) as scheduler:
                scheduler._rounds.steps = 1  # as if it had begun, which would send
                raise KeyError("here")
        except KeyError:
            found["failed"] = rates(optimizer), error_of(scheduler.step)
    return found


@scenario
def next_ensemble(rank, world):
    """Built in the middle of another's round, or after its state: begins from the base, not from the replica's rate."""
    _, ddp, optimizer = build(weight_decay=0.1)
    decay = [hdet.param_group("weight_decay", spread=0.5, move=False, regularises=False)]
    first = hdet.Ensemble(optimizer, torch_lr.ExponentialLR(optimizer, 0.5), model=ddp, hyperparameters=decay, **SPREAD)
    train(ddp, optimizer, first, 4)
    first.converge()
    decay = [hdet.param_group("weight_decay", spread=0.5, move=False, regularises=False)]
    second = hdet.Ensemble(optimizer, None, model=ddp, hyperparameters=decay, **SPREAD)
    train(ddp, optimizer, second, 4)
    return second.get_base_lr(), rates(optimizer)[0] / second.multipliers()[rank], second.centres


@scenario
def resumed_warm_up(rank, world):
    def start():
        _, ddp, optimizer = build()
        warm_up = torch_lr.LinearLR(optimizer, 0.1, 1.0, 6)
        both = torch_lr.SequentialLR(optimizer, [warm_up, torch_lr.CosineAnnealingLR(optimizer, 10)], [6])
        return ddp, optimizer, hdet.Ensemble(optimizer, both, model=ddp, **SPREAD)

    found = {}
    for at in (4, 5, 6, 7):
        ddp, optimizer, ensemble = start()
        train(ddp, optimizer, ensemble, at)
        ensemble.converge()
        saved = copy.deepcopy((ddp.state_dict(), optimizer.state_dict(), ensemble.state_dict()))
        uninterrupted = []
        for _ in range(6):
            train(ddp, optimizer, ensemble, 1)
            uninterrupted.append(rates(optimizer)[0])
        for order in ("mo", "om"):
            ddp, optimizer, ensemble = start()
            ddp.load_state_dict(saved[0])
            for part in order:
                if part == "o":
                    optimizer.load_state_dict(saved[1])
                else:
                    ensemble.load_state_dict(copy.deepcopy(saved[2]))
            resumed = []
            for _ in range(6):
                train(ddp, optimizer, ensemble, 1)
                resumed.append(rates(optimizer)[0])
            found[at, order] = uninterrupted, resumed
    return found


@scenario
def inference(rank, world):
    results = []
    for evaluates in (False, True):
        _, ddp, optimizer = build(torch.tensor(0.01), torch.optim.AdamW)
        ensemble = hdet.Ensemble(optimizer, None, model=ddp, **SPREAD)
        for _ in range(5):
            train(ddp, optimizer, ensemble, 2)
            if evaluates:
                with torch.inference_mode():
                    ensemble.converge()
                    ddp.module(torch.ones(2, 3))
                    ensemble.state_dict()
            else:
                ensemble.converge()
        results.append(weights(ddp))
    return results


@scenario
def loaded(rank, world):
    """Weights loaded in the middle of a run are what the next round begins from."""
    found = {}
    new = {"weight": torch.full((1, 3), 50.0), "bias": torch.zeros(1)}

    def load(ddp, how):
        if how == "load_state_dict":
            ddp.module.load_state_dict(new)
        else:
            with torch.no_grad():
                for name, p in ddp.module.named_parameters():
                    p.copy_(new[name])

    for how in ("load_state_dict", "in place"):
        for settings in (
            {"outer": hdet.Outer(momentum=0.9, lr=0.7)},
            {"averaging": hdet.Averaging(wire_dtype="bfloat16")},
        ):
            ends = []
            for rounds in (3, 0):
                _, ddp, optimizer = build()
                ensemble = hdet.Ensemble(optimizer, None, model=ddp, gradients="local", converge_every=4, **settings)
                train(ddp, optimizer, ensemble, 4 * rounds, own_batches(rank))
                load(ddp, how)
                train(ddp, optimizer, ensemble, 4, own_batches(rank))
                ends.append(weights(ddp))
            found[how, next(iter(settings))] = ends
    return found


@scenario
def frozen(rank, world):
    """Parameters frozen and released while a run goes on: the same number of elements, other ones."""
    torch.manual_seed(0)
    found = {}
    for settings in ({"outer": hdet.Outer(momentum=0.9, lr=0.7)}, {"averaging": hdet.Averaging(wire_dtype="bfloat16")}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        with torch.no_grad():
            model[1].weight.add_(100)
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        ensemble = hdet.Ensemble(optimizer, None, model=model, gradients="local", converge_every=2, **settings)
        model[1].requires_grad_(False)
        train(model, optimizer, ensemble, 6, own_batches(rank))
        before = weights(model)
        model[0].requires_grad_(False)
        model[1].requires_grad_(True)
        for p in model[0].parameters():
            p.grad = None
        train(model, optimizer, ensemble, 6, own_batches(rank))
        moved = [(a - b).abs().max().item() for a, b in zip(weights(model), before, strict=True)]
        found[next(iter(settings))] = moved, weights(model)
    return found


@scenario
def virtual(rank, world):
    found = {}
    batch = torch.ones(2, 3)

    def visit(scheduler, ddp):
        points = []
        for x in scheduler.each([batch, batch]):
            points.append([p.detach().clone() for p in ddp.module.parameters()])
            ddp(x).square().mean().backward()
        return points

    def start():
        _, ddp, optimizer = build(unused=True)
        return (
            ddp,
            optimizer,
            hdet.OneCycleLR(
                optimizer, 0.5, 40, model=ddp, spread=0.5, converge_every=4, virtual_replicas=2, cycle_momentum=False
            ),
        )

    new = {"weight": torch.full((1, 3), 9.0), "bias": torch.zeros(1)}
    for at in (0, 1, 4, 5):  # before the first step, inside a round, at its start
        ddp, optimizer, scheduler = start()
        for _ in range(at):
            visit(scheduler, ddp)
            optimizer.step()
            scheduler.step()
        ddp.module.load_state_dict(new)
        found["load", at] = visit(scheduler, ddp)
    ddp, optimizer, scheduler = start()
    state = copy.deepcopy(scheduler.state_dict())
    scheduler.load_state_dict(state)
    ddp.module.load_state_dict(new)
    found["load", "after the state"] = visit(scheduler, ddp)

    ddp, optimizer, scheduler = start()
    ddp.module.bias.requires_grad_(False)
    for step in range(7):
        if step == 2:
            ddp.module.bias.requires_grad_(True)
        optimizer.zero_grad()
        found["release", step] = visit(scheduler, ddp)
        optimizer.step()
        scheduler.step()
    return found


@scenario
def state_in_groups(rank, world):
    import dadaptation
    import prodigyopt
    import schedulefree

    kinds = {
        "Prodigy": (prodigyopt.Prodigy, 1.0, "d"),
        "DAdaptAdam": (dadaptation.DAdaptAdam, 1.0, "d"),
        "DAdaptSGD": (dadaptation.DAdaptSGD, 1.0, "d"),
        "AdamWScheduleFree": (schedulefree.AdamWScheduleFree, 0.01, "lr_max"),
        "SGDScheduleFree": (schedulefree.SGDScheduleFree, 0.01, "weight_sum"),
    }
    found = {}
    for name, (kind, lr, key) in kinds.items():
        for policy in ("auto", "reset", "keep"):
            if policy == "reset" and name != "Prodigy":
                continue
            _, ddp, optimizer = build(lr, kind)
            if hasattr(optimizer, "train"):
                optimizer.train()
            averaging = hdet.Averaging(optimizer_state=policy)
            ensemble = hdet.Ensemble(optimizer, None, model=ddp, spread=0.1, converge_every=4, averaging=averaging)
            inside = None
            for step in range(8):
                (ddp(own_batches(rank)(step)) - 1).square().mean().backward()
                optimizer.step()
                if step == 6:
                    inside = float(optimizer.param_groups[0][key])
                ensemble.step()
                optimizer.zero_grad()
            groups = [
                {k: v for k, v in group.items() if isinstance(v, (int, float))} for group in optimizer.param_groups
            ]
            found[name, policy] = inside, float(optimizer.param_groups[0][key]), groups, weights(ddp)
    return found


@scenario
def refused(rank, world):
    from accelerate import Accelerator
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    found = {}
    model, ddp, plain = build()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    for make in (hdet.Ensemble, lambda *a, **k: hdet.OneCycleLR(a[0], 0.3, 20, **k)):
        found.setdefault("zero", []).append((error_of(lambda: make(zero, None, model=ddp, **SPREAD)), rates(zero)))  # noqa: B023
    hdet.OneCycleLR(zero, 0.3, 20, cycle_momentum=False)  # torch's
    post = PostLocalSGDOptimizer(plain, None)
    found["post"] = error_of(lambda: hdet.Ensemble(post, None, model=ddp, **SPREAD)), rates(plain)

    model, ddp, plain = build()
    ensemble = hdet.Ensemble(plain, None, model=ddp, **SPREAD)

    def joined():
        with ddp.join():
            train(ddp, plain, ensemble, 3)

    found["join"] = error_of(joined)

    model = nn.Linear(3, 1)
    prepared, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters(), 0.1))
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, model=prepared, cycle_momentum=False, **SPREAD)
    train(prepared, optimizer, scheduler, 5)
    found["accelerate"] = (
        rates(optimizer)[0] / float(scheduler.ensemble.get_base_lr()[0]),
        (scheduler.ensemble.multipliers()[rank]),
    )
    scheduler.close()
    inner = torch_lr.StepLR(optimizer, 3)  # on the wrapper
    found["accelerate schedule"] = error_of(lambda: hdet.Ensemble(optimizer, inner, model=prepared, **SPREAD))
    return found


@scenario
def saving_apart(rank, world):
    """state_dict() between converges says what lets the replicas differ."""
    found = {}
    for name, settings in {
        "learning rates": {"spread": 0.1},
        "weight_decay": {
            "hyperparameters": [hdet.param_group("weight_decay", spread=0.1, move=False, regularises=False)]
        },
        "their own gradients": {"gradients": "local"},
        "nothing": {},
    }.items():
        _, ddp, optimizer = build(weight_decay=0.1)
        scheduler = hdet.OneCycleLR(optimizer, 0.01, 20, model=ddp, converge_every=4, cycle_momentum=False, **settings)
        train(ddp, optimizer, scheduler, 2)
        log = Log()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.state_dict()
        logging.getLogger("hdet").removeHandler(log)
        found[name] = [str(w.message) for w in caught], [w.filename for w in caught], log.lines
        scheduler.close()
    return found


def main():
    dist.init_process_group("gloo")
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
