"""Run in 2 real processes: hdet.integrations.accelerate with accelerate's own Accelerator."""

import logging
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).parent))
import frameworks
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from frameworks import are_equal, batch, error_of, flat, gather, loss_of, net, plain_loop, told
from torch import nn

import hdet
from hdet.integrations.accelerate import attach

SCENARIOS = []
SETTINGS = {"spread": 0.3, "converge_every": 4, "auto_lr": True}


def scenario(function):
    SCENARIOS.append(function)
    return function


def prepared(accumulate=1, precision="no", **options):
    AcceleratorState._reset_state()  # it is one for all accelerators of a process
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision, **options)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(rank, accelerator, model, optimizer, scheduler, steps, first=0, clip=None, done=lambda step: None):
    """The recipe: as accelerate's documentation has it, with the loss."""
    accumulate = accelerator.gradient_accumulation_steps
    lrs = []
    for number in range(first * accumulate, steps * accumulate):
        with accelerator.accumulate(model):
            if accelerator.sync_gradients:
                lrs.append(scheduler.get_last_lr()[0])
            with accelerator.autocast():
                loss = loss_of(model, batch(rank, number))
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step(loss)
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                done(number // accumulate + 1)
    scheduler.converge()
    return lrs


@scenario
def equals_the_plain_loop(rank, folder):
    """Accumulation, clipping, bf16 and a probe."""
    accelerator, model, optimizer = prepared(2, "bf16")
    reports = []
    scheduler = attach(
        accelerator, hdet.OneCycleLR, optimizer, 0.02, 12, model=model, probe=frameworks.probe(rank),
        monitor=reports.append, **SETTINGS,
    )  # fmt: skip
    lrs = train(rank, accelerator, model, optimizer, scheduler, 12, clip=0.5)
    expected = plain_loop(
        rank, 12, accumulate=2, clip=0.5, precision="bf16",
        probe=frameworks.probe(rank, "bf16"), **SETTINGS,
    )  # fmt: skip
    return {
        "weights": torch.equal(flat(model), expected[0]),
        "lrs": lrs == expected[1],
        "apart": gather(lrs)[0] != gather(lrs)[1],
        "reports": told(reports) == expected[2],
        "probed": any(r.probe.raw == r.probe.raw for r in reports),
        "metrics": sorted(scheduler.metrics()),
    }


@scenario
def resumes(rank, folder):
    """save_state() in the middle of a round, into a new accelerator's load_state()."""
    found = {}
    for name, more in {"shared": {}, "local": {"gradients": "local"}}.items():

        def make(more=more):
            accelerator, model, optimizer = prepared(2)
            settings = SETTINGS | more
            return (
                accelerator,
                model,
                optimizer,
                attach(accelerator, hdet.OneCycleLR, optimizer, 0.02, 12, model=model, **settings),
            )

        accelerator, model, optimizer, scheduler = make()
        apart = []

        def save(step, accelerator=accelerator, model=model, name=name, apart=apart):
            if step == 6:
                apart.append(not are_equal(flat(model)))
                accelerator.save_state(str(folder / name))
                apart.append(not are_equal(flat(model)))
                accelerator.save_model(accelerator.unwrap_model(model), str(folder / f"{name} model"))

        train(rank, accelerator, model, optimizer, scheduler, 12, done=save)
        accelerator, other, optimizer, second = make()
        with torch.no_grad():
            next(other.parameters()).zero_()
        accelerator.load_state(str(folder / name))
        train(rank, accelerator, other, optimizer, second, 12, first=6)
        found[name] = {
            "equal": torch.equal(flat(model), flat(other)),
            "same on all": are_equal(flat(model)),
            "apart": apart,
            "gains": (scheduler.ensemble.gains, second.ensemble.gains),
            "steps": second.ensemble.steps,
        }
    return found


def decay(step):
    return 0.9**step


@scenario
def prepared_schedules(rank, folder):
    """A prepared schedule counts one step for each process; without hdet, and as the base of an Ensemble."""
    found = {}
    for split in (False, True):

        def rates(uses_hdet, split=split):
            configuration = DataLoaderConfiguration(split_batches=split)
            accelerator, model, optimizer = prepared(dataloader_config=configuration)
            schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, decay))
            if not uses_hdet:
                scheduler, seen = schedule, []
                for number in range(8):
                    seen.append(optimizer.param_groups[0]["lr"])
                    accelerator.backward(loss_of(model, batch(rank, number)))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                return seen
            scheduler = attach(
                accelerator, hdet.Ensemble, optimizer, schedule=schedule, model=model, spread=0.3, converge_every=2,
                total_steps=8,
            )  # fmt: skip
            lrs = train(rank, accelerator, model, optimizer, scheduler, 5)
            state = scheduler.state_dict()
            accelerator, model, optimizer = prepared(dataloader_config=configuration)
            schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, decay))
            scheduler = attach(accelerator, hdet.Ensemble, optimizer, schedule=schedule, model=model, spread=0.3,
                               converge_every=2, total_steps=8)  # fmt: skip
            scheduler.load_state_dict(state)
            lrs += train(rank, accelerator, model, optimizer, scheduler, 8, first=5)
            return [sum(pair) / 2 for pair in zip(*gather(lrs), strict=True)]

        found[split] = rates(False), rates(True)
    return found


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@scenario
def says_what_is_forgotten(rank, folder):
    """A loop with no converge() and no loss evaluates and saves in the middle of rounds, by accelerate and by hand."""
    heard = Heard()
    logger = logging.getLogger("hdet")
    logger.addHandler(heard)
    told = {}

    def since(what):
        told[what], heard.messages = heard.messages, []

    def step():
        loss_of(model, batch(rank, 0)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = prepared()
    scheduler = hdet.OneCycleLR(optimizer, 0.02, 40, model=model, **SETTINGS)
    bare = accelerator.unwrap_model(model)
    model.eval()
    with torch.no_grad():
        bare(batch(rank, 0)[0])
    model.state_dict()
    since("before the first step")
    step()
    since("no loss")
    model.train()
    step()
    with torch.no_grad():
        model(batch(rank, 0)[0])  # in train mode
    model.eval()
    model(batch(rank, 0)[0])  # with gradients: some fine-tune in eval mode
    since("training")
    with torch.inference_mode():
        for _ in range(3):
            bare(batch(rank, 0)[0])
            model(batch(rank, 0)[0])
    since("evaluation")
    for _ in range(2):
        accelerator.get_state_dict(model)
        bare.state_dict()
    since("saving")
    with warnings.catch_warnings(record=True):
        for _ in range(2):
            scheduler.state_dict()
    since("scheduler")
    scheduler.close()

    model.train()
    scheduler = hdet.OneCycleLR(optimizer, 0.02, 40, model=model, **SETTINGS)
    for _ in range(4):
        step()
    model.eval()
    heard.messages = []
    with torch.no_grad():
        model(batch(rank, 0)[0])
    model.state_dict()
    since("at a round's end")
    model.train()
    step()
    scheduler.close()
    model.eval()
    with torch.no_grad():
        model(batch(rank, 0)[0])
    since("closed")
    told["hooks"] = len(model._forward_pre_hooks) + len(bare._forward_pre_hooks) + len(bare._state_dict_pre_hooks)
    logger.removeHandler(heard)
    return told


@scenario
def refusals(rank, folder):
    accelerator, model, optimizer = prepared()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {
        "accelerator": error_of(attach, None, hdet.Ensemble, optimizer),
        "kind": error_of(attach, accelerator, torch.optim.lr_scheduler.LambdaLR, optimizer),
        "unprepared": error_of(attach, accelerator, hdet.Ensemble, bare, model=model, spread=0.1),
        "settings": error_of(attach, accelerator, hdet.Ensemble, optimizer, model=model, spread=2),
    }
    one = hdet.OneCycleLR(optimizer, 0.1, 10, model=model, spread=0.1, cycle_momentum=False)
    wrapped = accelerator.prepare(one)
    accelerator.backward(loss_of(model, batch(rank, 0)))
    optimizer.step()
    found["prepared hdet"] = error_of(wrapped.step)
    state = accelerator.state
    state.distributed_type, kept = DistributedType.DEEPSPEED, state.distributed_type
    found["deepspeed"] = error_of(attach, accelerator, hdet.Ensemble, optimizer, model=model, spread=0.1)
    state.distributed_type = kept
    found["module"] = isinstance(model, nn.Module)
    return found


def main():
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    frameworks.run(SCENARIOS)


if __name__ == "__main__":
    main()
