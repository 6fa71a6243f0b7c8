"""Run in 2 real processes: hdet.integrations.transformers under Hugging Face's own Trainer."""

import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
import frameworks
import torch
import torch.distributed as dist
import transformers
from frameworks import are_equal, batch, error_of, flat, gather, loss_of, net, plain_loop, told
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hdet
from hdet.integrations.transformers import attach
from hdet.integrations.transformers import loss_of as trainer_loss
from hdet.monitor.base import read_jsonl

SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


class Model(nn.Module):
    """Its inputs are numbers of batches, by which each rank draws its data."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.evaluated = net(), [], []

    def forward(self, number):
        index = int(number[0])
        if torch.is_grad_enabled():
            self.seen.append(index)
        elif index < 900:
            self.evaluated.append(flat(self.net))
        return {"loss": loss_of(self.net, batch(int(os.environ["RANK"]), index)), "logits": torch.zeros(len(number), 1)}


class Lrs(TrainerCallback):
    """The learning rate that each optimizer step takes."""

    def __init__(self):
        self.lrs = []

    def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **_):
        self.lrs.append(lr_scheduler.scheduler.get_last_lr()[0])


def numbers(first, count):
    return [{"number": first + i} for i in range(count)]


def trainer(folder, model, *callbacks, kind=Trainer, optimizers=(None, None), data=None, **options):
    options = {"max_steps": 12, "save_strategy": "no", "learning_rate": 1e-3} | options
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=1,
        per_device_eval_batch_size=1, logging_steps=1, disable_tqdm=True, report_to=[], dataloader_num_workers=0,
        remove_unused_columns=False, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return kind(
        model, arguments, train_dataset=data or numbers(0, 48), eval_dataset=numbers(800, 2), callbacks=[*callbacks],
        optimizers=optimizers,
    )  # fmt: skip


SETTINGS = {"spread": 0.3, "converge_every": 4, "auto_lr": True}


def probe(loss_fn):
    return hdet.Probe(loss_fn=loss_fn, batches=[{"number": torch.tensor([900 + i])} for i in range(3)])


def cosine(optimizer, model, steps, **settings):
    schedule = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    return hdet.Ensemble(optimizer, schedule, model=model, total_steps=steps, **settings)


@scenario
def equals_the_plain_loop(rank, folder):
    """Accumulation, clipping, bf16, a cosine with warmup, evaluations in the middle of rounds."""
    found = {}
    for name in ("probe", "no probe"):
        model, lrs, reports = Model(), Lrs(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        made = trainer(
            folder, model, lrs, optimizers=(optimizer, None), lr_scheduler_type="cosine", warmup_steps=2, bf16=True,
            gradient_accumulation_steps=2, max_grad_norm=0.5, eval_strategy="steps", eval_steps=5,
        )  # fmt: skip
        own = {"probe": probe(trainer_loss(made))} if name == "probe" else {}
        attach(made, monitor=reports.append, **SETTINGS, **own)
        made.train()
        dist.barrier()  # the writer's files are there

        plain = {"probe": frameworks.probe(rank, "bf16")}
        expected = plain_loop(
            rank, 12, accumulate=2, clip=0.5, precision="bf16", converge_at=(5, 10), make=cosine,
            numbers=model.seen, **SETTINGS, **(plain if own else {}),
        )  # fmt: skip
        logs = [entry for entry in made.state.log_history if "learning_rate" in entry]
        found[name] = {
            "weights": torch.equal(flat(model.net), expected[0]),
            "lrs": lrs.lrs == expected[1],
            "all lrs": gather(lrs.lrs),
            "reports": told(reports) == expected[2],
            "probed": [r.probe.raw for r in reports],
            "evaluated": len(model.evaluated),
            "equal": all(are_equal(weights) for weights in model.evaluated),
            "logged": [(entry["hdet/gain"], entry["hdet/base_lr"], entry["learning_rate"]) for entry in logs],
            "rounds": [report["round"] for report in read_jsonl(folder / "rounds.jsonl") if report["complete"]],
            "report": (folder / "report.html").read_text().count("<figure"),
        }
    return found


@scenario
def resumes(rank, folder):
    """Saved in the middle of a round and of an epoch, in which the Trainer shuffles."""
    found = {}
    for name in ("shared", "local"):
        reports = []

        def make(path, name=name, reports=reports):
            model = Model()
            made = trainer(
                path, model, save_strategy="steps", save_steps=6, gradient_accumulation_steps=2, max_steps=30
            )
            more = {"probe": trainer_loss(made)} if name == "shared" else {"gradients": "local"}
            attach(made, monitor=reports.append, **SETTINGS, **more)
            return made, model

        first, model = make(folder / name)
        first.train()
        count = len(reports)
        second, other = make(folder / f"{name} again")
        second.train(resume_from_checkpoint=str(folder / name / "checkpoint-18"))
        file = load_file(folder / name / "checkpoint-18" / "model.safetensors")
        found[name] = {
            "equal": torch.equal(flat(model.net), flat(other.net)),
            "same on all": are_equal(flat(model.net)),
            "reports": told(reports[count:]) == told(r for r in reports[:count] if r.step > 18),
            "losses": [entry["loss"] for entry in first.state.log_history[18:] if "loss" in entry]
            == [entry["loss"] for entry in second.state.log_history[18:] if "loss" in entry],
            "steps": (first.hdet.scheduler.steps, second.hdet.scheduler.steps),
            "ends": [r.step for r in reports[:count] if not r.complete],
            "file": sorted(file),
        }
    return found


class Own(Trainer):
    def compute_loss(self, model, inputs, *args, **keywords):
        inputs.pop("extra")
        return super().compute_loss(model, inputs, *args, **keywords)


@scenario
def language_model_with_lora(rank, folder):
    """GPT-2 from a small config, a Trainer of its own class, hdet.OneCycleLR; what is saved are the mean's adapters."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    bare = GPT2LMHeadModel(config)
    model = get_peft_model(bare, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    data = [{"input_ids": torch.arange(8) + i % 8, "labels": torch.arange(8) + i % 8, "extra": 0} for i in range(48)]
    lrs = Lrs()
    made = trainer(folder, model, lrs, kind=Own, data=data)
    scheduler = attach(made, hdet.OneCycleLR, max_lr=0.1, cycle_momentum=False, spread=0.3, converge_every=5)
    made.train()
    adapters = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora" in name])
    made.save_model(str(folder / "saved"))
    dist.barrier()
    file = load_file(folder / "saved" / "adapter_model.safetensors")
    return {
        "equal": are_equal(adapters),
        "saved": torch.equal(torch.cat([t.flatten() for t in file.values()]).sort()[0], adapters.sort()[0]),
        "moved": bool(adapters.abs().max() > 1e-3),
        "apart": [a != b for a, b in zip(*gather(lrs.lrs), strict=True)],
        "steps": scheduler.scheduler.ensemble.steps,
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "kind": isinstance(made, Own),
    }


class Skips(TrainerCallback):
    """What a loss scaler does on a rank whose gradients were not finite."""

    def __init__(self, rank):
        self.rank = rank

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        optimizer._is_overflow = self.rank == 0 and state.global_step == 2


@scenario
def trains_again(rank, folder):
    """A second train() of the same Trainer is another run, and predict() in between sees the mean."""
    model = Model()
    made = trainer(folder, model, Skips(rank), max_steps=6)
    handle = attach(made, **SETTINGS)
    before = error_of(lambda: handle.scheduler)
    made.train()
    first, converges = handle.scheduler, are_equal(flat(model.net))
    made.predict(numbers(800, 2))
    made.train()
    return {
        "before": before,
        "converges": converges,
        "others": handle.scheduler is not first,
        "steps": (first.steps, handle.scheduler.steps),
        "equal": are_equal(model.evaluated[-1]),
    }


@scenario
def refusals(rank, folder):
    made = trainer(folder, Model())
    found = {
        "what": error_of(attach, nn.Linear(1, 1)),
        "model": error_of(attach, made, model=made.model),
        "kind": error_of(attach, made, torch.optim.lr_scheduler.OneCycleLR),
    }
    made.is_deepspeed_enabled = True
    found["deepspeed"] = error_of(attach, made, spread=0.3)
    made.is_deepspeed_enabled = False
    attach(made, spread=0.3)
    found["twice"] = error_of(attach, made, spread=0.3)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    made = trainer(folder, model, optimizers=(optimizer, schedule))
    attach(made, hdet.OneCycleLR, max_lr=0.1, spread=0.3)
    found["both"] = error_of(made.train)
    return found


def main():
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    frameworks.run(SCENARIOS)


if __name__ == "__main__":
    main()
