"""Schemas and fake kernels of the ops: ``torch.ops.hdet.*`` exist whether or not anything was compiled.

The reference is registered for every device. A native library registers kernels for its device, which the dispatcher
prefers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdet.ops import _reference

SCHEMAS = (
    "pack(Tensor(a!) wire, Tensor[] pieces, float scale, Tensor? anchor, float limit) -> Tensor",
    "unpack(Tensor wire, Tensor(a!)[] pieces, float divisor, Tensor(b!)? anchor, Tensor(c!)? slow, float slow_decay, "
    "Tensor(d!)[] lrs, Tensor? schedule, Tensor? gain, Tensor? multiplier) -> Tensor",
    "all_finite(Tensor[] pieces, float limit) -> Tensor",
    "scale_rates(Tensor(a!)[] lrs, float[] schedule, float[] gain, float[] multiplier) -> ()",
)
LIBRARY = torch.library.Library("hdet", "DEF")
"""Keeps the registrations alive."""

for schema in SCHEMAS:
    LIBRARY.define(schema)
LIBRARY.impl("pack", _reference.pack, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", _reference.unpack, "CompositeExplicitAutograd")
LIBRARY.impl("all_finite", _reference.all_finite, "CompositeExplicitAutograd")
LIBRARY.impl("scale_rates", _reference.scale_rates, "CompositeExplicitAutograd")


@torch.library.register_fake("hdet::pack", lib=LIBRARY)
def _(wire: Tensor, pieces: Sequence[Tensor], scale: float, anchor: Tensor | None, limit: float) -> Tensor:
    _reference.check_pack(wire, pieces, anchor, memory=False)
    return wire.new_empty((), dtype=torch.int64)


@torch.library.register_fake("hdet::unpack", lib=LIBRARY)
def _(
    wire: Tensor,
    pieces: Sequence[Tensor],
    divisor: float,
    anchor: Tensor | None,
    slow: Tensor | None,
    slow_decay: float,
    lrs: Sequence[Tensor],
    schedule: Tensor | None,
    gain: Tensor | None,
    multiplier: Tensor | None,
) -> Tensor:
    _reference.check_unpack(wire, pieces, anchor, slow, lrs, schedule, gain, multiplier, memory=False)
    return wire.new_empty((), dtype=torch.float64)


@torch.library.register_fake("hdet::all_finite", lib=LIBRARY)
def _(pieces: Sequence[Tensor], limit: float) -> Tensor:
    _reference.check_all_finite(pieces)
    return pieces[0].new_empty((), dtype=torch.bool)


@torch.library.register_fake("hdet::scale_rates", lib=LIBRARY)
def _(lrs: Sequence[Tensor], schedule: Sequence[float], gain: Sequence[float], multiplier: Sequence[float]) -> None:
    _reference.check_scale_rates(lrs, schedule, gain, multiplier, memory=False)
