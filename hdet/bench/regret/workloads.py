"""The workloads of the regret benchmark: small models of different kinds, on data that every machine has."""

from __future__ import annotations

import functools
import itertools
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STARTS = (0.01, 0.1, 1 / 3, 1.0, 3.0, 8.0)
"""Where runs start: max_lr in units of the tuned one."""

SCHEDULES = ("one_cycle", "constant", "wsd")
"""torch's OneCycleLR; or, after a warm-up of 5%, ``constant``, or ``wsd``: a linear decay over the last fifth."""


class Batch(NamedTuple):
    """Examples and what the model should answer."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, its data, and a budget. Everything is a function of the seeds passed in."""

    name: str
    build: Callable[[], nn.Module]
    """A new model, with parameters drawn from torch's global generator."""
    draw: Callable[[int, torch.Generator], Batch]
    """A training batch of the given size."""
    validation: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    """Mean loss, from the model's outputs and the targets."""
    optimizer: Literal["sgd", "adamw"]
    """SGD with momentum 0.9, or AdamW with betas (0.9, 0.95)."""
    weight_decay: float = 0.0
    batch_size: int
    """Examples to a step, over all replicas."""
    steps: int
    tuned: float
    """OneCycle's best max_lr."""
    held_out: bool = False
    """Whether the controller's constants were chosen without it."""
    schedule: str = "one_cycle"
    """One of :data:`SCHEDULES`."""


# ------------------------------------------------------------------------------------------------------------- models


class Transformer(nn.Module):
    """Pre-norm transformer over ``(batch, length, width)``."""

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            qkv = block["qkv"](block["norm1"](x)).view(batch, length, 3, self.heads, width // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + block["out"](y.transpose(1, 2).reshape(batch, length, width))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.norm(x)


class CharLM(nn.Module):
    """Logits ``(batch, 128, length)`` for the next ASCII character."""

    def __init__(self, width: int = 32, layers: int = 2, context: int = 32) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.body = Transformer(width, layers, 4, causal=True)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.characters(x) + self.positions)).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Logits for ``(batch, 64)`` images of 8 x 8, seen as 16 patches of 2 x 2."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        self.body = Transformer(width, layers, 4, causal=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.body(self.patches(patches) + self.positions).mean(1))


class Recommender(nn.Module):
    """Logit of a click, from user and item embeddings: their product, and a small net over both."""

    def __init__(self, users: int = 2000, items: int = 1000, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)
        self.net = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        user, item = self.users(x[..., 0]), self.items(x[..., 1])
        return (user * item).sum(-1) + self.net(torch.cat((user, item), -1)).squeeze(-1)


# --------------------------------------------------------------------------------------------------------------- data


@functools.cache
def _digits() -> tuple[Batch, Batch]:
    """scikit-learn's digits: 1400 to train on, every tenth label of which is random, and 397 to validate."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(images).float().div(16)[order], torch.from_numpy(labels).long()[order]
    train, val = Batch(inputs[:1400], targets[:1400].clone()), Batch(inputs[1400:], targets[1400:])
    generator = torch.Generator().manual_seed(3)
    noisy = torch.rand(1400, generator=generator) < 0.1
    train.targets[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator)
    return train, val


def _draw_digits(size: int, generator: torch.Generator) -> Batch:
    train, _ = _digits()
    chosen = torch.randint(1400, (size,), generator=generator)
    return Batch(train.inputs[chosen], train.targets[chosen])


def _draw_shifted_digits(size: int, generator: torch.Generator) -> Batch:
    """Digits moved by up to one pixel, the whole batch alike."""
    batch = _draw_digits(size, generator)
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return Batch(torch.roll(batch.inputs.view(-1, 8, 8), (dy, dx), (1, 2)).reshape(-1, 64), batch.targets)


@functools.cache
def _source_code() -> tuple[Tensor, Tensor]:
    return _split(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))


@functools.cache
def _other_code() -> tuple[Tensor, Tensor]:
    """Another dialect: the standard library's own tests of its e-mail and unittest packages, or what is there."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _split(sorted((root / "encodings").glob("*.py")) + sorted((root / "pydoc_data").glob("*.py")))


def _split(files: list[Path]) -> tuple[Tensor, Tensor]:
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    data = data.clamp(max=127)
    cut = int(len(data) * 0.95)
    return data[:cut], data[cut:]


def _windows(data: Tensor, starts: Tensor, context: int = 32) -> Batch:
    window = data[starts[:, None] + torch.arange(context + 1)].long()
    return Batch(window[:, :-1], window[:, 1:])


def _draw_text(corpus: Callable[[], tuple[Tensor, Tensor]], size: int, generator: torch.Generator) -> Batch:
    train, _ = corpus()
    return _windows(train, torch.randint(len(train) - 33, (size,), generator=generator))


def _validation_text(corpus: Callable[[], tuple[Tensor, Tensor]], size: int = 512) -> Batch:
    _, val = corpus()
    return _windows(val, torch.randint(len(val) - 33, (size,), generator=torch.Generator().manual_seed(1)))


@functools.cache
def _teacher() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(32, 48, generator=generator) / math.sqrt(32) * 3
    return torch.logspace(0.3, -1.3, 32), first, torch.randn(48, 1, generator=generator) / math.sqrt(48)


def _draw_regression(size: int, generator: torch.Generator) -> Batch:
    """A teacher's outputs and noise, on inputs of very different scales; never the same example twice."""
    scales, first, second = _teacher()
    x = torch.randn(size, 32, generator=generator) * scales
    return Batch(x, (torch.tanh(x @ first) @ second).squeeze(1) + 0.2 * torch.randn(size, generator=generator))


@functools.cache
def _tastes() -> tuple[Tensor, Tensor, Tensor]:
    """True user and item vectors, and items' popularity."""
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(2000, 8, generator=generator),
        torch.randn(1000, 8, generator=generator) / math.sqrt(8) * 1.5,
        torch.randn(1000, generator=generator),
    )


def _draw_clicks(size: int, generator: torch.Generator) -> Batch:
    """Clicks of users on items, both of whose frequencies follow a power law: rank ``k`` has about ``1 / k``."""
    users, items, popularity = _tastes()
    user = _power_law(len(users), size, generator)
    item = _power_law(len(items), size, generator)
    logit = (users[user] * items[item]).sum(-1) + popularity[item]
    click = torch.rand(size, generator=generator) < torch.sigmoid(logit)
    return Batch(torch.stack((user, item), -1), click.float())


def _power_law(size: int, count: int, generator: torch.Generator) -> Tensor:
    return ((size + 1.0) ** torch.rand(count, generator=generator)).long().clamp(max=size) - 1


def _fixed(draw: Callable[[int, torch.Generator], Batch], size: int, seed: int) -> Batch:
    return draw(size, torch.Generator().manual_seed(seed))


@functools.cache
def _pretrained() -> dict[str, Tensor]:
    """A :class:`CharLM` after 400 steps on the standard library's source."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = CharLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 400, cycle_momentum=False)
    generator = torch.Generator().manual_seed(1234)
    for _ in range(400):
        batch = _draw_text(_source_code, 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _fine_tuned() -> CharLM:
    model = CharLM()
    model.load_state_dict(_pretrained())
    return model


def _mlp(*sizes: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.squeeze(-1), targets)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            name="char_lm",
            build=CharLM,
            draw=functools.partial(_draw_text, _source_code),
            validation=functools.partial(_validation_text, _source_code),
            loss=F.cross_entropy,
            optimizer="adamw",
            batch_size=32,
            steps=600,
            tuned=0.02,
        ),
        Workload(
            name="digits_mlp",
            build=functools.partial(_mlp, 64, 64, 64, 10, activation=nn.ReLU),
            draw=_draw_digits,
            validation=lambda: _digits()[1],
            loss=F.cross_entropy,
            optimizer="sgd",
            batch_size=64,
            steps=600,
            tuned=0.2,
        ),
        Workload(
            name="digits_conv",
            build=_conv,
            draw=_draw_shifted_digits,
            validation=lambda: _digits()[1],
            loss=F.cross_entropy,
            optimizer="adamw",
            weight_decay=0.01,
            batch_size=32,
            steps=500,
            tuned=0.025,
        ),
        Workload(
            name="regression",
            build=functools.partial(_mlp, 32, 96, 96, 1, activation=nn.Tanh),
            draw=_draw_regression,
            validation=functools.partial(_fixed, _draw_regression, 2000, 6),
            loss=_squared_error,
            optimizer="sgd",
            batch_size=32,
            steps=800,
            tuned=0.1,
        ),
        Workload(
            name="fine_tune",
            build=_fine_tuned,
            draw=functools.partial(_draw_text, _other_code),
            validation=functools.partial(_validation_text, _other_code),
            loss=F.cross_entropy,
            optimizer="adamw",
            batch_size=32,
            steps=300,
            tuned=0.025,
        ),
        Workload(
            name="vision_transformer",
            build=VisionTransformer,
            draw=_draw_shifted_digits,
            validation=lambda: _digits()[1],
            loss=F.cross_entropy,
            optimizer="adamw",
            weight_decay=0.1,
            batch_size=32,
            steps=600,
            tuned=0.012,
            held_out=True,
        ),
        Workload(
            name="recommender",
            build=Recommender,
            draw=_draw_clicks,
            validation=functools.partial(_fixed, _draw_clicks, 4000, 12),
            loss=F.binary_cross_entropy_with_logits,
            optimizer="adamw",
            batch_size=128,
            steps=1000,
            tuned=0.02,
        ),
    )
}


def workload_of(name: str) -> Workload:
    """A workload by its name; ``name/schedule`` for one with another schedule than OneCycle's."""
    plain, _, schedule = name.partition("/")
    return replace(WORKLOADS[plain], name=name, schedule=schedule) if schedule else WORKLOADS[plain]
