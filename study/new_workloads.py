"""Workloads of the study's own, beside the benchmark's twenty. No constant was chosen on them."""
import functools, math, torch
from torch import nn
from torch.nn import functional as F
from hdet.bench.regret import data, models
from hdet.bench.regret.data import Batch
from hdet.bench.regret.workloads import Workload, WORKLOADS, _squared_error, _log_loss
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

def draw_spiral(size, g):
    k = torch.randint(3, (size,), generator=g); r = torch.rand(size, generator=g)
    a = 4.5 * r + k * 2 * math.pi / 3 + 0.15 * torch.randn(size, generator=g)
    return Batch(torch.stack((r * a.cos(), r * a.sin()), -1) * 2, k)

@functools.cache
def diabetes():
    from sklearn.datasets import load_diabetes
    x, y = load_diabetes(return_X_y=True)
    o = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[o], torch.from_numpy(y).float()[o]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return Batch(x[:330], y[:330]), Batch(x[330:], y[330:])

@functools.cache
def _flower():
    from sklearn.datasets import load_sample_images
    return torch.from_numpy(load_sample_images().images[1].copy()).float().div(255).mean(-1)

def draw_patches(size, g):
    im = _flower(); y = torch.randint(im.shape[0] - 16, (size,), generator=g); x = torch.randint(im.shape[1] - 16, (size,), generator=g)
    p = torch.stack([im[a:a + 16, b:b + 16] for a, b in zip(y.tolist(), x.tolist())])[:, None]
    low = F.interpolate(F.avg_pool2d(p, 4), scale_factor=4)
    return Batch(low, p - low)

class Residual(nn.Module):
    def __init__(s, i, w, o, depth):
        super().__init__()
        s.i = nn.Linear(i, w); s.o = nn.Linear(w, o); s.n = nn.LayerNorm(w)
        s.b = nn.ModuleList(nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, w)) for _ in range(depth))
        for b in s.b: nn.init.zeros_(b[3].weight)
    def forward(s, x):
        x = s.i(x)
        for b in s.b: x = x + b(x)
        return s.o(s.n(x))

class Factors(nn.Module):
    def __init__(s):
        super().__init__(); s.u = nn.Embedding(400, 12); s.v = nn.Embedding(300, 12); s.b = nn.Parameter(torch.zeros(()))
        nn.init.normal_(s.u.weight, std=.1); nn.init.normal_(s.v.weight, std=.1)
    def forward(s, x): return (s.u(x[..., 0]) * s.v(x[..., 1])).sum(-1) + s.b

@functools.cache
def _truth():
    g = torch.Generator().manual_seed(21)
    return torch.randn(400, 5, generator=g), torch.randn(300, 5, generator=g) / math.sqrt(5)
def draw_ratings(size, g):
    u, v = _truth(); i = torch.randint(400, (size,), generator=g); j = torch.randint(300, (size,), generator=g)
    return Batch(torch.stack((i, j), -1), (u[i] * v[j]).sum(-1) + .5 * torch.randn(size, generator=g))

@functools.cache
def _few():
    return data.draw_snippets(400, torch.Generator().manual_seed(9))
def draw_few(size, g): return data._some(_few(), size, g)

class Contrast(nn.Module):
    def __init__(s):
        super().__init__(); s.net = models.mlp(64, 64, 64, 16, activation=nn.ReLU)
    def forward(s, x):
        d1 = torch.randint(-1, 2, (2,)).tolist(); v = torch.roll(x.view(-1, 8, 8), d1, (1, 2)).reshape(-1, 64)
        a = F.normalize(s.net(x + .1 * torch.randn_like(x)), dim=-1); b = F.normalize(s.net(v + .1 * torch.randn_like(x)), dim=-1)
        return a @ b.T * 5
def contrast_loss(l, t): return F.cross_entropy(l, torch.arange(len(l)))

class LSTM(nn.Module):
    def __init__(s):
        super().__init__(); s.e = nn.Embedding(128, 24); s.l = nn.LSTM(24, 48, batch_first=True); s.h = nn.Linear(48, 128)
    def forward(s, x): return s.h(s.l(s.e(x))[0]).transpose(1, 2)

src = functools.partial(data.draw_text, data.source_code); srcv = functools.partial(data.validation_text, data.source_code)
oth = functools.partial(data.draw_text, data.other_code); othv = functools.partial(data.validation_text, data.other_code)
NEW = {w.name: w for w in (
    Workload(name="gpt_other", build=lambda: GPT(ModelConfig(n_layer=3, n_head=4, n_embd=48, block_size=32), 128), draw=oth, validation=othv, loss=loss_of, optimizer="adamw", weight_decay=0.1, batch_size=16, steps=1500, tuned=0.008),
    Workload(name="lstm", build=LSTM, draw=src, validation=srcv, loss=F.cross_entropy, optimizer="adamw", batch_size=32, steps=800, tuned=0.02),
    Workload(name="char_lm_b8", build=models.CharLM, draw=src, validation=srcv, loss=F.cross_entropy, optimizer="adamw", weight_decay=.01, batch_size=8, steps=1200, tuned=0.01),
    Workload(name="spiral", build=functools.partial(models.mlp, 2, 64, 64, 3, activation=nn.ReLU), draw=draw_spiral, validation=functools.partial(data.fixed, draw_spiral, 4000, 3), loss=F.cross_entropy, optimizer="sgd", batch_size=64, steps=1000, tuned=0.2),
    Workload(name="diabetes", build=functools.partial(models.mlp, 10, 32, 1, activation=nn.ReLU), draw=lambda n, g: data._some(diabetes()[0], n, g), validation=lambda: diabetes()[1], loss=_squared_error, optimizer="adamw", batch_size=32, steps=400, tuned=0.005),
    Workload(name="patches", build=lambda: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 1, 3, padding=1)), draw=draw_patches, validation=functools.partial(data.fixed, draw_patches, 512, 2), loss=F.mse_loss, optimizer="adamw", batch_size=16, steps=600, tuned=0.01),
    Workload(name="residual", build=lambda: Residual(20, 48, 20, 4), draw=data.draw_mixture, validation=functools.partial(data.fixed, data.draw_mixture, 4000, 5), loss=F.cross_entropy, optimizer="sgd", weight_decay=1e-4, batch_size=64, steps=1200, tuned=0.1),
    Workload(name="factors", build=Factors, draw=draw_ratings, validation=functools.partial(data.fixed, draw_ratings, 4000, 3), loss=F.mse_loss, optimizer="adamw", batch_size=256, steps=1000, tuned=0.02),
    Workload(name="few_texts", build=functools.partial(models.TrigramClassifier, 20), draw=draw_few, validation=functools.partial(data.fixed, functools.partial(data.draw_snippets, last_fifth=True), 2000, 3), loss=F.cross_entropy, optimizer="adamw", batch_size=32, steps=600, tuned=0.02),
    Workload(name="contrast", build=Contrast, draw=data.draw_shifted_digits, validation=lambda: data.digits()[1], loss=contrast_loss, optimizer="adamw", batch_size=64, steps=700, tuned=0.01),
    Workload(name="mixture_adam", build=functools.partial(models.mlp, 20, 256, 256, 20, activation=nn.GELU), draw=data.draw_mixture, validation=functools.partial(data.fixed, data.draw_mixture, 4000, 5), loss=F.cross_entropy, optimizer="adamw", weight_decay=.05, batch_size=32, steps=2000, tuned=0.01),
)}
WORKLOADS.update(NEW)
