"""What an average reads and writes, and through which buckets; found once, while tensors stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.replicas.agreement import digest

Signature = tuple[list[int], list[int], list[bool]]


@dataclass
class Plan:
    """What to average and through which buckets, as long as the tensors stay where they are."""

    signature: Signature
    tensors: list[Tensor]
    """Kept alive, so that no other tensor can have the same id."""
    trained: list[Tensor]
    """Trainable ones among them."""
    constant: list[Tensor]
    """Frozen parameters and buffers, each once."""
    buckets: list[Bucket]
    """Of the trainable parameters."""
    layout: int
    moving: tuple[int, ...] = ()
    """Which of ``constant`` differed when they were last compared: BatchNorm's statistics. Taken to differ again."""
    moving_buckets: list[Bucket] = field(default_factory=list)


def signature_of(kinds: Sequence[tuple[Tensor, bool]]) -> Signature:
    """By which it is seen that a tensor is another, lies elsewhere, or was frozen or released since."""
    return ([id(t) for t, _ in kinds], [t.data_ptr() for t, _ in kinds], [trained for _, trained in kinds])


def make_plan(
    kinds: Sequence[tuple[Tensor, bool]], signature: Signature, fill: Callable[[list[Tensor]], list[Bucket]]
) -> Plan:
    """Each tensor once, in the same order on every rank.

    Args:
        kinds: every tensor and whether it is trained; one that is tied may come twice.
        signature: of ``kinds``.
        fill: makes the buckets of the trainable ones.
    """
    seen: set[object] = set()
    trained: list[Tensor] = []
    constant: list[Tensor] = []
    for tensor, is_trained in kinds:
        # Two tensor objects over the same memory are one tensor; an empty one has no memory to share.
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or key in seen:
            continue
        seen.add(key)
        (trained if is_trained else constant).append(tensor)
    facts = [[(tuple(t.shape), t.stride(), str(t.dtype)) for t in kind] for kind in (trained, constant)]
    tensors, versioned = [t for t, _ in kinds], [t for t, is_trained in kinds if is_trained]
    return Plan(signature, tensors, versioned, constant, fill(trained), digest(facts))
