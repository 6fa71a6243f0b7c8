"""FSDP2 and torch.distributed.checkpoint: torchrun --nproc-per-node=4 examples/fsdp2.py [folder]

Two replicas, each sharded over half of the processes. With a folder that has checkpoints it resumes.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS, SAVE_EVERY = 200, 100


def batch_of(step, seed):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step * 1000 + seed))
    return x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True)


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Trained:
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def train(folder):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=STEPS)
    state = {"trained": Trained(model, optimizer), "scheduler": scheduler}
    if saved := sorted(folder.glob("*"), key=lambda path: int(path.name)):
        dcp.load(state, checkpoint_id=saved[-1])
    for step in range(scheduler.last_epoch, STEPS):
        loss = loss_fn(model, batch_of(step, dist.get_rank()))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            dcp.save(state, checkpoint_id=folder / str(step + 1))
            if dist.get_rank() == 0:
                print(f"step {step + 1}: loss {loss:.3f}")


def main():
    dist.init_process_group("gloo")
    train(Path(*sys.argv[1:] or ["runs/fsdp2"]))
    gc.collect()  # the model must go before its process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
