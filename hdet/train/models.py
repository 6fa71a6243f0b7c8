"""The models: a GPT in the manner of GPT-2 and nanoGPT, and a small convolutional net. Both map inputs to logits."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdet.train.config import ConfigError, ModelConfig


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, nn.Dropout(config.dropout)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.n_head, width // self.n_head).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.out(F.gelu(self.up(self.norm2(x)), approximate="tanh")))


class GPT(nn.Module):
    """Logits ``(batch, length, vocab_size)`` for tokens ``(batch, length)``, ``length <= block_size``.

    Parameters start as GPT-2's: N(0, 0.02^2), and the projections back into the residual stream smaller by
    ``sqrt(2 n_layer)``, so that the stream's variance does not grow with depth.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                depth = math.sqrt(2 * config.n_layer) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)
        if config.tie_weights:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DigitsNet(nn.Sequential):
    """Logits ``(batch, 10)`` for images ``(batch, 1, 8, 8)``. Without batch norm, whose statistics would differ between
    the replicas of the baseline."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.channels
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * width * 16, 10),
        )


def check_size(config: ModelConfig, task: str, classes: int, batch_size: int) -> None:
    """Raise :class:`ConfigError`, before it is tried, if the parameters, or the activations of one batch, take more
    than this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        memory = max(memory, torch.cuda.mem_get_info()[1])
    width, blocks, length = config.n_embd, config.n_layer, config.block_size
    if task == "digits":
        parameters, activations = 18 * config.channels**2, 64 * config.channels
        named = f"model.channels={config.channels}"
    else:
        parameters = 12 * blocks * width**2 + (classes + length) * width
        activations = length * (8 * blocks * width + classes)
        named = f"model.n_layer={blocks}, n_embd={width} and block_size={length}"
    if 4 * parameters > memory:
        raise ConfigError(
            f"Invalid {named}: they make about {parameters:.1e} parameters, {4 * parameters / 2**30:.0f} GiB, and this "
            f"machine has {memory / 2**30:.0f} GiB. Use a smaller model."
        )
    if 4 * activations * batch_size > memory:
        raise ConfigError(
            f"Invalid train.batch_size={batch_size} with {named}: the activations take about "
            f"{4 * activations * batch_size / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f} GiB. Use a "
            "smaller batch_size, and train.accumulate."
        )


def build(config: ModelConfig, task: str, classes: int) -> nn.Module:
    """The model of a task, with parameters drawn from torch's global generator."""
    return DigitsNet(config) if task == "digits" else GPT(config, classes)


def loss_of(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy per target, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)
