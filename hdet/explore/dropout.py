"""Dropout whose probability can change without compiling the model anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdet.errors import check_number


class Dropout(nn.Module):
    """``nn.Dropout`` whose ``p`` is a 0-dim tensor, written in place: a compiled model does not compile anew when it
    changes.

    To be explored with ``hdet.module_attribute(model, hdet.Dropout, "p", ...)``. ``p`` lies on the CPU wherever the
    model is, and is not part of its state.

    Raises:
        TypeError, ValueError: for ``p`` outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = torch.tensor(float(check_number("p", p, "in [0, 1)", lambda p: 0 <= p < 1)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with each element 0 with probability ``p``, and otherwise divided by ``1 - p``; in eval mode ``x``."""
        if not self.training:
            return x
        keep = torch.rand_like(x) >= self.p
        return torch.where(keep, x / (1 - self.p), 0.0).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``repr()``."""
        return f"p={float(self.p):g}"
