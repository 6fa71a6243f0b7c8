"""Run in real processes: what the tests of test_deepspeed.py read, with the real DeepSpeed on 2 replicas x 2 shards."""

import functools
import itertools
import os
import sys
from pathlib import Path

import deepspeed
import scenarios
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hdet
from hdet.integrations.deepspeed import ReplicaGroups, attach, load_checkpoint, save_checkpoint, weights_of

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of a minute

OUT = Path(sys.argv[1])
SCENARIOS = []
KINDS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def scenario(function):
    SCENARIOS.append(function)
    return function


def gather(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Net(nn.Module):
    """With a buffer, a frozen parameter, and parameters on both sides of ZeRO 3's persistence threshold."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)
        self.frozen = nn.Parameter(torch.randn(16), requires_grad=False)
        self.register_buffer("scale", torch.rand(3) + 0.5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) + 0.1 * self.frozen) * self.scale.to(x.dtype)


def net(seed):
    torch.manual_seed(seed)
    return Net()


def config(stage, precision, **more):
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        settings["bf16"] = {"enabled": True}
    if precision == "fp16":
        settings |= {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 8}}
    if precision == "bf16+fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings | more


def start(stage, precision, groups, seed=0, optimizer=torch.optim.AdamW, forget=True, **more):
    if forget:
        deepspeed.utils.groups.mpu = None  # an engine without groups would take those of the one before
    model = net(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = optimizer(trained, lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=inner, model_parameters=trained, config=config(stage, precision, **more), mpu=groups
    )
    return engine


def dtype_of(engine):
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else torch.float32


def batch(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(model, data, dtype=torch.float32):
    x, y = data
    return F.cross_entropy(model(x.to(dtype)).float(), y)


def train(engine, rank, steps, with_loss=True, factor=1.0):
    losses = []
    for step in steps:
        loss = factor * loss_of(engine, batch(rank, step), dtype_of(engine))
        engine.backward(loss)
        engine.step(lr_kwargs={"loss": loss} if with_loss else None)
        losses.append(loss.item())
    return losses


def masters(engine):
    return [tensor.detach().clone() for tensor, trained in weights_of(engine).tensors() if trained]


def full(engine):
    """Every parameter as the optimizer's fp32 masters hold it, whole: by DeepSpeed's own accounting."""
    whole = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters(p, enabled=hasattr(p, "ds_id")):
                whole[name] = p.detach().float().clone()
        elif engine.zero_optimization_stage() > 0:
            whole[name] = deepspeed.utils.safe_get_full_fp32_param(p).detach().float().clone()
        elif hasattr(engine.optimizer, "fp32_groups"):
            pairs = zip(engine.optimizer.fp16_groups[0], engine.optimizer.fp32_groups[0], strict=True)
            whole[name] = next(m for copy, m in pairs if copy is p).detach().clone()
        else:
            whole[name] = p.detach().clone()
    return whole


@scenario
def stages(rank, world):
    groups = ReplicaGroups(2)
    results = {}
    for stage, precision in [*KINDS, (1, "bf16+fp32")]:
        engine = start(stage, precision, groups, seed=rank)
        scheduler = attach(engine, hdet.OneCycleLR, max_lr=0.05, total_steps=12, spread=0.3, converge_every=4)
        at_start = gather({name: t.tolist() for name, t in [*full(engine).items(), *engine.module.named_buffers()]})
        rates = []
        for step in range(3):
            rates.append(scheduler.get_last_lr()[0])
            train(engine, rank, [step])
        rates.append(engine.optimizer.param_groups[0]["lr"])
        before = gather(full(engine))
        scheduler.converge()
        after = full(engine)
        mean = {name: (before[0][name] + before[2][name]) / 2 for name in after}
        reference = net(0)
        reference.load_state_dict({**mean, "scale": engine.module.scale.float()})
        reference.to(dtype_of(engine))
        data = batch(9, 9)
        engine.eval()
        with torch.no_grad():
            ours, theirs = (loss_of(model, data, dtype_of(engine)).item() for model in (engine, reference))
            direct = loss_of(engine.module, data, dtype_of(engine)).item()
        engine.train()
        train(engine, rank, [3])
        end = gather([t.tolist() for t in masters(engine)])
        results[stage, precision] = {
            "optimizer": type(engine.optimizer).__name__,
            "equal_at_start": all(values == at_start[0] for values in at_start),
            "rates": rates,
            "parted": max((before[0][name] - before[2][name]).abs().max().item() for name in mean),
            "error": max((after[name] - mean[name]).abs().max().item() for name in mean),
            "losses": (ours, theirs, direct),
            "equal_at_round_end": end[rank % 2] == end[2 + rank % 2],
            "steps": scheduler.ensemble.steps,
            "last_rate": scheduler.get_last_lr()[0],
        }
        engine.destroy()
    return results


def message(function, *args, **kwargs):
    """What it raises, and on what occasion."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}", repr(error.__context__)
    return "", ""


def attached(stage, precision, groups, seed=0, optimizer=torch.optim.AdamW, **settings):
    engine = start(stage, precision, groups, seed=seed, optimizer=optimizer)
    settings = {"max_lr": 0.05, "total_steps": 12, "spread": 0.3, "converge_every": 3} | settings
    return engine, attach(engine, hdet.OneCycleLR, **settings)


@scenario
def guards(rank, world):
    results = {}
    results["replicas"] = message(ReplicaGroups, 3)
    engine = start(1, "fp32", None)
    results["whole_world"] = message(attach, engine, hdet.OneCycleLR, max_lr=0.1, total_steps=9, spread=0.3)
    plain = attach(engine, hdet.OneCycleLR, max_lr=0.1, total_steps=9)
    train(engine, rank, range(3))
    results["spread_0"] = (not hasattr(plain, "ensemble"), plain.get_last_lr())
    results["twice"] = message(attach, engine, hdet.OneCycleLR, max_lr=0.1, total_steps=9)
    engine.destroy()

    engine = start(0, "fp32", None, seed=rank)  # every rank is a replica, and gradients are shared
    scheduler = attach(engine, hdet.OneCycleLR, max_lr=0.1, total_steps=9, spread=0.3, converge_every=3)
    train(engine, rank, range(2))
    rates, moments = gather(scheduler.get_last_lr()), gather(engine.basic_optimizer.state_dict()["state"][0]["exp_avg"])
    before = gather(full(engine))
    train(engine, rank, [2])
    results["shared"] = {
        "rates": rates,
        "moments_equal": all(torch.equal(m, moments[0]) for m in moments),
        "parted": (before[0]["first.weight"] - before[3]["first.weight"]).abs().max().item(),
        "equal": len({str({k: v.tolist() for k, v in w.items()}) for w in gather(full(engine))}) == 1,
    }
    engine.destroy()

    groups = ReplicaGroups(2)
    engine = start(0, "fp32", groups)
    results["auto"] = message(attach, engine, hdet.OneCycleLR, "auto", total_steps=9, spread=0.3)
    results["model"] = message(attach, engine, hdet.OneCycleLR, max_lr=1, total_steps=9, model=engine.module)
    for value in ("average", "verify", "reset"):
        settings = {
            "total_steps": 9,
            "spread": 0.3,
            "converge_every": 3,
            "averaging": hdet.Averaging(optimizer_state=value),
        }
        results[f"optimizer_state={value}"] = message(attach, engine, hdet.OneCycleLR, max_lr=1, **settings)
    for name, value in {"gradients": "shared", "virtual_replicas": 2}.items():
        results[name] = message(attach, engine, hdet.OneCycleLR, max_lr=1, total_steps=9, spread=0.3, **{name: value})
    results["engine"] = message(attach, engine.module, hdet.OneCycleLR, max_lr=1, total_steps=9)
    engine.destroy()
    engine = start(3, "fp32", groups)
    settings = {"total_steps": 9, "spread": 0.3, "auto_lr": True, "per_group": True, "probe": probe_loss}
    results["per_group"] = message(attach, engine, hdet.OneCycleLR, max_lr=1, **settings)
    engine.destroy()
    engine = start(0, "fp32", None, forget=False)
    results["left_over"] = message(attach, engine, hdet.OneCycleLR, max_lr=1, total_steps=9, spread=0.3)
    engine.destroy()
    return results


@scenario
def losses(rank, world):
    """What the engine passes to step(): the loss, nothing, and its batch size after a TypeError inside."""
    results = {}
    engine, scheduler = attached(0, "fp32", ReplicaGroups(2), auto_lr=True)
    results["given"] = train(engine, rank, range(3))
    results["seen"] = scheduler.ensemble.last_report.losses
    train(engine, rank, range(3), with_loss=False)
    results["without"] = (scheduler.ensemble.steps, scheduler.ensemble.last_report.complete)
    loss = loss_of(engine, batch(rank, 7))
    engine.backward(loss)
    results["int"] = message(engine.step, lr_kwargs={"loss": "1.5"})
    results["steps_after_int"] = scheduler.ensemble.steps
    engine.destroy()
    return results


@scenario
def skipped(rank, world):
    """Replica 1's gradients are NaN at one step: DeepSpeed skips it there, and does not step the scheduler."""
    results = {}
    groups = ReplicaGroups(2)
    for stage, precision in [(1, "fp32"), (3, "bf16"), (1, "fp16")]:
        if precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            continue
        engine, scheduler = attached(stage, precision, groups)
        applied = []
        for step in range(6):
            loss = loss_of(engine, batch(rank, step), dtype_of(engine))
            engine.backward(loss * (float("nan") if step == 1 and rank >= 2 else 1.0))
            engine.step(lr_kwargs={"loss": loss})
            applied.append(engine.was_step_applied())
        values = gather([t.tolist() for t in masters(engine)])
        results[stage, precision] = {
            "applied": applied,
            "steps": scheduler.ensemble.steps,
            "equal": values[rank % 2] == values[2 + rank % 2],
            "excluded": scheduler.ensemble.last_report.excluded,
        }
        engine.destroy()
    return results


@scenario
def resume(rank, world):
    results = {}
    groups = ReplicaGroups(2)
    for stage, precision in [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]:
        directory = OUT / f"checkpoint{stage}{precision}"
        probing = {"auto_lr": True, "probe": hdet.Probe(loss_fn=probe_loss, batches=itertools.repeat(batch(rank, 50)))}
        engine, scheduler = attached(stage, precision, groups, **probing)
        nothing = load_checkpoint(engine, directory)
        train(engine, rank, range(4))
        save_checkpoint(engine, directory, client_state={"seen": 4})
        train(engine, rank, range(4, 9))
        whole = [t.tolist() for t in masters(engine)], [t.tolist() for t in full(engine).values()]
        rates, state = scheduler.get_last_lr(), scheduler.state_dict()
        engine.destroy()

        engine, scheduler = attached(stage, precision, groups, seed=5 + rank, **probing)
        client_state = load_checkpoint(engine, directory)
        train(engine, rank, range(4, 9))
        results[stage, precision] = {
            "nothing": nothing,
            "client_state": (client_state["seen"], "lr_scheduler" in client_state),
            "masters": [t.tolist() for t in masters(engine)] == whole[0],
            "full": [t.tolist() for t in full(engine).values()] == whole[1],
            "rates": rates == scheduler.get_last_lr(),
            "state": str(state) == str(scheduler.state_dict()),
            "steps": (engine.global_steps, scheduler.ensemble.steps),
            "saved_rates": saved_rates(directory),
            "base_lr": state["hdet"]["found_schedule"],
            "latest": (directory / "latest").read_text(),
            "slow_average": len(state["hdet"]["slow_average"]),
        }
        if stage == 0:
            save_checkpoint(engine, OUT / "objects", client_state={"seen": Runs(OUT / "has_run")})
            try:
                load_checkpoint(engine, OUT / "objects")
                refused = ""
            except ValueError as error:
                refused = str(error)
            has_run = (OUT / "has_run").exists()
            dist.barrier()
            load_checkpoint(engine, OUT / "objects", weights_only=False)
            results["objects"] = (refused, has_run, (OUT / "has_run").exists())
        engine.destroy()
    return results


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.makedirs, (str(self.folder), 0o777, True)


def probe_loss(model, data):
    return loss_of(model, data, next(p.dtype for p in model.parameters()))


def saved_rates(directory):
    """Learning rates in the optimizer states of both replicas' files."""
    rates = {}
    for path in sorted(directory.glob("replica*/*/*.pt")):
        for groups in find(torch.load(path, weights_only=False), "param_groups"):
            rates[str(path.relative_to(directory))] = [group["lr"] for group in groups]
    return rates


def find(tree, key):
    """Every value under ``key`` in nested dicts."""
    if not isinstance(tree, dict):
        return []
    return ([tree[key]] if key in tree else []) + [found for value in tree.values() for found in find(value, key)]


@scenario
def probe(rank, world):
    """The probe's points are written to the masters, and the loss function sees them through the module."""
    results = {}
    groups = ReplicaGroups(2)
    for stage, precision in [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]:
        seen = []

        def loss_fn(model, data, seen=seen):
            loss = probe_loss(model, data)
            seen.append(loss.item())
            return loss

        batches = [batch(rank, 100 + i) for i in range(3)]
        # By the probe alone: under ZeRO 1 and 2 there are no matrices, and other movements than under ZeRO 3.
        by_the_probe = hdet.controller.Posterior(until=0.0)
        settings = {"auto_lr": True, "probe": hdet.Probe(loss_fn=loss_fn, batches=batches), "controller": by_the_probe}
        engine, scheduler = attached(stage, precision, groups, max_lr=1e-3, total_steps=60, **settings)
        train(engine, rank, range(24))
        results[stage, precision] = {
            "seen": seen,
            "probe": scheduler.ensemble.last_report.probe,
            "gain": scheduler.ensemble.gains[0],
            "rate": scheduler.get_last_lr()[0],
            "first_weight": full(engine)["first.weight"].tolist(),
        }
        engine.destroy()
    return results


FEATURES = [(1, "bf16"), (3, "fp32")]


def before_each_step(engine):
    """The masters, each time when the optimizer has stepped and the scheduler has not."""
    seen = []
    scheduler = engine.lr_scheduler
    step = scheduler.step

    def recorded(*args, **kwargs):
        seen.append(masters(engine))
        return step(*args, **kwargs)

    scheduler.step = recorded
    return seen


def moments(engine):
    """Adam's first, whole: by DeepSpeed's own accounting."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return [deepspeed.utils.safe_get_full_optimizer_state(p, "exp_avg").detach().float().clone() for p in trained]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def mean_of_replicas(tensors, rank):
    every = gather(tensors)
    return [(a + b) / 2 for a, b in zip(every[rank % 2], every[2 + rank % 2], strict=True)]


def distance(one, other):
    return max(((a - b).abs().max().item() for a, b in zip(one, other, strict=True)), default=0.0)


def are_equal(engine, rank):
    """Whether the replicas' masters are, and whether the module computes with them, rounded."""
    reference = net(0)
    reference.load_state_dict({**full(engine), "scale": engine.module.scale.float()})
    reference.to(dtype_of(engine))
    engine.eval()
    with torch.no_grad():
        ours, theirs = (loss_of(model, batch(9, 9), dtype_of(engine)).item() for model in (engine.module, reference))
    engine.train()
    every = gather([t.tolist() for t in masters(engine)])
    return every[rank % 2] == every[2 + rank % 2], abs(ours - theirs) <= 1e-7


@scenario
def rollback(rank, world):
    results = {}
    groups = ReplicaGroups(2)
    for stage, precision in FEATURES:
        engine, scheduler = attached(stage, precision, groups, auto_lr=True, total_steps=30)
        train(engine, rank, range(6))
        good, state, gain = masters(engine), moments(engine), scheduler.ensemble.gains[0]
        train(engine, rank, [6, 7], factor=1e3)
        parted = distance(masters(engine), good)
        train(engine, rank, [8], factor=1e3)
        report = scheduler.ensemble.last_report
        results[stage, precision] = {
            "parted": parted,
            "rolled_back": report.rolled_back,
            "masters": same(masters(engine), good),
            "moments": same(moments(engine), state),
            "equal": are_equal(engine, rank),
            "gain": (gain, report.next_gain[0], scheduler.ensemble.gains[0]),
        }
        train(engine, rank, range(9, 12))
        after = scheduler.ensemble.last_report
        results[stage, precision]["after"] = after.rolled_back, after.gain[0], are_equal(engine, rank)
        engine.destroy()
    return results


@scenario
def overlap(rank, world):
    results = {}
    groups = ReplicaGroups(2)
    for stage, precision in FEATURES:
        engine, scheduler = attached(stage, precision, groups, averaging=hdet.Averaging(overlap_steps=1))
        stepped = before_each_step(engine)
        train(engine, rank, range(3))
        sent = masters(engine)
        mean = mean_of_replicas(sent, rank)
        train(engine, rank, [3])
        landed = [own + (m - s) for own, m, s in zip(stepped[3], mean, sent, strict=True)]
        late = are_equal(engine, rank)
        error = distance(masters(engine), landed)
        train(engine, rank, range(4, 6))
        scheduler.converge()  # with an average under way
        results[stage, precision] = {
            "untouched": same(stepped[2], sent),
            "parted": distance(sent, mean),
            "error": error,
            "late": late,
            "converged": are_equal(engine, rank),
        }
        train(engine, rank, range(6, 8))
        scheduler.converge()
        results[stage, precision]["converged_inside"] = are_equal(engine, rank)
        engine.destroy()
    return results


@scenario
def hyperparameters(rank, world):
    results = {}
    groups = ReplicaGroups(2)
    adam = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    for stage, precision, spread in [(1, "bf16", 0.0), (3, "fp32", 0.3), (3, "fp32", 0.0)]:
        reports, applied = [], []
        settings = {
            "hyperparameters": [hdet.param_group("weight_decay", spread=0.5)],
            "probe": hdet.Probe(loss_fn=probe_loss, batches=[batch(rank, 100 + i) for i in range(3)], held_out=True),
            "monitor": reports.append,
            "spread": spread,
            "total_steps": 60,
        }
        engine, _ = attached(stage, precision, groups, optimizer=adam, **settings)

        def before(optimizer, *_, applied=applied):
            applied.append({group["weight_decay"] for group in optimizer.param_groups})

        engine.basic_optimizer.register_step_pre_hook(before)
        by_round = []
        for first in range(0, 24, 3):
            applied.clear()
            train(engine, rank, range(first, first + 3))
            by_round.append(set.union(*applied))
        results[stage, precision, spread] = {
            "applied": by_round,
            "reported": [report.hyperparameters[0].values for report in reports],
            "centres": [report.hyperparameters[0].next_centre for report in reports],
            "effects": [report.hyperparameters[0].effect for report in reports],
            "equal": are_equal(engine, rank),
        }
        engine.destroy()
    return results


@scenario
def outer_momentum(rank, world):
    """Against the recurrence, computed from what the replicas' masters were before each round's end."""
    results = {}
    groups = ReplicaGroups(2)
    mu, nu = 0.5, 0.8
    for stage, precision in FEATURES:
        settings = {"gradients": "local", "averaging": hdet.Averaging()}
        engine, _ = attached(stage, precision, groups, **settings, spread=0)  # Local SGD, with nothing explored
        train(engine, rank, range(2))
        local = [are_equal(engine, rank)]
        train(engine, rank, [2])
        local.append(are_equal(engine, rank))
        engine.destroy()

        engine, _ = attached(stage, precision, groups, **settings)
        train(engine, rank, range(9))
        plain, state = masters(engine), gather(moments(engine))
        engine.destroy()

        engine, _ = attached(stage, precision, groups, **settings, outer=hdet.Outer(momentum=mu, lr=nu))
        stepped = before_each_step(engine)
        errors, equal = [], []
        for end in (3, 6, 9):
            train(engine, rank, range(end - 3, end))
            mean = mean_of_replicas(stepped[-1], rank)
            if end == 3:
                anchor, velocity = mean, [torch.zeros_like(m) for m in mean]
            else:
                moved = [a - m for a, m in zip(anchor, mean, strict=True)]
                velocity = [mu * v + d for v, d in zip(velocity, moved, strict=True)]
                anchor = [a - nu * (d + mu * v) for a, d, v in zip(anchor, moved, velocity, strict=True)]
            errors.append(distance(masters(engine), anchor))
            equal.append(are_equal(engine, rank))
        results[stage, precision] = {
            "errors": errors,
            "equal": equal,
            "from_plain": distance(masters(engine), plain),
            "local": local,
            "moments_kept": not same(state[0], state[2]) and same(state[0], state[1]),
        }
        engine.destroy()
    return results


def main():
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    scenarios.run(SCENARIOS, OUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
