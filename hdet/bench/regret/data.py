"""The data of the regret benchmark: what scikit-learn and Python's standard library ship, or generated.

``draw_...(size, generator)`` draws a training batch.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """Examples and what the model should answer."""

    inputs: Tensor
    targets: Tensor


Draw = Callable[[int, torch.Generator], Batch]
"""A training batch of the given size."""

_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def _some(examples: Batch, size: int, generator: torch.Generator) -> Batch:
    """Examples drawn with replacement."""
    chosen = torch.randint(len(examples.inputs), (size,), generator=generator)
    return Batch(examples.inputs[chosen], examples.targets[chosen])


def _characters(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@functools.cache
def digits() -> tuple[Batch, Batch]:
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


def draw_digits(size: int, generator: torch.Generator) -> Batch:
    """Images and labels."""
    return _some(digits()[0], size, generator)


def draw_shifted_digits(size: int, generator: torch.Generator) -> Batch:
    """Digits moved by up to one pixel, the whole batch alike."""
    batch = draw_digits(size, generator)
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return Batch(torch.roll(batch.inputs.view(-1, 8, 8), (dy, dx), (1, 2)).reshape(-1, 64), batch.targets)


@functools.cache
def source_code() -> tuple[Tensor, Tensor]:
    """The standard library's modules, to train on and to validate."""
    return _split(sorted(_LIBRARY.glob("*.py")))


@functools.cache
def other_code() -> tuple[Tensor, Tensor]:
    """Another dialect: the standard library's tables of encodings, and pydoc's topics."""
    return _split(sorted((_LIBRARY / "encodings").glob("*.py")) + sorted((_LIBRARY / "pydoc_data").glob("*.py")))


def _split(files: list[Path]) -> tuple[Tensor, Tensor]:
    data = _characters(b"".join(file.read_bytes() for file in files)).clamp(max=127)
    cut = int(len(data) * 0.95)
    return data[:cut], data[cut:]


def _windows(data: Tensor, starts: Tensor, context: int = 32) -> Batch:
    window = data[starts[:, None] + torch.arange(context + 1)].long()
    return Batch(window[:, :-1], window[:, 1:])


def draw_text(corpus: Callable[[], tuple[Tensor, Tensor]], size: int, generator: torch.Generator) -> Batch:
    """32 characters at random places of the training text, and the next ones."""
    train, _ = corpus()
    return _windows(train, torch.randint(len(train) - 33, (size,), generator=generator))


def validation_text(corpus: Callable[[], tuple[Tensor, Tensor]], size: int = 512) -> Batch:
    """The same of the validation text, always at the same places."""
    _, val = corpus()
    return _windows(val, torch.randint(len(val) - 33, (size,), generator=torch.Generator().manual_seed(1)))


@functools.cache
def _teacher() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(32, 48, generator=generator) / math.sqrt(32) * 3
    return torch.logspace(0.3, -1.3, 32), first, torch.randn(48, 1, generator=generator) / math.sqrt(48)


def draw_regression(size: int, generator: torch.Generator) -> Batch:
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


def draw_clicks(size: int, generator: torch.Generator) -> Batch:
    """Clicks of users on items, both of whose frequencies follow a power law: rank ``k`` has about ``1 / k``."""
    users, items, popularity = _tastes()
    user = _power_law(len(users), size, generator)
    item = _power_law(len(items), size, generator)
    logit = (users[user] * items[item]).sum(-1) + popularity[item]
    click = torch.rand(size, generator=generator) < torch.sigmoid(logit)
    return Batch(torch.stack((user, item), -1), click.float())


def _power_law(size: int, count: int, generator: torch.Generator) -> Tensor:
    return ((size + 1.0) ** torch.rand(count, generator=generator)).long().clamp(max=size) - 1


def fixed(draw: Draw, size: int, seed: int) -> Batch:
    """The same batch every time."""
    return draw(size, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- of the others


def draw_images_to_copy(size: int, generator: torch.Generator) -> Batch:
    """Digits, each of which is its own target."""
    return to_copy(draw_digits(size, generator))


def to_copy(batch: Batch) -> Batch:
    """Its inputs, each of which is its own target."""
    return Batch(batch.inputs, batch.inputs)


def repeated(batch: Batch, times: int) -> Batch:
    """Every example several times over: for models that draw noise."""
    return Batch(batch.inputs.repeat(times, 1), batch.targets.repeat(times, 1))


@functools.cache
def _photo() -> Tensor:
    """The first of the photos that scikit-learn ships, in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return torch.from_numpy(load_sample_images().images[0].copy()).float().div(255)


def draw_pixels(size: int, generator: torch.Generator) -> Batch:
    """The photo's colours, at places given by sines and cosines of six frequencies."""
    photo = _photo()
    height, width, _ = photo.shape
    y = torch.randint(height, (size,), generator=generator)
    x = torch.randint(width, (size,), generator=generator)
    angle = (torch.stack((y / height, x / width), -1) * 2 - 1) * math.pi
    waves = [wave(angle * 2**k) for k in range(6) for wave in (torch.sin, torch.cos)]
    return Batch(torch.cat(waves, -1), photo[y, x])


def draw_friedman(size: int, generator: torch.Generator) -> Batch:
    """Friedman's first regression problem (scikit-learn's ``make_friedman1``) with noise, standardised."""
    x = torch.rand(size, 10, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return Batch(x, (y + torch.randn(size, generator=generator) - 14.4) / 5)


@functools.cache
def _centres() -> Tensor:
    return torch.randn(60, 20, generator=torch.Generator().manual_seed(77)) * 1.2


def draw_mixture(size: int, generator: torch.Generator) -> Batch:
    """Points around 60 centres, three to each of 20 classes."""
    chosen = torch.randint(60, (size,), generator=generator)
    return Batch(_centres()[chosen] + torch.randn(size, 20, generator=generator), chosen % 20)


@functools.cache
def _files() -> list[Tensor]:
    """The standard library's 20 largest modules."""
    found = sorted(_LIBRARY.glob("*.py"), key=lambda file: (-file.stat().st_size, file.name))[:20]
    return [_characters(file.read_bytes()).long() for file in found]


def draw_snippets(size: int, generator: torch.Generator, *, last_fifth: bool = False) -> Batch:
    """64 characters, and which module they are from; from its first four fifths, or from the last."""
    files = _files()
    chosen = torch.randint(len(files), (size,), generator=generator)
    place = torch.rand(size, generator=generator)
    place = 0.8 + 0.2 * place if last_fifth else 0.8 * place
    snippets = []
    for which, where in zip(chosen.tolist(), place.tolist(), strict=True):
        start = int(where * (len(files[which]) - 65))
        snippets.append(files[which][start : start + 64])
    return Batch(torch.stack(snippets), chosen)


@functools.cache
def _plane() -> Tensor:
    return 2 * torch.randn(50, generator=torch.Generator().manual_seed(8)) / math.sqrt(50) * torch.logspace(0.5, -1, 50)


def draw_half_spaces(size: int, generator: torch.Generator) -> Batch:
    """Labels that a logistic model gives to inputs of very different scales; never the same example twice."""
    x = torch.randn(size, 50, generator=generator) * torch.logspace(0.5, -0.5, 50)
    return Batch(x, (torch.rand(size, generator=generator) < torch.sigmoid(x @ _plane())).float())


@functools.cache
def tumours() -> tuple[Batch, Batch]:
    """scikit-learn's breast cancer data, standardised: 400 to train on, and 169 to validate."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(x).float()[order], torch.from_numpy(y).float()[order]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return Batch(inputs[:400], targets[:400]), Batch(inputs[400:], targets[400:])


def draw_tumours(size: int, generator: torch.Generator) -> Batch:
    """Measurements, and whether the tumour is benign."""
    return _some(tumours()[0], size, generator)


# ---------------------------------------------------------------------------------------------- of the further ones


def draw_spirals(size: int, generator: torch.Generator) -> Batch:
    """Points near three spiral arms, and which arm."""
    arm = torch.randint(3, (size,), generator=generator)
    radius = torch.rand(size, generator=generator)
    angle = 4.5 * radius + arm * 2 * math.pi / 3 + 0.15 * torch.randn(size, generator=generator)
    return Batch(torch.stack((radius * angle.cos(), radius * angle.sin()), -1) * 2, arm)


@functools.cache
def diabetes() -> tuple[Batch, Batch]:
    """scikit-learn's diabetes data, standardised: 330 to train on, and 112 to validate."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(x).float()[order], torch.from_numpy(y).float()[order]
    inputs, targets = (inputs - inputs.mean(0)) / inputs.std(0), (targets - targets.mean()) / targets.std()
    return Batch(inputs[:330], targets[:330]), Batch(inputs[330:], targets[330:])


def draw_diabetes(size: int, generator: torch.Generator) -> Batch:
    """Measurements, and how far the disease has gone after a year."""
    return _some(diabetes()[0], size, generator)


@functools.cache
def _flower() -> Tensor:
    """The second of the photos that scikit-learn ships, grey, in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return torch.from_numpy(load_sample_images().images[1].copy()).float().div(255).mean(-1)


def draw_patches(size: int, generator: torch.Generator) -> Batch:
    """16 x 16 patches of the photo at a quarter of its resolution, and what is lost."""
    photo = _flower()
    y = torch.randint(photo.shape[0] - 16, (size,), generator=generator).tolist()
    x = torch.randint(photo.shape[1] - 16, (size,), generator=generator).tolist()
    patches = torch.stack([photo[top : top + 16, left : left + 16] for top, left in zip(y, x, strict=True)])[:, None]
    coarse = F.interpolate(F.avg_pool2d(patches, 4), scale_factor=4)
    return Batch(coarse, patches - coarse)


@functools.cache
def _preferences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(21)
    users = torch.randn(400, 5, generator=generator)
    return users, torch.randn(300, 5, generator=generator) / math.sqrt(5)


def draw_ratings(size: int, generator: torch.Generator) -> Batch:
    """Users and items, and noisy products of their true vectors."""
    users, items = _preferences()
    user = torch.randint(400, (size,), generator=generator)
    item = torch.randint(300, (size,), generator=generator)
    rating = (users[user] * items[item]).sum(-1) + 0.5 * torch.randn(size, generator=generator)
    return Batch(torch.stack((user, item), -1), rating)


@functools.cache
def _few_snippets() -> Batch:
    return draw_snippets(400, torch.Generator().manual_seed(9))


def draw_few_snippets(size: int, generator: torch.Generator) -> Batch:
    """Always of the same 400 snippets."""
    return _some(_few_snippets(), size, generator)
