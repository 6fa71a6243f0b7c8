"""Which tensors an average reads and writes, and through which buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.replicas.agreement import digest

Signature = tuple[list[int], list[int], list[bool]]


@dataclass
class Plan:
    """What to average and through which buckets. Valid as long as :func:`signature_of` the tensors is the same."""

    signature: Signature
    tensors: list[Tensor]
    """All of them, kept alive so that no other tensor can get the same id."""
    trained: list[Tensor]
    """Trainable ones among them; a tied one may come twice."""
    untrained: list[Tensor]
    """Frozen parameters and buffers, each once."""
    positions: list[int]
    """Of the untrained ones among all tensors."""
    buckets: list[Bucket]
    """Of the trainable parameters."""
    layout: int
    """Hash of the tensors' shapes, strides and dtypes, and of which are trained."""
    differing: tuple[int, ...] = ()
    """Indices of those in ``untrained`` that differed when last compared, such as BatchNorm's statistics. They are
    averaged from then on without comparing."""
    differing_buckets: list[Bucket] = field(default_factory=list)
    """Of those that differ, but for those that are infinite by design."""
    differing_infinite: list[Tensor] = field(default_factory=list)
    """Of those that differ, those that are infinite by design."""


def signature_of(kinds: Sequence[tuple[Tensor, bool]]) -> Signature:
    """It changes when a tensor is replaced, its memory moves, or it is frozen or unfrozen."""
    tensors, trained = zip(*kinds, strict=True) if kinds else ((), ())
    return list(map(id, tensors)), [t.data_ptr() for t in tensors], list(trained)


def make_plan(
    kinds: Sequence[tuple[Tensor, bool]], signature: Signature, fill: Callable[[list[Tensor]], list[Bucket]]
) -> Plan:
    """The plan for these tensors: each once, in the same order on every rank.

    Args:
        kinds: every tensor and whether it is trained; one that is tied may come twice.
        signature: of ``kinds``.
        fill: makes buckets of tensors.
    """
    seen: set[object] = set()
    trained: list[Tensor] = []
    untrained: list[Tensor] = []
    positions: list[int] = []
    for position, (tensor, is_trained) in enumerate(kinds):
        # Two tensor objects over the same memory are one tensor; an empty one has no memory to share.
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or key in seen:
            continue
        seen.add(key)
        (trained if is_trained else untrained).append(tensor)
        if not is_trained:
            positions.append(position)
    facts: list[Any] = [[(tuple(t.shape), t.stride(), str(t.dtype)) for t in kind] for kind in (trained, untrained)]
    facts.append([i for i, (_, is_trained) in enumerate(kinds) if not is_trained])
    return Plan(
        signature,
        tensors=[t for t, _ in kinds],
        trained=[t for t, is_trained in kinds if is_trained],
        untrained=untrained,
        positions=positions,
        buckets=fill(trained),
        layout=digest(facts),
    )
