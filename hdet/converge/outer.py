r"""The outer optimizer for local gradients: Nesterov momentum on the change of a whole round, as in DiLoCo and SlowMo.

Round ``k`` begins at the anchor ``a_k``, and the replicas' mean at its end is ``m_k``::

    d_k     = a_k - m_k                       the averaged displacement, as a gradient
    v_{k+1} = mu v_k + d_k
    a_{k+1} = a_k - nu (d_k + mu v_{k+1})     Nesterov; all replicas go on from here

with ``mu`` the argument ``Outer.momentum``, in [0, 1), and ``nu`` the argument ``Outer.lr``, > 0; ``mu = 0`` and
``nu = 1`` give the plain average, ``a_{k+1} = m_k``. The first round's mean is the first anchor, since the replicas may
have started from different parameters: momentum acts from the second round on.

References: DiLoCo (arXiv 2311.08105), SlowMo (arXiv 1910.00643).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket


class OuterMomentum:
    """Anchor and velocity, in fp32 (fp64 for fp64 parameters): two copies of the trainable parameters, flat by bucket;
    of a sharded model each rank keeps those of its shard.

    Args:
        momentum: ``mu``.
        lr: ``nu``.
    """

    def __init__(self, momentum: float, lr: float) -> None:
        self.momentum, self.lr = momentum, lr
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._layout: int | None = None

    def restart(self) -> None:
        """Begin again: the next mean is the anchor, and the velocity zero."""
        self._parts = []

    def follow(self, layout: int) -> bool:
        """Begin again if other parameters are trained than in the last round, which are hashed in ``layout``; whether
        that was so."""
        changed = bool(self._parts) and self._layout not in (None, layout)
        if changed:
            self.restart()
        self._layout = layout
        return changed

    @torch.no_grad()
    def step(self, buckets: Sequence[Bucket]) -> None:
        """Replace the parameters, which are the replicas' mean, by the next anchor, in place.

        Raises:
            RuntimeError: if the buckets are others than those of a loaded state.
        """
        if not self._parts:
            means = [bucket.pack() for bucket in buckets]
            self._parts = [(mean, torch.zeros_like(mean)) for mean in means]
            return
        if [anchor.numel() for anchor, _ in self._parts] != [bucket.numel for bucket in buckets]:
            raise RuntimeError(
                "The saved outer momentum is of other trainable parameters, or of other buckets, than this run has. "
                "Resume with the same bucket_mib and the same layers frozen; freeze and release them after the first "
                "round."
            )
        for i, bucket in enumerate(buckets):
            anchor, velocity = (part.to(bucket.device) for part in self._parts[i])
            displacement = anchor - bucket.pack()
            velocity.mul_(self.momentum).add_(displacement)
            anchor.sub_(displacement.add_(velocity, alpha=self.momentum), alpha=self.lr)
            bucket.write(anchor)
            self._parts[i] = anchor, velocity

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """(anchor, velocity) by bucket, to be saved."""
        return list(self._parts)

    def load(self, state: Iterable[Sequence[Tensor]]) -> None:
        """Continue from a saved :meth:`state`, cut into the same buckets."""
        self._layout = None
        self._parts = [(anchor.clone(), velocity.clone()) for anchor, velocity in state]
