"""DistributedDataParallel: torchrun --nproc-per-node=2 examples/ddp.py"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = 4


def data(count, seed):
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True))


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def train():
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    dataset, held_out = data(4096, seed=0), data(512, seed=1)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for batch in loader:
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            validation = loss_fn(model, held_out.tensors)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: validation loss {validation:.3f}")


def main():
    dist.init_process_group("gloo")
    train()
    gc.collect()  # the model must go before its process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
