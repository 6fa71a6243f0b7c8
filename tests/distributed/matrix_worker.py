"""Run in 4 real processes: features under strategies, where the other workers do not combine them.

As in worker.py, a scenario returns plain values; what it must do is said in the test that reads it.
"""

import contextlib
import copy
import dataclasses
import sys
from pathlib import Path

import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import hdet

SCENARIOS = []
OUT = Path(sys.argv[1])
MESH = None
T = 4  # a round's length


def scenario(function):
    SCENARIOS.append(function)
    return function


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def shard(model):
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def batch(replica, step):
    generator = torch.Generator().manual_seed(1000 * step + replica)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(model, data):
    return F.cross_entropy(model(data[0]), data[1])


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensors):
    return [local(tensor).detach().double().numpy().tobytes() for tensor in tensors]


def reshard(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def model_bits(model):
    reshard(model)
    return bits(model.state_dict().values())


def state_bits(optimizer):
    return [bits(state[key] for key in sorted(state)) for state in optimizer.state.values()]


class Batches:
    """A probe's batches that depend on the round alone; ``count`` of them in each."""

    def __init__(self, rank, count=1):
        self.rank, self.count, self.ensemble = rank, count, None

    def __iter__(self):
        while True:
            for k in range(self.count):
                yield batch(self.rank * self.count + k, 10_000 + self.ensemble.round)


class Run:
    """A model, its optimizer and its scheduler under one strategy; ``members`` ranks to a replica."""

    def __init__(self, strategy, rank, *, probe=True, explored=False, **settings):
        self.strategy, self.rank, self.count, self.members = strategy, rank, 1, 1
        wrap = DDP
        if strategy == "local":
            settings["gradients"] = "local"
        elif strategy == "grouped":
            settings |= {"gradients": "grouped", "replicas": 2}
            self.members = 2
        elif strategy == "hsdp":
            wrap, self.members = shard, 2
            settings["replicas"] = MESH["replicate"]
        elif strategy == "virtual":
            settings["virtual_replicas"] = self.count = 2
        self.model = wrap(net())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, weight_decay=0.1)
        batches = Batches(rank, self.count)
        if probe:
            settings["probe"] = hdet.Probe(loss_fn=loss_of, batches=batches, held_out=True)
        if explored:
            settings["hyperparameters"] = [hdet.param_group("weight_decay", spread=0.5)]
            settings["exploration"] = hdet.Exploration(controller=hdet.controller.OneSlope(threshold=0))
            if strategy == "grouped":  # it acts through the gradient
                dropout = hdet.module_attribute(self.model, nn.Dropout, "p", spread=0.1)
                settings["hyperparameters"].append(dropout)
        self.reports = []
        self.scheduler = hdet.OneCycleLR(
            self.optimizer, 0.02, total_steps=40, cycle_momentum=False, model=self.model, spread=0.3, converge_every=T,
            auto_lr=True, monitor=self.reports.append, **settings,
        )  # fmt: skip
        batches.ensemble = self.ensemble = self.scheduler.ensemble
        self.parts = (self.model, self.optimizer, self.scheduler)
        self.step = 0

    def backward(self, scale=1.0):
        """Gradients of one step; the losses of this process's replicas."""
        torch.manual_seed(1000 * self.step + self.rank)  # dropout's, which no checkpoint here keeps
        self.optimizer.zero_grad()
        losses = []
        data = [batch(self.rank * self.count + k, self.step) for k in range(self.count)]
        for one in self.scheduler.each(data):
            accumulates = len(losses) < self.count - 1
            with self.model.no_sync() if accumulates else contextlib.nullcontext():
                loss = scale * loss_of(self.model, one)
                (loss / self.count).backward()
            losses.append(loss.item())
        return losses if self.count > 1 else losses[0]

    def train(self, until, scale=1.0):
        while self.step < until:
            loss = self.backward(scale)
            self.optimizer.step()
            self.step += 1
            self.scheduler.step(loss)

    def warm_up(self):
        """DDP lays its buckets anew after one backward pass, and sums in another order from then on."""
        for _ in range(2):
            loss_of(self.model, batch(self.rank, 0)).backward()
        self.optimizer.zero_grad()

    def finish(self):
        """Whether all ranks that hold the same part are equal after a converge, and what was there before."""
        reshard(self.model)
        before = gather(model_bits(self.model))
        self.scheduler.converge()
        after = gather(model_bits(self.model))
        # Under HSDP ranks 0 and 2 hold one shard, 1 and 3 the other.
        pairs = [(0, 2), (1, 3)] if self.strategy == "hsdp" else [(0, 1), (1, 2), (2, 3)]
        return {
            "apart": before[0] != before[2],
            "equal": all(after[a] == after[b] for a, b in pairs),
            "finite": all(bool(local(p).isfinite().all()) for p in self.model.parameters()),
        }


@scenario
def hyperparameters(rank, world):
    """What every rank holds in every round, beside what the reports say."""
    results = {}
    for strategy in ("ddp", "grouped", "hsdp"):
        run = Run(strategy, rank, explored=True)
        held = []
        dropout = next(m for m in run.model.modules() if isinstance(m, nn.Dropout))
        for until in range(T, 10 * T, T):
            run.train(until - 1)
            held.append([run.optimizer.param_groups[0]["weight_decay"], dropout.p])
            run.train(until)
        rounds = [[dataclasses.asdict(h) for h in report.hyperparameters] for report in run.reports]
        run.train(run.step + 2)
        results[strategy] = run.finish() | {
            "held": held,
            "rounds": rounds,
            "centres": list(run.ensemble.centres.values()),
            "replica": rank // run.members,
        }
    return results


@scenario
def probe(rank, world):
    run = Run("grouped", rank)
    run.train(22)
    return run.finish() | {
        "gains": [report.next_gain[0] for report in run.reports],
        "slopes": [tuple(report.probe) for report in run.reports],
    }


@scenario
def rollback(rank, world):
    """One round's loss is 1000 times too large, on one rank."""
    results = {}
    for strategy, probed in (("local", False), ("grouped", True), ("virtual", True)):
        run = Run(strategy, rank, probe=probed)
        run.train(12)
        gain, converged, moments = run.ensemble.gains[0], model_bits(run.model), state_bits(run.optimizer)
        run.train(15, scale=1e3 if rank == 2 else 1.0)
        left = model_bits(run.model) != converged
        run.train(16, scale=1e3 if rank == 2 else 1.0)
        result = {
            "rolled_back": [report.rolled_back for report in run.reports],
            "left": left,
            "parameters": model_bits(run.model) == converged,
            "optimizer_state": state_bits(run.optimizer) == moments,
            "gains": (gain, run.reports[-1].next_gain[0], run.ensemble.gains[0]),
        }
        run.train(22)
        results[strategy] = result | run.finish() | {"again": [report.rolled_back for report in run.reports[4:]]}
    return results


@scenario
def overlap(rank, world):
    published = hdet.controller.Published()
    run = Run("grouped", rank, probe=False, averaging=hdet.Averaging(overlap_steps=2), controller=published)

    def parameters():
        return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])

    run.train(T)
    sent = gather(parameters())
    run.train(T + 1)
    loss = run.backward()
    run.optimizer.step()
    run.step += 1
    expected = parameters() + (sent[0] + sent[2]) / 2 - sent[rank]
    correction = float((expected - parameters()).abs().max())
    run.scheduler.step(loss)
    late = float((parameters() - expected).abs().max())
    run.train(9)  # the second round's average is under way
    before = gather(parameters())
    landed = len(run.reports)
    result = run.finish()
    error = float((parameters() - (before[0] + before[2]) / 2).abs().max())
    return result | {
        "error": error,
        "correction": correction,
        "late": late,
        "landed": landed,
        "in_all": len(run.reports),
    }


@scenario
def optimizer_state(rank, world):
    results = {}
    run = Run("grouped", rank, probe=False)
    run.train(2 * T - 1)
    loss = run.backward()
    run.optimizer.step()
    before = gather([state["exp_avg"].double().clone() for state in run.optimizer.state.values()])
    run.scheduler.step(loss)
    after = [state["exp_avg"].double() for state in run.optimizer.state.values()]
    expected = [torch.stack([before[r][i] for r in (0, 2)]).mean(0) for i in range(len(after))]
    results["grouped"] = {
        "policy": run.ensemble._rounds._plain_settings()["averaging.optimizer_state"],
        "members_equal": bits(before[0]) == bits(before[1]) and bits(before[2]) == bits(before[3]),
        "apart": max(float((a - b).abs().max()) for a, b in zip(before[0], before[2], strict=True)),
        "error": max(float((a - e).abs().max()) for a, e in zip(after, expected, strict=True)),
        "equal": all(other == state_bits(run.optimizer) for other in gather(state_bits(run.optimizer))),
    }
    run = Run("virtual", rank, averaging=hdet.Averaging(optimizer_state="verify"))
    run.train(2 * T)
    equal = all(other == state_bits(run.optimizer) for other in gather(state_bits(run.optimizer)))
    if rank == 3:
        next(iter(run.optimizer.state.values()))["exp_avg"].view(-1)[0] += 1e-3
    try:
        run.train(3 * T)
        error = None
    except hdet.ReplicaMismatchError as raised:
        error = str(raised)
    results["virtual"] = {"equal": equal, "converges": len(run.reports), "error": error}
    return results


@scenario
def resume(rank, world):
    """Rank 0's checkpoint on every rank, saved after a converge at a round's end and off it."""
    results = {}
    for strategy in ("grouped", "virtual"):
        for at in (16, 18):
            evidence = hdet.controller.Posterior(until=0.0)  # movement counts from a resume on
            whole = Run(strategy, rank, controller=evidence)
            whole.train(at)
            whole.scheduler.converge()
            saved = copy.deepcopy([part.state_dict() for part in whole.parts])
            kept = gather([model_bits(whole.model), state_bits(whole.optimizer), repr(saved[2])])
            box = [saved]
            dist.broadcast_object_list(box)
            reports = len(whole.reports)
            whole.train(32)

            again = Run(strategy, rank, controller=evidence)
            again.warm_up()
            for part, state in zip(again.parts, box[0], strict=True):
                part.load_state_dict(state)
            again.step = at
            started = model_bits(again.model)
            again.train(32)
            results[strategy, at] = {
                "same": all(one == kept[0] for one in kept),
                "moved": started != model_bits(again.model),
                "model": model_bits(whole.model) == model_bits(again.model),
                "state": state_bits(whole.optimizer) == state_bits(again.optimizer),
                "gains": (whole.ensemble.gains, again.ensemble.gains),
                "slopes": [repr([tuple(r.probe) for r in list_]) for list_ in (whole.reports[reports:], again.reports)],
            }
    return results


def main():
    global MESH
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
