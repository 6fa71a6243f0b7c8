"""Run in 4 real processes: sharded models (FSDP2) with torch.distributed.checkpoint, and through accelerate."""

import copy
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent))
import frameworks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from frameworks import are_equal, batch, error_of, gather, loss_of, net, told
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import hdet
from hdet.integrations.accelerate import attach
from hdet.integrations.dcp import Checkpointed
from hdet.integrations.transformers import attach as attach_to_trainer
from hdet.integrations.transformers import loss_of as loss_of_trainer

SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def full(model):
    return torch.cat([p.full_tensor().double().flatten() for p in model.parameters()])


class App:
    """Model, optimizer and scheduler, as torchtitan saves them: one Stateful each."""

    def __init__(self, mesh, reports=None, build=hdet.OneCycleLR, **more):
        self.model = net()
        for layer in self.model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        settings = {"spread": 0.3, "converge_every": 4, "auto_lr": True, "total_steps": 16, "model": self.model}
        if build is hdet.OneCycleLR:
            settings |= {"max_lr": 0.02}
        probe = hdet.Probe(loss_fn=loss_of, batches=[batch(dist.get_rank() // 2, 900)])
        settings |= {"probe": probe, "monitor": (reports if reports is not None else []).append}
        self.scheduler = build(self.optimizer, replicas=mesh["replicate"], **settings | more)

    def train(self, first, steps):
        for step in range(first, steps):
            loss = loss_of(self.model, batch(dist.get_rank(), step))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step(loss)
            self.optimizer.zero_grad()

    def save(self, path):
        self.scheduler.converge()
        dcp.save({"app": self, "scheduler": Checkpointed(self.scheduler)}, checkpoint_id=path)

    def load(self, path):
        dcp.load({"app": self, "scheduler": Checkpointed(self.scheduler)}, checkpoint_id=path)

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def structure(state):
    """Keys, types, shapes and placements, on every rank."""
    leaves = {
        f"{name}.{key}": (type(t).__name__, tuple(t.shape), str(getattr(t, "placements", "")))
        for name, of in state.items()
        if name != "plain"
        for key, t in of.items()
    }
    return {**leaves, "plain": type(state["plain"]).__name__}


def averages(app):
    return {f"{name}.{key}": t for name, of in Checkpointed(app.scheduler).gathered().items() if name != "plain"
            for key, t in of.items()}  # fmt: skip


@scenario
def saves_and_loads(rank, folder):
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    kinds = {
        "one cycle": {},
        "ensemble": {"build": hdet.Ensemble},
        "outer": {"gradients": "local", "outer": hdet.Outer(momentum=0.5), "probe": None, "auto_lr": False},
    }
    for name, more in kinds.items():
        path = str(folder / name)
        reports, again = [], []
        app = App(mesh, reports, **more)
        before = structure(Checkpointed(app.scheduler).state_dict())
        app.train(0, 10)
        app.save(path)
        state = Checkpointed(app.scheduler).state_dict()
        kept = averages(app)
        app.train(10, 16)
        other = App(mesh, again, **more)
        with torch.no_grad():
            next(other.model.parameters()).zero_()
        other.load(path)
        loaded = averages(other)
        other.train(10, 16)
        found[name] = {
            "equal": torch.equal(full(app.model), full(other.model)),
            "structure": before == structure(state),
            "structures": len({repr(one) for one in gather(structure(state))}),
            "plain": len(set(gather(state["plain"]))),
            "kinds": sorted({of[0] for of in structure(state).values()}),
            "averages": kept.keys() == loaded.keys() and all(torch.equal(kept[key], loaded[key]) for key in kept),
            "not zero": all(bool(t.any()) for t in kept.values()) and bool(kept),
            "reports": told(again) == told(r for r in reports if r.step > 10),
        }
    return found


@scenario
def another_number_of_shards(rank, folder):
    """Two shards each, then four replicas of one, and one replica of four."""
    found = {}
    app = App(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    app.train(0, 10)
    app.save(str(folder))
    kept, whole, gains = averages(app), full(app.model), app.scheduler.ensemble.gains
    for shape in ((4, 1), (1, 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = App(init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
        other.load(str(folder))
        loaded = averages(other)
        found[shape] = {
            "averages": all(torch.equal(kept[key], loaded[key]) for key in kept),
            "weights": torch.equal(whole, full(other.model)),
            "gains": other.scheduler.ensemble.gains == gains,
            "step": other.scheduler.ensemble.steps,
        }
        other.train(10, 16)
        other.scheduler.converge()
        found[shape]["equal"] = are_equal(full(other.model))
        found[shape]["end"] = other.scheduler.ensemble.steps
    return found


@scenario
def a_head_that_only_one_member_holds(rank, folder):
    """A weight and a bias of one row each: the other member has two empty shards."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reports = []

    def loss_fn(model, data):
        return model(data[0]).square().mean()

    ensemble = hdet.Ensemble(
        optimizer, model=model, replicas=mesh["replicate"], spread=0.3, converge_every=2, total_steps=8, auto_lr=True,
        probe=hdet.Probe(loss_fn=loss_fn, batches=[batch(rank // 2, 900)]), monitor=reports.append,
    )  # fmt: skip
    for step in range(8):
        loss = loss_fn(model, batch(rank, step))
        loss.backward()
        optimizer.step()
        ensemble.step(loss)
        optimizer.zero_grad()
    path = str(folder)
    dcp.save({"scheduler": Checkpointed(ensemble)}, checkpoint_id=path)
    kept = Checkpointed(ensemble).gathered()
    dcp.load({"scheduler": Checkpointed(ensemble)}, checkpoint_id=path)
    again = Checkpointed(ensemble).gathered()
    return {
        "movement": [report.movement for report in reports],
        "empty": min(p.to_local().numel() for p in model.parameters()) == 0,
        "kept": all(torch.equal(t, again["slow_trail"][name]) for name, t in kept["slow_trail"].items()),
        "shapes": {name: tuple(t.shape) for name, t in kept["slow_trail"].items()},
    }


@scenario
def refusals(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    app = App(mesh)
    app.train(0, 5)
    app.scheduler.converge()
    saved = Checkpointed(app.scheduler).gathered()
    without = App(mesh, probe=None)
    wider = copy.deepcopy(saved)
    wider["slow_average"]["0.weight"] = torch.zeros(9, 6)
    lost = copy.deepcopy(saved)
    del lost["slow_trail"]["2.bias"]
    steps = without.scheduler.ensemble.steps
    return {
        "kind": error_of(Checkpointed, torch.optim.lr_scheduler.LambdaLR(app.optimizer, lambda step: 1.0)),
        "no probe": error_of(Checkpointed(without.scheduler).load_state_dict, saved),
        "wider": error_of(Checkpointed(app.scheduler).load_state_dict, wider),
        "lost": error_of(Checkpointed(app.scheduler).load_state_dict, lost),
        "plain": error_of(Checkpointed(app.scheduler).load_state_dict, {"plain": 1}),
        "unchanged": (steps, without.scheduler.ensemble.steps),
    }


def shard_by(accelerator):
    """accelerate shards for FSDP2 on GPUs only; here its state says by hand that it does."""
    parallelism = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, cpu_offload=False
    )
    state = accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin, state.parallelism_config = plugin, parallelism
    state.device_mesh = parallelism.build_device_mesh("cpu")


@scenario
def through_accelerate(rank, folder):
    def make():
        accelerator = Accelerator(cpu=True)
        shard_by(accelerator)
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        probe = hdet.Probe(loss_fn=loss_of, batches=[batch(rank // 2, 900)])
        scheduler = attach(
            accelerator, hdet.OneCycleLR, optimizer, 0.02, 12, model=model, spread=0.3, converge_every=4,
            auto_lr=True, probe=probe, replicas=accelerator.torch_device_mesh["dp_replicate"],
        )  # fmt: skip
        return accelerator, model, optimizer, scheduler

    def train(accelerator, model, optimizer, scheduler, first, steps, save=None):
        for step in range(first, steps):
            loss = loss_of(model, batch(rank, step))
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step(loss)
            optimizer.zero_grad()
            if step + 1 == save:
                accelerator.save_state(str(folder / "state"))
        scheduler.converge()

    first = make()
    train(*first, 0, 12, save=6)
    second = make()
    with torch.no_grad():
        next(second[1].parameters()).zero_()
    second[0].load_state(str(folder / "state"))
    kept = len(second[3].state_dict()["slow_average"])
    train(*second, 6, 12)
    return {
        "equal": torch.equal(full(first[1]), full(second[1])),
        "same on all": are_equal(full(first[1])),
        "kept": kept,
        "sharded": all(isinstance(p, DTensor) for p in first[1].parameters()),
    }


class Model(nn.Module):
    """For the Trainer: its inputs are numbers of batches."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, number):
        loss = loss_of(self.net, batch(dist.get_rank(), int(number[0])))
        return {"loss": loss, "logits": torch.zeros(len(number), 1)}


@scenario
def through_the_trainer(rank, folder):
    def make(path):
        arguments = TrainingArguments(
            output_dir=str(path), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=1, max_steps=12,
            save_strategy="steps", save_steps=6, report_to=[], disable_tqdm=True, learning_rate=0.02,
            remove_unused_columns=False, dataloader_pin_memory=False, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(Model(), arguments, train_dataset=[{"number": i} for i in range(64)])
        shard_by(trainer.accelerator)
        trainer.is_fsdp_enabled = True
        probe = hdet.Probe(loss_fn=loss_of_trainer(trainer), batches=[{"number": torch.tensor([900])}])
        mesh = trainer.accelerator.torch_device_mesh
        settings = {"spread": 0.3, "converge_every": 4, "auto_lr": True, "replicas": mesh["dp_replicate"]}
        attach_to_trainer(trainer, probe=probe, **settings)
        return trainer

    first = make(folder / "a")
    first.train()
    second = make(folder / "b")
    second.train(resume_from_checkpoint=str(folder / "a" / "checkpoint-6"))
    return {
        "equal": torch.equal(full(first.model), full(second.model)),
        "same on all": are_equal(full(first.model)),
        "sharded": all(isinstance(p, DTensor) for p in first.model.parameters()),
        "steps": (first.hdet.scheduler.steps, second.hdet.scheduler.steps),
    }


def main():
    warnings.simplefilter("ignore")
    frameworks.run(SCENARIOS)


if __name__ == "__main__":
    main()
