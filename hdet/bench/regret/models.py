"""The models of the regret benchmark. Parameters are drawn from torch's global generator."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdet.train.config import ModelConfig
from hdet.train.models import GPT


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

    def __init__(self, width: int = 32, layers: int = 2, context: int = 32, *, causal: bool = True) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.body = Transformer(width, layers, 4, causal=causal)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.characters(x) + self.positions)).transpose(1, 2)


class MaskedLM(nn.Module):
    """Logits ``(batch, 128, length)`` for characters, 15% of which it does not see, and which those are: drawn anew in
    every forward pass, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = CharLM(causal=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.rand(x.shape) < 0.15
        return self.body(x.masked_fill(masked, 0)), masked


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
        self.net = mlp(2 * width, 32, 1, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        user, item = self.users(x[..., 0]), self.items(x[..., 1])
        return (user * item).sum(-1) + self.net(torch.cat((user, item), -1)).squeeze(-1)


class CharRNN(nn.Module):
    """Logits ``(batch, 128, length)`` for the next ASCII character, by a recurrent net of ``kind``."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], characters: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, characters)
        self.body = kind(characters, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.characters(x))[0]).transpose(1, 2)


class TrigramClassifier(nn.Module):
    """Logits for ``(batch, length)`` characters, from a bag of hashed trigrams."""

    def __init__(self, classes: int, buckets: int = 4096, width: int = 16) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.EmbeddingBag(buckets, width)
        self.net = mlp(width, 32, classes, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        hashed = (x[:, :-2] * 7919 + x[:, 1:-1] * 104729 + x[:, 2:] * 31) % self.buckets
        return self.net(self.embedding(hashed))


class Denoiser(nn.Module):
    """Predicts ``(batch, 64)`` images from mixtures with noise, which it draws itself, also in eval mode; a mixture's
    share of noise is uniform in [0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(65, 128, 128, 64, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.rand(len(x), 1)
        return self.net(torch.cat(((1 - share) * x + share * torch.randn_like(x), share), -1))


class Residual(nn.Module):
    """A net of ``depth`` residual blocks, each of which begins as the identity."""

    def __init__(self, inputs: int, width: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(inputs, width), nn.Linear(width, outputs), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        for block in self.blocks:
            assert isinstance(block, nn.Sequential)
            nn.init.zeros_(block[3].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x))


class Factors(nn.Module):
    """Ratings by users of items: products of their embeddings, and a bias."""

    def __init__(self, users: int = 400, items: int = 300, width: int = 12) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[..., 0]) * self.items(x[..., 1])).sum(-1) + self.bias


class Contrast(nn.Module):
    """Similarities ``(batch, batch)`` of ``(batch, 64)`` images to shifted copies, both with noise, which it draws
    itself, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 64, 64, 16, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.randint(-1, 2, (2,)).tolist()
        moved = torch.roll(x.view(-1, 8, 8), shift, (1, 2)).reshape(-1, 64)
        first = F.normalize(self.net(x + 0.1 * torch.randn_like(x)), dim=-1)
        second = F.normalize(self.net(moved + 0.1 * torch.randn_like(x)), dim=-1)
        return first @ second.T * 5


class PictureDenoiser(nn.Module):
    """Coloured pictures ``(batch, 3, height, width)`` without their noise, which is what the net predicts."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, width), (width, 3)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


class TwoViews(nn.Module):
    """Similarities ``(batch, batch)`` of the first of ``(batch, 2, 12, 12)`` pictures to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 24),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = (F.normalize(self.net(x[:, n : n + 1]), dim=-1) for n in range(2))
        return first @ second.T * 8


def mlp(*sizes: int, activation: type[nn.Module], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with the activation, and dropout if asked for, between them."""
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for inputs, outputs in itertools.pairwise(sizes[1:]):
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def conv(*, batch_norm: bool = False) -> nn.Sequential:
    """Logits for ``(batch, 64)`` images of 8 x 8."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs, stride in ((1, 12, 1), (12, 24, 2), (24, 24, 2)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 10))


def gpt(layers: int, width: int, context: int, *, tokens: int = 128, tied: bool = False) -> GPT:
    """With four heads."""
    return GPT(ModelConfig(n_layer=layers, n_head=4, n_embd=width, block_size=context, tie_weights=tied), tokens)


def gpt_of_matrices(layers: int, width: int, context: int) -> GPT:
    """Of 128 tokens, without biases, and with norms that are not trained: Muon takes matrices only."""
    config = ModelConfig(n_layer=layers, n_head=4, n_embd=width, block_size=context, bias=False, tie_weights=False)
    model = GPT(config, 128)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    return model
