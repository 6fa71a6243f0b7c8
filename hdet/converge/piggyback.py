"""A bucket and a few numbers of every rank in one all-reduce. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BYTES = 8
"""Of a float64."""


class Piggyback:
    """Memory for a bucket's wire, followed by a slot for each rank.

    A rank writes its numbers into its own slot, one byte of a float64 per element, and zeros into the others. The sum
    over the ranks then holds all ranks' numbers, exactly in every dtype that a wire may have.

    Args:
        layout: hash of the model on which the ranks have agreed.
        wire: a tensor of the size, dtype and device of the bucket's wire.
        ranks: number of ranks.
        rank: index of this one.
        numbers: how many numbers each rank has.
    """

    def __init__(self, layout: int, wire: Tensor, ranks: int, rank: int, numbers: int) -> None:
        self.layout, self._rank = layout, rank
        self.memory = wire.new_zeros(wire.numel() + ranks * numbers * _BYTES)
        """What is all-reduced, 1-D."""
        self.wire = self.memory[: wire.numel()]
        """The first part of it."""
        self._slots = self.memory[wire.numel() :].view(ranks, numbers * _BYTES)

    def write(self, numbers: Sequence[float]) -> None:
        """Put this rank's ``numbers`` into its slot."""
        self._slots.zero_()
        self._slots[self._rank] = torch.tensor(numbers, dtype=torch.float64).view(torch.uint8)

    def read(self) -> list[list[float]]:
        """Every rank's numbers, by rank, after the all-reduce."""
        return self._slots.cpu().to(torch.uint8).view(torch.float64).tolist()
