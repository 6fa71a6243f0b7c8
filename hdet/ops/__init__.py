r"""Ops: many tensors into one flat tensor (a **wire**) and back, each in one pass over memory.

In: parameters, or the sum of the replicas' wires. Out: the wire, or the mean written into the parameters, with the
counts and distances that a converge needs. Beside them, the learning rates of all parameter groups. The ops are
registered as ``torch.ops.hdet.pack``, ``unpack``, ``all_finite`` and ``scale_rates``: they trace under
``torch.compile(fullgraph=True)``, and a CUDA graph can capture them. :func:`backend` says whether they run compiled
(``csrc/``) or as plain torch (``_reference.py``); both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdet.errors import check_instance, check_number
from hdet.ops import _native, _reference, _unchecked
from hdet.ops._native import Backend

__all__ = ["Backend", "all_finite", "backend", "pack", "scale_rates", "unpack"]


def backend() -> Backend:
    """Which kernels run on which device, and why not the native ones; ``str()`` of it is one line for a log."""
    return _native.BACKEND


def pack(
    wire: Tensor,
    pieces: Sequence[Tensor],
    *,
    scale: float = 1.0,
    anchor: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    r"""Lay ``pieces`` end to end into ``wire``, scaled, as the difference from ``anchor``::

        wire_i = round((piece_i - anchor_i) * scale)

    computed in fp32 (fp64 for an fp64 wire). The **anchor** is a point that replicas have in
    common, such as their last mean: a bf16 wire then rounds differences from it, which are small.

    Args:
        wire: 1-D, contiguous, with as many elements as the pieces together; fp32, bf16 or fp64. Overwritten.
        pieces: contiguous tensors of any shape on the wire's device: fp32, bf16 and fp16 in any mix, or all fp64 for an
            fp64 wire. Empty ones are allowed.
        scale: finite in fp32.
        anchor: flat and in the wire's order; fp32 (fp64 for an fp64 wire). Default: zeros.
        limit: >= 0. With ``finfo.max / N`` no sum of ``N`` wires overflows whose elements are all within it.

    Returns:
        How many elements of the wire are NaN, infinite or beyond ``[-limit, limit]``, as a 0-dim int64 tensor on its
        device. Infinite are those not finite in the pieces, and those too large for the wire's dtype.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a tensor on another device, not contiguous, of the wrong size, or sharing memory with another.

    Examples:
        >>> pieces = [torch.ones(2, 3), torch.tensor([4.0, float("inf")])]
        >>> wire = torch.empty(8)
        >>> pack(wire, pieces, scale=0.5)
        tensor(1)
        >>> wire
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 2.0000,    inf])
    """
    scale = check_number("scale", scale, "finite in fp32", lambda scale: abs(scale) < 3e38)
    limit = _check_limit(limit)
    _check_list("pieces", pieces)
    _check_views(written=True, wire=wire)
    _check_views(written=False, pieces=pieces, anchor=anchor)
    try:
        return _unchecked.pack(wire, pieces, scale, anchor, limit)
    except Exception as error:  # the dispatcher's own errors do not know the arguments' names
        _explain(error, _reference.check_pack, wire, pieces, anchor)
        raise


def unpack(
    wire: Tensor,
    pieces: Sequence[Tensor],
    *,
    divisor: float = 1.0,
    anchor: Tensor | None = None,
    slow: Tensor | None = None,
    slow_decay: float = 0.8,
    lrs: Sequence[Tensor] = (),
    schedule: Tensor | None = None,
    gain: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    r"""Write the replicas' mean into ``pieces``, in place, from the sum of the wires that :func:`pack` made::

        mean_i   = anchor_i + wire_i / divisor
        distance = sum_i (piece_i - mean_i)^2                    with the pieces as they were
        piece_i  = round(mean_i)
        anchor_i = piece_i                                       so that packing again gives zeros
        slow_i   = slow_i + (1 - slow_decay) * (mean_i - slow_i)
        lr_g     = round(schedule_g * gain_g * multiplier_g)

    Means are computed in fp32 (fp64 for an fp64 wire), distances in fp64 from differences of that precision, learning
    rates in fp64.

    The distance is summed in a fixed order, which does not depend on the number of threads:

    1. Each block of 2048 consecutive wire positions is four rows of 512, which are added one after the other.
    2. Of these 512 sums four neighbours at a time are added as ``(a + b) + (c + d)``.
    3. The resulting 128 sums are halved: ``s_i + s_{i + h}`` for ``h = 64, 32, ..., 1``.
    4. Block ``k`` is added to lane ``k mod 1024``, in the order of ``k``, and the 1024 lanes are halved likewise.

    Args:
        wire: as for :func:`pack`. Only read.
        pieces: as for :func:`pack`. Overwritten.
        divisor: what the wire is divided by, in one rounding: the number of wires summed, times their scale. Finite
            in fp32, and not 0.
        anchor: as for :func:`pack`. Overwritten.
        slow: the slow average of the means, laid out like ``anchor``. Overwritten.
        slow_decay: in [0, 1). With 0 the slow average becomes the mean, whatever it held before.
        lrs: one tensor of one element, fp32 or fp64, for each parameter group; on the wire's device. Overwritten.
        schedule, gain, multiplier: 1-D fp64 tensors on the wire's device, a number for each of ``lrs``. Read by the
            kernel and not by the host: a CUDA graph reads the current values at each replay.

    Returns:
        The squared distance, as a 0-dim float64 tensor on the wire's device.

    Raises:
        TypeError, ValueError: as :func:`pack`, and for a ``slow_decay`` outside [0, 1).
    """
    divisor = check_number("divisor", divisor, "finite in fp32 and not 0", lambda divisor: 0 < abs(divisor) < 3e38)
    slow_decay = check_number("slow_decay", slow_decay, "within [0, 1)", lambda decay: 0 <= decay < 1)
    arguments = (wire, pieces, divisor, anchor, slow, slow_decay, lrs, schedule, gain, multiplier)
    _check_list("pieces", pieces)
    _check_list("lrs", lrs)
    _check_views(written=True, pieces=pieces, lrs=lrs, anchor=anchor, slow=slow)
    _check_views(written=False, wire=wire, schedule=schedule, gain=gain, multiplier=multiplier)
    try:
        return _unchecked.unpack(*arguments)
    except Exception as error:
        _explain(error, _reference.check_unpack, wire, pieces, anchor, slow, lrs, schedule, gain, multiplier)
        raise


def all_finite(pieces: Sequence[Tensor], *, limit: float = math.inf) -> Tensor:
    """Whether every element of every tensor is finite and within ``[-limit, limit]``, as a 0-dim bool tensor on their
    device.

    Args:
        pieces: contiguous tensors of any shape, on one device; fp32, fp64, bf16 and fp16 in any mix. At least one.
        limit: >= 0.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for none, or a tensor on another device or not contiguous.
    """
    limit = _check_limit(limit)
    _check_list("pieces", pieces)
    _check_views(written=False, pieces=pieces)
    try:
        return _unchecked.all_finite(pieces, limit)
    except Exception as error:
        _explain(error, _reference.check_all_finite, pieces)
        raise


def scale_rates(
    lrs: Sequence[Tensor], schedule: Sequence[float], gain: Sequence[float], multiplier: Sequence[float]
) -> None:
    """Write the learning rates of all parameter groups, in place, in one launch for every 64 of them::

        lr_g = round(schedule_g * gain_g * multiplier_g)

    As :func:`unpack` does it in the launch that writes the mean. The product is taken in fp64.

    Args:
        lrs: one tensor of one element, fp32 or fp64, for each parameter group, all on one device. Overwritten.
        schedule, gain, multiplier: a number for each of ``lrs``. A CUDA graph keeps those of its capture.

    Raises:
        TypeError: for a wrong dtype, or what is no number.
        ValueError: for none, lists of another length, or tensors that are on another device or share memory.

    Examples:
        >>> lrs = [torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)]
        >>> scale_rates(lrs, schedule=[0.5, 0.5], gain=[2.0, 2.0], multiplier=[0.75, 1.25])
        >>> lrs
        [tensor(0.7500), tensor(1.2500, dtype=torch.float64)]
    """
    _check_list("lrs", lrs)
    _check_views(written=True, lrs=lrs)
    _reference.check_factors(len(lrs), schedule=schedule, gain=gain, multiplier=multiplier)
    try:
        _unchecked.scale_rates(lrs, schedule, gain, multiplier)
    except Exception as error:
        _explain(error, _reference.check_scale_rates, lrs, schedule, gain, multiplier)
        raise


def _check_limit(limit: float) -> float:
    return check_number("limit", limit, ">= 0, or inf", lambda limit: limit >= 0, finite=False)


def _check_list(name: str, tensors: object) -> None:
    # The dispatcher takes iterators, too, of which nothing is left afterwards.
    check_instance(name, tensors, (list, tuple), "a list of tensors")


def _check_views(*, written: bool, **arguments: object) -> None:
    """Raise ``ValueError`` for tensors whose memory is not theirs to read, or not ours to write. Other types are
    refused later.

    The dispatcher would hand a copy of a negated view to the kernel, which could not see what it shares."""
    if torch.compiler.is_compiling():
        return
    counts = written and not torch.is_inference_mode_enabled()
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_neg():
                raise ValueError(f"{name}: a negated view. Must be a tensor of its own: pass resolve_neg() of it.")
            if counts and tensor.is_inference():
                raise ValueError(
                    f"{name}: made under torch.inference_mode(), so that its version is not counted. Must be a normal "
                    "tensor: make it outside, or clone it there."
                )


def _explain(error: Exception, check: Callable[..., None], *arguments: object) -> None:
    """If the arguments break a rule, raise the reference's error for it in place of the kernel's."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as explained:
        raise explained from (None if str(error).startswith("hdet: ") else error)
