"""A bucket and a few numbers of every rank in one all-reduce. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        gathered = torch.zeros(ranks, numbers, dtype=torch.float64)
        # numpy, since the first calls of torch's operators after a round cost ten times as much as later ones.
        self._numbers, self._bytes = gathered.numpy(), gathered.view(torch.uint8).view(-1)  # the same memory
        self.memory = wire.new_zeros(wire.numel() + self._bytes.numel())
        """What is all-reduced, 1-D."""
        self.wire = self.memory[: wire.numel()]
        """The first part of it."""
        self._slots = self.memory[wire.numel() :]

    def write(self, numbers: Sequence[float]) -> None:
        """Put this rank's ``numbers`` into its slot."""
        self._numbers.fill(0)
        self._numbers[self._rank] = numbers
        self._slots.copy_(self._bytes)

    def read(self) -> list[list[float]]:
        """Every rank's numbers, by rank, after the all-reduce."""
        self._bytes.copy_(self._slots)
        return self._numbers.tolist()
