"""Memory for the wires of an average, kept from one average to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.converge.delta import DeltaReference
from hdet.converge.piggyback import Piggyback
from hdet.converge.plan import Plan
from hdet.replicas.topology import Replicas


class WireMemory:
    """Two wires for every device and dtype, one of which may be part of a :class:`Piggyback`.

    Args:
        replicas: the group.
        bucket_bytes: size of one bucket.
        reference: says which buckets are sent as differences, and in which dtype.
        may_piggyback: whether the first bucket may be sent with the numbers that ranks exchange.
    """

    def __init__(
        self, replicas: Replicas, bucket_bytes: int, reference: DeltaReference, *, may_piggyback: bool
    ) -> None:
        self._replicas, self._bucket_bytes, self._reference = replicas, bucket_bytes, reference
        self._may_piggyback = may_piggyback
        self.piggyback: Piggyback | None = None
        """The message of the latest plan's first bucket; ``None`` where it is sent by itself."""
        self._wires: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def wire(self, bucket: Bucket, parity: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for the bucket's wire, of its size at least. Allocating pages anew would take as long as packing.

        Args:
            bucket: what is sent.
            parity: 0 or 1: which of the two.
            dtype: of the wire; default the bucket's.
        """
        key = (bucket.device, dtype or bucket.dtype, parity)
        wire = self._wires.get(key)
        if wire is None or wire.numel() < bucket.numel:
            wire = self._wires[key] = torch.empty(bucket.numel, dtype=key[1], device=bucket.device)
        return wire

    def fits(self, plan: Plan) -> bool:
        """Whether there is a piggyback in which this plan's first bucket can be sent."""
        piggyback = self.piggyback
        return (
            piggyback is not None
            and piggyback.layout == plan.layout
            and piggyback.wire.dtype == self._first_dtype(plan)
        )

    def piggyback_for(self, plan: Plan, numbers: int) -> Piggyback | None:
        """The piggyback for this plan, made anew if the present one does not fit.

        It is used at the first average too, with zeros for numbers: a backend's order of summation may depend on the
        size of a message, and a resumed run must equal the uninterrupted one bit for bit.

        Args:
            plan: on which the ranks have agreed.
            numbers: how many each rank exchanges.
        """
        if not self.fits(plan):
            self.piggyback = None
            self._wires.clear()
            ranks = self._replicas.size
            # With very many ranks an all-gather of the numbers sends less.
            if self._may_piggyback and plan.buckets and 0 < 64 * ranks * numbers <= self._bucket_bytes:
                first = plan.buckets[0]
                wire = torch.empty(first.numel, dtype=self._first_dtype(plan), device=first.device)
                self.piggyback = Piggyback(plan.layout, wire, ranks, self._replicas.rank, numbers)
                self._wires[first.device, wire.dtype, 0] = self.piggyback.memory
        return self.piggyback

    def _first_dtype(self, plan: Plan) -> torch.dtype:
        is_delta = self._reference.of(plan.layout, 0) is not None
        return self._reference.dtype if is_delta and self._reference.dtype else plan.buckets[0].dtype
