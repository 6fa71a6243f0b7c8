"""One process, gradient accumulation: python examples/virtual_replicas.py"""

import torch
import torch.nn.functional as F
from torch import nn

STEPS, ACCUMULATE = 300, 4


def batch_of(generator):
    x = torch.randn(16, 16, generator=generator)
    return x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True)


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        total = 0.0
        micro_batches = [[t.to(device) for t in batch_of(generator)] for _ in range(ACCUMULATE)]
        for batch in micro_batches:
            loss = loss_fn(model, batch) / ACCUMULATE
            loss.backward()
            total += loss.detach()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {total:.3f}")


if __name__ == "__main__":
    main()
