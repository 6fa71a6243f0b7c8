"""A bucket and what every rank has to say, in one message. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_OCTETS = 8


class Piggyback:
    """Memory for a bucket's wire, followed by a slot for each rank.

    A rank writes its numbers into its own slot, an octet of their float64 to an element, and zeros into the others'.
    The sum over the ranks then holds everybody's numbers, exactly in any dtype that a wire may have.

    Args:
        layout: hash of the model that the ranks have agreed on.
        wire: size, dtype and device of the bucket's wire.
        ranks: how many there are.
        rank: this one.
        numbers: how many each has to say.
    """

    def __init__(self, layout: int, wire: Tensor, ranks: int, rank: int, numbers: int) -> None:
        self.layout, self._rank = layout, rank
        self.memory = wire.new_zeros(wire.numel() + ranks * numbers * _OCTETS)
        """What is sent."""
        self.wire = self.memory[: wire.numel()]
        """The bucket's part."""
        self._slots = self.memory[wire.numel() :].view(ranks, numbers * _OCTETS)

    def write(self, numbers: Sequence[float]) -> None:
        """Say this rank's ``numbers``."""
        self._slots.zero_()
        self._slots[self._rank] = torch.tensor(numbers, dtype=torch.float64).view(torch.uint8)

    def read(self) -> list[list[float]]:
        """Every rank's numbers, by rank, once the memory holds the sum over the ranks."""
        return self._slots.cpu().to(torch.uint8).view(torch.float64).tolist()
