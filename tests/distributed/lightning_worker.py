"""Run in 2 real processes: hdet.integrations.lightning under Lightning's own trainer."""

import logging
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
import frameworks
import lightning.pytorch as L
import torch
import torch.distributed as dist
from frameworks import are_equal, batch, error_of, flat, gather, loss_of, net, plain_loop, told
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import hdet
from hdet.integrations.lightning import HDET, training_step

SCENARIOS = []
STEPS = 24


def scenario(function):
    SCENARIOS.append(function)
    return function


class Module(L.LightningModule):
    """Batches are numbers, by which each rank draws its data."""

    def __init__(self, schedule=None):
        super().__init__()
        self.net, self.schedule, self.seen = net(), schedule, []

    def forward(self, x):
        return self.net(x)

    def data(self, numbers):
        number = int(numbers[0])  # of a resumed epoch Lightning would begin with the first
        return batch(
            int(os.environ["RANK"]), number if number >= 900 else self.trainer.fit_loop.epoch_loop.total_batch_idx
        )

    def training_step(self, numbers, index):
        loss = loss_of(self, self.data(numbers))
        self.log("loss", loss)
        return loss

    def probe_loss(self, numbers):
        self.log("never", 1.0)
        return loss_of(self, self.data(numbers))

    def validation_step(self, numbers, index):
        if not self.trainer.sanity_checking:
            self.seen.append((self.trainer.global_step, flat(self.net)))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


class Recorder(L.Callback):
    """The learning rate that each optimizer step takes."""

    def __init__(self):
        self.lrs = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])


class Numbers(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(dict(metrics))


def loader(first, count):
    return DataLoader(range(first, first + count), batch_size=1)


def trainer(folder, *callbacks, strategy=None, **options):
    options = {"max_steps": STEPS, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy or DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip


def settings(**more):
    return {"max_lr": 0.02, "spread": 0.3, "converge_every": 4, "auto_lr": True, **more}


def probe(loss_fn=training_step):
    return hdet.Probe(loss_fn=loss_fn, batches=loader(900, 1))


@scenario
def equals_the_plain_loop(rank, folder):
    """With a probe, and a validation every 5 batches in the middle of rounds."""
    found = {}
    kinds = {"training_step": training_step, "method": Module.probe_loss, "bf16": training_step, "no probe": None}
    for name, loss_fn in kinds.items():
        precision = "bf16" if name == "bf16" else None
        own = {} if loss_fn is None else {"probe": probe(loss_fn)}
        plain = {} if loss_fn is None else {"probe": frameworks.probe(rank, precision)}
        reports, recorder, logger = [], Recorder(), Numbers()
        module = Module()
        callback = HDET(hdet.OneCycleLR, **settings(monitor=reports.append, **own))
        trainer(
            folder, callback, recorder, logger=logger, val_check_interval=5, num_sanity_val_steps=1,
            precision="bf16-mixed" if precision else "32-true",
        ).fit(module, loader(0, STEPS), loader(0, 1))  # fmt: skip
        expected = plain_loop(
            rank, STEPS, converge_at=(5, 10, 15, 20), precision=precision, spread=0.3, converge_every=4, auto_lr=True,
            **plain,
        )  # fmt: skip
        gains = [metrics["hdet/gain"] for metrics in logger.logged if "hdet/gain" in metrics]
        found[name] = {
            "weights": torch.equal(flat(module.net), expected[0]),
            "lrs": recorder.lrs == expected[1],
            "reports": told(reports) == expected[2],
            "probed": [r.probe.raw for r in reports],
            "gains": gains,
            "keys": sorted({key for metrics in logger.logged for key in metrics}),
            "seen": [step for step, _ in module.seen],
            "equal": all(are_equal(weights) for _, weights in module.seen),
        }
    return found, gather(recorder.lrs)


@scenario
def resumes(rank, folder):
    """Accumulation, clipping, bf16 and local gradients; saved in the middle of a round, and of an epoch."""
    found = {}
    for name, more in {"shared": {"probe": Module.probe_loss}, "local": {"gradients": "local"}}.items():
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
        reports = []

        def make(path, every, reports=reports, more=more, options=options, **rest):
            saver = ModelCheckpoint(dirpath=path, every_n_train_steps=every, save_top_k=-1, filename="{step}")
            callback = HDET(hdet.OneCycleLR, **settings(monitor=reports.append, **more))
            made = trainer(folder, callback, saver, enable_checkpointing=True, max_epochs=2, **(options | rest))
            return made, callback, Module()

        whole, first, module = make(folder / name, 7)
        # Two epochs of 13 steps, the last of one micro-batch.
        whole.fit(module, loader(0, 25))
        count = len(reports)
        again, second, resumed = make(folder / f"{name} again", 7)
        with torch.no_grad():
            resumed.net[0].weight.zero_()
        again.fit(resumed, loader(0, 25), ckpt_path=folder / name / "step=7.ckpt")
        saved = torch.load(folder / name / "step=7.ckpt", weights_only=False)
        found[name] = {
            "equal": torch.equal(flat(module.net), flat(resumed.net)),
            "same on all": are_equal(flat(module.net)),
            "reports": told(reports[count:]) == told(r for r in reports[:count] if r.step > 7),
            "steps": (first.scheduler.ensemble.steps, second.scheduler.ensemble.steps, again.global_step),
            "saved": are_equal(torch.cat([t.flatten().double() for t in saved["state_dict"].values()])),
            "key": HDET().state_key in saved["callbacks"],
            "gains": (first.scheduler.ensemble.gains, second.scheduler.ensemble.gains),
        }
        if name == "shared":
            plain = plain_loop(
                rank, STEPS, accumulate=2, until=4, clip=0.1, precision="bf16", spread=0.3, converge_every=4,
                auto_lr=True,
            )  # fmt: skip
            found["first round"] = plain[2][0] == told(reports)[0]
    return found


class Saver(L.Callback):
    """Saves weights alone in the middle of a round; in the middle of another one everything fails."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 6:
            self.apart = not are_equal(flat(module.net))
            trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
            self.equal, self.weight = are_equal(flat(module.net)), module.net[0].weight.detach().clone()
        if trainer.global_step == 10:
            raise KeyError("the disk is gone")


@scenario
def saves_one_model(rank, folder):
    saver, sent = Saver(folder), []
    callback = HDET(hdet.OneCycleLR, **settings(monitor=sent.append))
    made = trainer(folder, callback, saver, OnExceptionCheckpoint(folder), enable_checkpointing=True)
    try:
        made.fit(Module(), loader(0, STEPS))
        error = None
    except KeyError as found:
        error = str(found)
    file = torch.load(folder / "weights.ckpt", weights_only=False)["state_dict"]["net.0.weight"]
    return {
        "error": error,
        "apart": saver.apart,
        "equal": saver.equal,
        "in the file": torch.equal(file, saver.weight),
        "at the error": torch.load(folder / "on_exception.ckpt", weights_only=False)["global_step"],
        "converged": [report.step for report in sent],
        "put back": "save_checkpoint" not in vars(made),
    }


@scenario
def writes_its_report(rank, folder):
    """Where the logger writes, where a JsonLines of the user's does, and nowhere without either."""
    places = {name: folder / "report" / name for name in ("logger", "own", "none")}
    own = hdet.JsonLines(places["own"] / "rounds.jsonl")
    for name, logger, monitor in (
        ("logger", CSVLogger(places["logger"], name="", version=""), None), ("own", False, own), ("none", False, None),
    ):  # fmt: skip
        callback = HDET(hdet.OneCycleLR, **settings(monitor=monitor))
        trainer(places[name], callback, logger=logger, enable_checkpointing=False).fit(Module(), loader(0, STEPS))
    dist.barrier()  # the writer's files are there
    return {name: sorted(path.name for path in place.glob("*")) for name, place in places.items()}


class Adversaries(L.LightningModule):
    """Two optimizers, stepped by hand: the critic's at every step, the actor's at every second."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.actor, self.critic, self.told = net(1), net(2), {"actor": [], "critic": []}

    def training_step(self, numbers, index):
        data = batch(int(os.environ["RANK"]), int(numbers[0]))
        for name, optimizer in zip(("actor", "critic"), self.optimizers(), strict=True):
            if name == "actor" and index % 2:
                continue
            loss = loss_of(getattr(self, name), data)
            self.told[name].append(loss.item())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(getattr(self, name).parameters(), lr=0.1) for name in ("actor", "critic")]


@scenario
def several_optimizers(rank, folder):
    reports = {"actor": [], "critic": []}
    logger, module = Numbers(), Adversaries()
    callbacks = [
        HDET(hdet.OneCycleLR, 0.1, total_steps=steps, optimizer=i, submodule=name, cycle_momentum=False, spread=0.3,
             converge_every=4, monitor=reports[name].append)
        for i, (name, steps) in enumerate({"actor": 8, "critic": 16}.items())
    ]  # fmt: skip
    trainer(
        folder, *callbacks, strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        logger=logger, max_steps=-1, max_epochs=1,
    ).fit(module, loader(0, 16))  # fmt: skip
    told = {name: [sum(x[i : i + 4]) / 4 for i in range(0, len(x), 4)] for name, x in module.told.items()}
    return {
        "steps": [callback.scheduler.ensemble.steps for callback in callbacks],
        "losses": {name: [r.losses[rank] for r in of] for name, of in reports.items()},
        "told": told,
        "equal": are_equal(flat(module)),
        "keys": sorted({key for metrics in logger.logged for key in metrics}),
    }


@scenario
def schedules(rank, folder):
    found = {}
    recorder, callback = Recorder(), HDET(spread=0.3, converge_every=4)
    module = Module("step")
    trainer(folder, callback, recorder).fit(module, loader(0, STEPS))
    found["lambda"] = [sum(lrs) / 2 for lrs in zip(*gather(recorder.lrs), strict=True)]
    found["apart"] = [abs(a - b) / (a + b) for a, b in zip(*gather(recorder.lrs), strict=True)]
    callback = HDET(hdet.OneCycleLR, **settings(max_lr="auto", probe=probe()))
    trainer(folder, callback).fit(Module(), loader(0, STEPS))
    found["auto"] = gather(callback.scheduler.optimizer.param_groups[0]["max_lr"])

    taken = []
    callback._driven.add = taken.append
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=2)
    callback.on_before_backward(scaled, Module(), torch.tensor(1.5 / 2 * 8))
    found["scaled"] = [float(loss) for loss in taken]

    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, filename="without")
    trainer(folder, saver, enable_checkpointing=True, max_steps=2).fit(Module(), loader(0, STEPS))
    longer = HDET(hdet.OneCycleLR, **settings())
    made = trainer(folder, longer, max_steps=-1, max_epochs=1)
    made.fit(module := Module(), loader(0, 6))
    made.fit_loop.max_epochs = 2
    made.fit(module, loader(0, 6))
    found["longer"] = longer.scheduler.ensemble.steps, longer.scheduler.total_steps
    later = trainer(folder, HDET(hdet.OneCycleLR, **settings()), max_steps=4)

    def fit(callback, module=None, **options):
        return error_of(trainer(folder, callback, **options).fit, module or Module(), loader(0, STEPS))

    found["refused"] = {
        "epoch": fit(HDET(spread=0.3), Module("epoch")),
        "both": fit(HDET(hdet.OneCycleLR, max_lr=0.1, spread=0.3), Module("step")),
        "endless": fit(HDET(hdet.OneCycleLR, max_lr=0.1, spread=0.3), max_steps=-1, max_epochs=-1),
        "manual": fit(HDET(hdet.OneCycleLR, max_lr=0.1, spread=0.3), Adversaries()),
        "manual probe": fit(
            HDET(hdet.OneCycleLR, 0.1, 24, spread=0.3, converge_every=2, auto_lr=True, cycle_momentum=False,
                 probe=probe()), Adversaries(), strategy=DDPStrategy(find_unused_parameters=True)),
        "optimizer": fit(HDET(spread=0.3, optimizer=1)),
        "without": error_of(later.fit, Module(), loader(0, STEPS), ckpt_path=folder / "without.ckpt"),
        "submodule": fit(HDET(spread=0.3, submodule="nut")),
    }  # fmt: skip
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    fake = type("Trainer", (), {"strategy": strategy})()
    found["refused"]["deepspeed"] = error_of(HDET(spread=0.3).on_fit_start, fake, None)
    return found


class Sharded(Module):
    def configure_model(self):
        if not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh)


@scenario
def sharded(rank, folder):
    """FSDP2 on a (replicate x shard) mesh, with a probe, whose averages are sharded too."""

    def make(path):
        saver = ModelCheckpoint(dirpath=path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
        callback = HDET(
            hdet.OneCycleLR, replicas=lambda module: module.device_mesh["data_parallel"], **settings(probe=probe())
        )
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        made = trainer(folder, callback, saver, strategy=strategy, enable_checkpointing=True, max_steps=16)
        return made, callback, Sharded()

    def whole(module):
        return torch.cat([p.full_tensor().double().flatten() for p in module.net.parameters()])

    first, callback, module = make(folder / "a")
    first.fit(module, loader(0, 16))
    second, resumed, other = make(folder / "b")
    second.fit(other, loader(0, 16), ckpt_path=folder / "a" / "step=6.ckpt")
    return {
        "equal": torch.equal(whole(module), whole(other)),
        "same on all": are_equal(whole(module)),
        "gains": (callback.scheduler.ensemble.gains, resumed.scheduler.ensemble.gains),
        "plain": torch.equal(
            whole(module),
            plain_loop(rank, 16, converge_at=(6, 12), spread=0.3, converge_every=4, auto_lr=True,
                       probe=frameworks.probe(rank))[0]),
    }  # fmt: skip


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    frameworks.run(SCENARIOS)


if __name__ == "__main__":
    main()
