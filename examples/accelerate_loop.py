"""accelerate: torchrun --nproc-per-node=2 examples/accelerate_loop.py"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hdet
from hdet.integrations.accelerate import attach

EPOCHS, ACCUMULATE = 4, 2


def data(count, seed):
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True))


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def main():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, step_scheduler_with_optimizer=False)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    dataset, held_out = data(4096, seed=0), data(512, seed=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, 32, shuffle=True))
    steps = EPOCHS * len(loader) // ACCUMULATE
    given = {"model": model, "spread": 1 / 9, "auto_lr": True, "probe": loss_fn}
    scheduler = attach(accelerator, hdet.OneCycleLR, optimizer, max_lr=1e-3, total_steps=steps, **given)
    for epoch in range(EPOCHS):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step(loss, batch=batch)
                optimizer.zero_grad()
        scheduler.converge()
        model.eval()
        with torch.no_grad():
            validation = loss_fn(model, held_out.tensors)
        accelerator.print(f"epoch {epoch}: validation loss {validation:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
