"""Part ``kernels``: pack and unpack, by :mod:`hdet.bench.kernels`, against the card's own copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hdet.bench import kernels
from hdet.bench.gpu_check.place import Place, Row
from hdet.bench.measure import OURS, spread_of


def measure(place: Place) -> Iterator[Row]:
    """A row for each shape, dtype, op and clock, as soon as it is measured.

    Raises:
        RuntimeError: if a contender's result is wrong.
    """
    names = ("1k",) if place.is_small else ("gpt2", "resnet50", "tiny")
    repeat, seconds = (3, 0.05) if place.is_small else (25, 2.0)
    dtypes = (torch.float32, torch.bfloat16)
    for case in kernels.measure(names, dtypes, repeat=repeat, seconds=seconds, device=place.device):
        ours = case.seconds(OURS).median
        share = spread_of([case.facts["bytes"] / s / case.facts["copy_bandwidth"] for s in case.samples[OURS]]).median
        ratios = {name: case.ratio(name).median for name in case.alternatives}
        result = f"{ours * 1e6:.0f} µs, {share:.2f} of the copy bandwidth; "
        result += ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + " times as long"
        values = {"seconds": ours, "share_of_copy_bandwidth": share, "times_as_long": ratios, **case.facts}
        yield Row(case.case, result, values)
