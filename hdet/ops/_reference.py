"""The ops in plain torch. The kernels in ``csrc/`` must give the same bits.

Also here: the checks of the arguments, whose errors the user sees whichever kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hdet.errors import check_instance, check_list, check_number, shown

BLOCK, ROWS = 2048, 4
"""A block is this many consecutive wire positions, in this many rows. See :func:`hdet.ops.unpack`."""
LANES = 1024
"""Sums of blocks are added to this many lanes in turn."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def accumulator(wire_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a wire's values are scaled, averaged and kept between rounds."""
    return torch.float64 if wire_dtype == torch.float64 else torch.float32


def pack(wire: Tensor, pieces: Sequence[Tensor], scale: float, anchor: Tensor | None, limit: float) -> Tensor:
    """See :func:`hdet.ops.pack`."""
    check_pack(wire, pieces, anchor)
    values = _flat(wire, pieces)
    if anchor is not None:
        values = values - anchor
    wire.copy_(values * scale)
    return (wire.abs() <= _floor(limit, wire)).logical_not_().sum()


def unpack(
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
    """See :func:`hdet.ops.unpack`."""
    check_unpack(wire, pieces, anchor, slow, lrs, schedule, gain, multiplier)
    # Divided by a tensor: on CUDA torch multiplies by the reciprocal of a Python number, which rounds twice.
    mean = wire.to(accumulator(wire.dtype)) / wire.new_full((), divisor, dtype=accumulator(wire.dtype))
    if anchor is not None:
        mean = anchor + mean
    squares = (_flat(wire, pieces) - mean).double().square()
    for piece, new in zip(pieces, mean.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(new.view(piece.shape))
    if anchor is not None:
        anchor.copy_(_flat(wire, pieces))
    if slow is not None:
        weight = 1 - slow_decay
        slow.copy_(mean if weight == 1 else slow + (mean - slow) * weight)
    if schedule is not None and gain is not None and multiplier is not None:
        for lr, value in zip(lrs, schedule * gain * multiplier, strict=True):
            lr.fill_(value)
    return sum_squares(squares)


def all_finite(pieces: Sequence[Tensor], limit: float) -> Tensor:
    """See :func:`hdet.ops.all_finite`."""
    check_all_finite(pieces)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for piece in pieces:
        if piece.numel():
            kinds.setdefault(piece.dtype, []).append(piece)
    # The infinity norm takes one pass over memory, and is NaN if an element is.
    found = [
        (torch.stack(torch._foreach_norm(kind, ord=float("inf"))) <= _floor(limit, kind[0])).all()
        for kind in kinds.values()
    ]
    return torch.stack(found).all() if found else pieces[0].new_ones((), dtype=torch.bool)


def scale_rates(
    lrs: Sequence[Tensor], schedule: Sequence[float], gain: Sequence[float], multiplier: Sequence[float]
) -> None:
    """See :func:`hdet.ops.scale_rates`."""
    check_scale_rates(lrs, schedule, gain, multiplier)
    values = np.array([a * b * c for a, b, c in zip(schedule, gain, multiplier, strict=True)])
    with np.errstate(over="ignore"):  # torch refuses what is infinite in fp32 only
        singles = values.astype(np.float32).tolist()
    pairs = zip(lrs, values.tolist(), singles, strict=True)
    rounded = [single if lr.dtype == torch.float32 else value for lr, value, single in pairs]
    torch._foreach_zero_(list(lrs))  # on a GPU launches, none of which waits for it; 1 * x is x to the bit
    torch._foreach_add_(list(lrs), 1.0)
    torch._foreach_mul_(list(lrs), rounded)


def _floor(limit: float, like: Tensor) -> Tensor:
    """The largest finite value of a tensor's dtype that is not above ``limit``, >= 0; on its device."""
    largest = torch.tensor(min(limit, torch.finfo(like.dtype).max), dtype=like.dtype)
    if largest.item() > limit:  # rounded up: the next one below is one less in its bits
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.element_size()]
        largest = (largest.view(bits) - 1).view(like.dtype)
    return largest.to(like.device)


def sum_squares(squares: Tensor) -> Tensor:
    """The sum of a 1-D float64 tensor in the order that :func:`hdet.ops.unpack` describes."""
    first, *others = _padded(squares, BLOCK).view(-1, ROWS, BLOCK // ROWS).unbind(1)
    a, b, c, d = sum(others, first).unflatten(-1, (-1, 4)).unbind(-1)
    blocks = _padded(_halved((a + b) + (c + d)), LANES).view(-1, LANES)
    lanes = squares.new_zeros(LANES)
    for row in blocks:
        lanes = lanes + row
    return _halved(lanes)


def _halved(sums: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two long, by adding its second half to its first."""
    while sums.size(-1) > 1:
        half = sums.size(-1) // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums.squeeze(-1)


def _padded(values: Tensor, multiple: int) -> Tensor:
    """With zeros appended, so that the length is a multiple of ``multiple``."""
    return torch.cat([values, values.new_zeros(-values.numel() % multiple)])


def _flat(wire: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """The pieces end to end, 1-D, in the wire's accumulator dtype."""
    empty = wire.new_empty(0, dtype=accumulator(wire.dtype))
    return torch.cat([empty, *(piece.reshape(-1).to(empty.dtype) for piece in pieces)])


def check_pack(wire: Tensor, pieces: Sequence[Tensor], anchor: Tensor | None, *, memory: bool = True) -> None:
    """Raise ``TypeError`` for a wrong dtype and ``ValueError`` for anything else that :func:`pack` cannot take.

    Args:
        memory: whether the tensors have memory, whose overlap can be checked; fake tensors have none.
    """
    named = _check_layout(wire, pieces, {"anchor": anchor})
    if memory:
        _check_disjoint(named, {})


def check_unpack(
    wire: Tensor,
    pieces: Sequence[Tensor],
    anchor: Tensor | None,
    slow: Tensor | None,
    lrs: Sequence[Tensor],
    schedule: Tensor | None,
    gain: Tensor | None,
    multiplier: Tensor | None,
    *,
    memory: bool = True,
) -> None:
    """The same for :func:`unpack`."""
    named = _check_layout(wire, pieces, {"anchor": anchor, "slow": slow})
    named |= _check_rates(lrs, wire, "the wire")
    factors: dict[str, Tensor] = {}
    for name, factor in (("schedule", schedule), ("gain", gain), ("multiplier", multiplier)):
        if factor is None:
            if lrs:
                raise ValueError(f"{name} is None. Must be given with lrs, like schedule, gain and multiplier all.")
            continue
        _check_tensor(name, factor, wire, (torch.float64,))
        if factor.shape != (len(lrs),):
            raise ValueError(f"{name} has shape {tuple(factor.shape)}. Must be {(len(lrs),)}, one number for each lr.")
        factors[name] = factor
    if memory:
        _check_disjoint(named, factors)


def check_all_finite(pieces: Sequence[Tensor]) -> None:
    """The same for :func:`all_finite`."""
    _check_tensors("pieces", pieces)
    if not pieces:
        raise ValueError("pieces is empty. Must have at least one tensor, on whose device the result is.")
    for i, piece in enumerate(pieces):
        _check_tensor(f"pieces[{i}]", piece, pieces[0], _DTYPES, beside="the first piece")


def check_scale_rates(
    lrs: Sequence[Tensor],
    schedule: Sequence[float],
    gain: Sequence[float],
    multiplier: Sequence[float],
    *,
    memory: bool = True,
) -> None:
    """The same for :func:`scale_rates`."""
    _check_tensors("lrs", lrs)
    if not lrs:
        raise ValueError("lrs is empty. Must have at least one tensor.")
    named = _check_rates(lrs, lrs[0], "the first one")
    check_factors(len(lrs), schedule=schedule, gain=gain, multiplier=multiplier)
    if memory:
        _check_disjoint(named, {})


def check_factors(count: int, **factors: Sequence[float]) -> None:
    """Raise TypeError or ValueError unless each is a list of that many numbers. The dispatcher takes flags, too."""
    for name, factor in factors.items():
        numbers = check_list(name, factor, f"a list of {count} numbers, one for each lr", length=count)
        for i, number in enumerate(numbers):
            check_number(f"{name}[{i}]", number, "as a float holds it", finite=False)


def _check_rates(lrs: Sequence[Tensor], like: Tensor, beside: str) -> dict[str, Tensor]:
    """The learning rates by name, each of one element."""
    _check_tensors("lrs", lrs)
    for g, lr in enumerate(lrs):
        _check_tensor(name := f"lrs[{g}]", lr, like, (torch.float32, torch.float64), beside=beside)
        if lr.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(lr.shape)}. Must have one element.")
    return {f"lrs[{g}]": lr for g, lr in enumerate(lrs)}


def _check_tensors(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a list of tensors."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"Invalid {name}={shown(value)}. Must be a list of tensors.")
    for i, item in enumerate(value):
        check_instance(f"{name}[{i}]", item, Tensor, "a tensor")


def _check_layout(wire: Tensor, pieces: Sequence[Tensor], flats: dict[str, Tensor | None]) -> dict[str, Tensor]:
    check_instance("wire", wire, Tensor, "a tensor")
    _check_tensors("pieces", pieces)
    _check_tensor("wire", wire, wire, _WIRE_DTYPES)
    if wire.dim() != 1:
        raise ValueError(f"wire has shape {tuple(wire.shape)}. Must have one dimension.")
    named = {"wire": wire}
    dtypes = tuple(dtype for dtype in _DTYPES if (dtype == torch.float64) == (wire.dtype == torch.float64))
    for i, piece in enumerate(pieces):
        _check_tensor(name := f"pieces[{i}]", piece, wire, dtypes)
        named[name] = piece
    total = sum(piece.numel() for piece in pieces)
    if wire.numel() != total:
        raise ValueError(f"wire has {wire.numel()} elements and the pieces together have {total}. Must be equal.")
    for name, flat in flats.items():
        if flat is not None:
            _check_tensor(name, flat, wire, (accumulator(wire.dtype),))
            if flat.shape != wire.shape:
                raise ValueError(f"{name} has shape {tuple(flat.shape)}. Must be the wire's, {tuple(wire.shape)}.")
            named[name] = flat
    return named


def _check_tensor(
    name: str, tensor: Tensor, wire: Tensor, dtypes: tuple[torch.dtype, ...], beside: str = "the wire"
) -> None:
    check_instance(name, tensor, Tensor, "a tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} has layout {layout}. Must be {torch.strided}: pass a dense tensor.")
    if tensor.device != wire.device:
        raise ValueError(f"{name} is on {tensor.device}. Must be on the device of {beside}, {wire.device}.")
    if tensor.dtype not in dtypes:
        other = "" if tensor is wire else f" beside a wire of {wire.dtype}" if beside == "the wire" else ""
        raise TypeError(f"{name} has dtype {tensor.dtype}. Must be {' or '.join(map(str, dtypes))}{other}.")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. Must be contiguous: pass a "
            "contiguous copy, and copy back what unpack writes."
        )


def _check_disjoint(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` if two tensors share memory, at least one of which is written."""
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name, shareable)
        for tensors, shareable in ((written, False), (read, True))
        for name, tensor in tensors.items()
        if tensor.numel() and tensor.device.type != "meta"
    ]
    last = last_written = (0, "")
    for begin, end, name, shareable in sorted(spans):
        other_end, other = last_written if shareable else last
        if begin < other_end:
            raise ValueError(f"{other} and {name} share memory. Every tensor must have its own.")
        last = max(last, (end, name))
        if not shareable:
            last_written = max(last_written, (end, name))
