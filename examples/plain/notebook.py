# %% [markdown]
# One process, cell by cell: run it in an editor that knows `# %%` cells, or as `python examples/notebook.py`.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

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
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=STEPS)

# %%
losses, rates = [], []
for _ in range(STEPS):
    parts = []
    for batch in [batch_of() for _ in range(ACCUMULATE)]:
        loss = loss_fn(model, batch) / ACCUMULATE
        loss.backward()
        parts.append(loss.item())
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    losses.append(sum(parts))
    rates.append(scheduler.get_last_lr()[0])

# %%
figure, (top, bottom) = plt.subplots(2, sharex=True)
top.plot(losses)
top.set_ylabel("training loss")
bottom.plot(rates)
bottom.set_ylabel("learning rate")
figure.savefig("notebook.png")
