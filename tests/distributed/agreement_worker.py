"""Run in real processes: every function decorated with @scenario, one after the other, in the same process group.

What replicas must have in common when they start, what is each rank's own, and what find_lr leaves as it was.
"""

import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet

SCENARIOS = []
OUT = Path(sys.argv[1])
BEFORE = {}


def scenario(function):
    SCENARIOS.append(function)
    return function


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def run(model, steps=1, rank=0, x=None, lr=1e-2, averaged=None, **settings):
    """Train, with local gradients."""
    settings = {"model": averaged or model, "gradients": "local", "converge_every": 1} | settings
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    ensemble = hdet.Ensemble(optimizer, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + rank + step) if x is None else x).square().sum().backward()
        optimizer.step()
        ensemble.step()
    return ensemble


def loss_fn(model, x):
    return (model(x) - 1).square().mean()


def find(model, optimizer):
    return hdet.find_lr(model, optimizer, loss_fn, torch.randn(32, 8, 3), low=1e-3, high=1e-1)  # 3 candidates


@scenario
def built_before_init(rank, world):
    ensemble, optimizer, model = BEFORE["ensemble"]
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return error_of(ensemble.step)


@scenario
def find_lr_of_wrapped_models(rank, world):
    """What is found, the gradients afterwards, and whether they are those of a model that find_lr has not seen."""

    class Nested(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    wraps = {
        "plain": lambda m: DDP(m),
        "static": lambda m: DDP(m, static_graph=True),
        "compiled": lambda m: torch.compile(DDP(m), backend="eager"),
        "inside": lambda m: DDP(torch.compile(m, backend="eager")),
        "nested": lambda m: Nested(DDP(m)),
        "deep": lambda m: torch.compile(Nested(nn.Sequential(torch.compile(DDP(m), backend="eager"))), backend="eager"),
    }
    results = {}
    for name, wrap in wraps.items():
        gradients = []
        for looks in (False, True):
            inner = linear()
            model = wrap(inner)
            optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
            torch.manual_seed(rank)
            found = find(model, optimizer).lrs if looks else None
            seen = []
            for step in range(3):
                loss_fn(model, torch.full((2, 3), 1.0 + rank + step)).backward()
                seen.append(inner.weight.grad.tolist())
                optimizer.zero_grad()
            gradients.append(seen)
        results[name] = {"found": found, "equal": gradients[0] == gradients[1], "gradients": gradients[1]}
    return results


@scenario
def find_lr_of_sync_batch_norm(rank, world):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    found = find(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return found.lrs, type(model[1]).__name__


@scenario
def find_lr_fails_on_one_rank(rank, world):
    model = linear()

    def unlucky(m, x):
        if rank == 1 and m.training and torch.is_grad_enabled():
            raise KeyError("out of luck")
        return loss_fn(m, x)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return error_of(lambda: hdet.find_lr(model, optimizer, unlucky, torch.randn(32, 8, 3)))


@scenario
def find_lr_by_way_of_the_ddp_module(rank, world):
    model = DDP(linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return error_of(lambda: hdet.find_lr(model, optimizer, lambda m, x: loss_fn(model, x), torch.randn(32, 8, 3)))


class Experts(nn.Module):
    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.expert = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("queue", torch.full((2,), float(rank)))
        nn.init.constant_(self.expert.weight, 10.0 + rank)

    def forward(self, x):
        return self.expert(self.dense(x))


@scenario
def what_is_each_ranks_own(rank, world):
    results = {}
    for name in ("patterns", "prefixed", "module", "tensors", "ignored by DDP", "outside"):
        model = Experts(rank)
        given = {
            "patterns": ["expert.*", "queue"],
            "prefixed": ["module.expert.*", "module.queue"],
            "module": [model.expert, "queue"],
            "tensors": [*model.expert.parameters(), model.queue],
        }.get(name, [])
        settings = {"exclude": given, "spread": 0.3}
        if name == "ignored by DDP":
            DDP._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight", "expert.bias", "queue"])
            settings["averaged"] = DDP(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if name == "outside":
                settings["averaged"] = model.dense
            ensemble = run(model, 2, rank, lr=1e-6, **settings)
        buffer = ensemble.optimizer.state[model.expert.weight]["momentum_buffer"]
        results[name] = {
            "expert": model.expert.weight.tolist(),
            "queue": model.queue.tolist(),
            "momentum": buffer.tolist(),
            "dense": model.dense.weight.tolist(),
            "warnings": [str(w.message) for w in caught],
        }
    return results


@scenario
def unequal_starts(rank, world):
    results = {"error": error_of(lambda: run(linear(seed=rank), rank=rank))}
    broadcast = linear(seed=rank)
    ensemble = run(broadcast, 2, rank, broadcast=True)
    state = ensemble.optimizer.state[broadcast.weight]["momentum_buffer"]
    results["broadcast"] = broadcast.weight.tolist(), state.tolist()
    noisy = linear()
    hdet.warm_noisy_start(noisy, 0.1)
    results["noisy"] = noisy.weight.tolist(), error_of(lambda: run(noisy, rank=rank)), noisy.weight.tolist()

    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = linear(), nn.BatchNorm1d(3)
            self.register_buffer("mask", torch.full((2,), float(rank)))

        def forward(self, x):
            return self.inner(self.norm(x))

    results["buffer"] = error_of(lambda: run(WithBuffer(), x=torch.randn(4, 3)))
    return results


@scenario
def loaded_after_it_was_built(rank, world):
    """Weights that are loaded late are what is compared, and so are those loaded for a resume."""
    model = linear(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ensemble = hdet.Ensemble(optimizer, model=model, gradients="local", converge_every=2)
    model.load_state_dict(linear(seed=3).state_dict())

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 3), 1.0 + rank)).square().sum().backward()
            optimizer.step()
            ensemble.step()

    errors = [error_of(lambda: train(2))]
    state = ensemble.state_dict()
    ensemble.load_state_dict(state)
    errors.append(error_of(lambda: train(2)))
    ensemble.load_state_dict(state)
    model.load_state_dict(linear(seed=rank).state_dict())
    errors.append(error_of(lambda: train(1)))
    return errors


@scenario
def gradients_that_do_not_fit(rank, world):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ensemble = hdet.Ensemble(optimizer, model=model, spread=0.1, converge_every=4)
    model(torch.full((2, 3), 1.0 + rank)).sum().backward()
    optimizer.step()
    return error_of(ensemble.step)


@scenario
def a_view_of_a_weight(rank, world):
    model = linear()
    model.tied = nn.Parameter(model.weight.data[:, :2])
    return error_of(lambda: run(model))


@scenario
def frozen_on_one_rank_later(rank, world):
    """At a later converge, in words."""
    model = linear()
    ensemble = run(model, 1, rank)
    if rank == 1:
        model.bias.requires_grad_(False)

    def train():
        model(torch.ones(2, 3)).sum().backward()
        ensemble.optimizer.step()
        ensemble.step()

    return error_of(train)


def main():
    torch.set_num_threads(1)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    BEFORE["ensemble"] = hdet.Ensemble(optimizer, model=model, converge_every=4), optimizer, model
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for function in SCENARIOS:
        try:
            result = function(rank, world)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        (OUT / f"{function.__name__}.{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
