# %% [markdown]
# One process, cell by cell: run it in an editor that knows `# %%` cells, or as `python examples/notebook.py`.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import hdet

STEPS, ACCUMULATE = 200, 4
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters())


def batch_of(size=16):
    x = torch.randn(size, 16)
    return x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True)


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


# %%
probe = hdet.Probe(loss_fn=loss_fn, batches=[batch_of() for _ in range(64)])
found = hdet.find_lr(model, optimizer, loss_fn, probe.batches, auto_lr=True)
found

# %%
given = {"model": model, "virtual_replicas": ACCUMULATE, "spread": 1 / 9, "auto_lr": True, "probe": probe}
scheduler = hdet.OneCycleLR(optimizer, max_lr=found.max_lr, total_steps=STEPS, **given)

# %%
losses, rates = [], []
for _ in range(STEPS):
    parts = []
    for batch in scheduler.each([batch_of() for _ in range(ACCUMULATE)]):
        loss = loss_fn(model, batch) / ACCUMULATE
        loss.backward()
        parts.append(loss.item())
    optimizer.step()
    scheduler.step(sum(parts))
    optimizer.zero_grad()
    losses.append(sum(parts))
    rates.append(scheduler.get_last_lr()[0])

# %%
scheduler.ensemble.last_report

# %%
figure, (top, bottom) = plt.subplots(2, sharex=True)
top.plot(losses)
top.set_ylabel("training loss")
bottom.plot(rates)
bottom.set_ylabel("learning rate")
figure.savefig("notebook.png")
