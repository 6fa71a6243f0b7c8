"""Slow averages of the converged means over the rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket


class SlowAverage:
    """Two averages of the means ``m`` over the rounds; both are ``m`` in the first. In round ``n``::

        w = (power + 1) / (power + n)
        e <- e + w (m - e)        the slow average
        f <- f + w (e - f)        the trail, an average of the slow average

    So ``e`` weighs round ``t`` by about ``t**power`` (polynomial-decay averaging: Shamir and Zhang 2013, arXiv
    1212.1824): it averages over the same share of the past at any time. Where ``m`` moves steadily, ``e - f`` is
    :attr:`lag` rounds of progress, with less noise than the difference of two means. Both are kept flat, by bucket of
    the trainable parameters; of a sharded model each rank keeps those of its shard. They are updated in the pass that
    writes the mean.

    Args:
        power: >= 0; 0 is the plain average over all rounds, a larger one gives later rounds more weight.
        dtype: of what is kept; ``None`` for the wire's (fp32 for all but fp64 parameters).
        device: of what is kept; ``None`` for the parameters'.
    """

    def __init__(self, power: float, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.power, self.dtype, self.device = power, dtype, device
        self.rounds = 0
        """``n``: means averaged so far."""
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._layout: int | None = None

    @property
    def lag(self) -> float:
        """Rounds from the trail to the slow average, ``(n - 1) (power + 1) / (power + 2)**2``; in the first round, in
        which they are equal, as in the second."""
        return max(1, self.rounds - 1) * (self.power + 1) / (self.power + 2) ** 2

    def restart(self) -> None:
        """Begin again at the next mean."""
        self.rounds, self._parts = 0, []

    def follow(self, layout: int) -> bool:
        """Begin again if other parameters are trained than in the last round, which are hashed in ``layout``; whether
        that was so."""
        changed = bool(self._parts) and self._layout not in (None, layout)
        if changed:
            self.restart()
        self._layout = layout
        return changed

    def unpack(self, index: int, bucket: Bucket, wire: Tensor, count: float, anchor: Tensor | None = None) -> Tensor:
        """``bucket.unpack(wire, count, anchor=anchor)``, and update bucket ``index`` of both averages. To be called for
        the buckets in their order; bucket 0 begins a round."""
        if index == 0:
            self.rounds += 1
        if index == len(self._parts):
            slow = torch.empty_like(wire, dtype=bucket.dtype)
            distance = bucket.unpack(wire, count, slow, anchor=anchor)
            kept = slow.to(self.device or wire.device, self.dtype or wire.dtype)
            self._parts.append((kept, kept.clone()))
            return distance
        kept, trail = self._parts[index]
        if kept.shape != wire.shape:
            raise RuntimeError(
                "The saved slow average of the probe is of other trainable parameters, or of other buckets, than this "
                "run has. Resume with the same bucket_mib and the same layers frozen; freeze and release them after "
                "the first round."
            )
        slow = kept.to(wire.device, bucket.dtype)
        weight = (self.power + 1) / (self.power + self.rounds)
        distance = bucket.unpack(wire, count, slow, 1 - weight, anchor)
        if slow is kept:
            trail.lerp_(kept, weight)
        else:
            new_trail = trail.to(wire.device, bucket.dtype).lerp_(slow, weight)
            generator = torch.Generator(wire.device).manual_seed(self.rounds * 2**16 + index)
            kept.copy_(_rounded(slow, kept.dtype, generator))
            trail.copy_(_rounded(new_trail, trail.dtype, generator))
        return distance

    def point(self, index: int, distance: float, like: Tensor, shares: Sequence[tuple[int, float]] = ()) -> Tensor:
        """``e + distance (e - f)`` in bucket ``index``, on the device and in the dtype of ``like``.

        Args:
            shares: (number of elements, factor of ``e - f``) for all runs of the bucket's elements, in order.
        """
        slow, trail = (part.to(like.device, like.dtype) for part in self._parts[index])
        progress = slow - trail
        if shares:
            for part, (_, share) in zip(progress.split([count for count, _ in shares]), shares, strict=True):
                part.mul_(share)
        return torch.add(slow, progress, alpha=distance)

    def mirrored(self, index: int, mean: Tensor) -> Tensor:
        """``e - (m - e)`` in bucket ``index``: the mean's mirror image in the slow average."""
        slow, _ = self._parts[index]
        return slow.to(mean.device, mean.dtype).mul(2).sub_(mean)

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """(slow average, trail) by bucket, to be saved."""
        return list(self._parts)

    def load(self, state: Iterable[Sequence[Tensor]], rounds: int) -> None:
        """Continue from a saved :meth:`state`, cut into the same buckets, after as many ``rounds``."""
        self.rounds, self._layout = rounds, None
        self._parts = [
            (
                slow.clone().to(self.device or slow.device, self.dtype or slow.dtype),
                trail.clone().to(self.device or slow.device, self.dtype or slow.dtype),
            )
            for slow, trail in state
        ]


def _rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``x`` in ``dtype``. If that is less precise than fp32, rounded up or down at random with ``x`` as the expected
    value: an average over hundreds of rounds changes by less than half a bf16 digit per round."""
    bits_lost = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))
    if bits_lost <= 0:
        return x.to(dtype)
    bits = x.float().view(torch.int32)
    noise = torch.randint(2**bits_lost, bits.shape, generator=generator, dtype=torch.int32, device=x.device)
    return bits.add(noise).bitwise_and_(-(2**bits_lost)).view(torch.float32).to(dtype)
