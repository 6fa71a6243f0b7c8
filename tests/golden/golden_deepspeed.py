"""ZeRO-1 in four processes, two replicas of two shards each; golden_launch.py starts it."""

import json

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_cases import batch, loss_of, plain_report, stream
from golden_machine import digest
from torch import nn

import hdet
from hdet.integrations.deepspeed import ReplicaGroups, attach

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of a minute
SETTINGS = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1},
    "steps_per_print": 10**9,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(F.softsign(self.first(x)))


def main(out, part):
    """Train, and write what it came to."""
    torch.set_num_threads(1)
    groups = ReplicaGroups(2)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=model.parameters(), config=SETTINGS, mpu=groups
    )
    reports, losses, rates = [], [], []
    probe = hdet.Probe(loss_fn=loss_of, batches=stream(rank))
    scheduler = attach(
        engine, hdet.OneCycleLR, max_lr=0.001, total_steps=24, spread=0.3, converge_every=2, auto_lr=True, probe=probe,
        monitor=reports.append,
    )  # fmt: skip
    for step in range(13):
        rates.append([float(lr) for lr in scheduler.get_last_lr()])
        loss = loss_of(engine, batch(rank, step))
        engine.backward(loss)
        engine.step(lr_kwargs={"loss": loss})
        losses.append(loss.item())
    apart = digest([p.detach() for p in model.parameters()])
    scheduler.converge()
    parameters = [p.detach() for p in model.parameters()]
    result = {
        "exact": {
            "apart": apart,
            "model": digest(parameters),
            "scheduler": digest(scheduler.state_dict()),
            "losses": digest(losses),
            "rates": digest(rates),
            "reports": digest([plain_report(report) for report in reports]),
        },
        "plain": {"steps": scheduler.ensemble.steps, "events": [[r.step, r.complete] for r in reports]},
        "summary": {
            "norm": float(torch.cat([p.double().view(-1) for p in parameters]).norm()),
            "loss": losses[-1],
            "gains": [report.next_gain[0] for report in reports],
            "rates": rates[-1],
        },
    }
    (out / f"zero1.{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
