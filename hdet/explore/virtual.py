r"""Virtual replicas: K replicas on one device, each trained on one of the micro-batches of a step.

Under a shared gradient, SGD, momentum and Adam move every replica in proportion to its learning rate, so that the
parameters of replica ``k`` are::

    theta_k = start + rho_k (theta - start)

with ``start`` the parameters at the round's start and ``theta`` those of the run at the base learning rate. So a device
that accumulates gradients over K micro-batches can take each one's gradient at another replica's parameters, and apply
their mean once: it does what K processes would, with two more copies of the parameters and no communication.
Decoupled weight decay makes this inexact by ``(spread * lr * weight_decay)**2`` per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


class VirtualReplicas:
    """K replicas that share one model's memory.

    Args:
        optimizer: whose trained parameters move, each under its group's multiplier.
        count: ``K``.
    """

    def __init__(self, optimizer: Optimizer, count: int) -> None:
        self.count = count
        self._groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self._start = [[p.detach().clone() for p in group] for group in self._groups]
        self._theta = [[torch.empty_like(p) for p in group] for group in self._start]
        self._is_displaced = False  # the parameters are those of one replica, not theta
        self._visits = 0
        self._multipliers: list[Sequence[float]] = [(1.0,) * count] * len(self._groups)

    @torch.no_grad()
    def restart(self, multipliers: Sequence[Sequence[float]]) -> None:
        """Set ``start`` to the parameters as they are: at a round's start, and after the replicas were averaged.

        Args:
            multipliers: ``rho``, [parameter group][virtual replica].
        """
        self._multipliers = list(multipliers)
        for start, parameters in zip(self._start, self._groups, strict=True):
            torch._foreach_copy_(start, parameters)

    def visit(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the micro-batches, each with the parameters of its replica; afterwards they are ``theta`` again.

        Raises:
            ValueError: if there are not exactly K.
        """
        self._save_theta()
        self._visits += 1
        visit, visited = self._visits, 0
        try:
            for micro_batch in micro_batches:
                if visited == self.count:
                    raise ValueError(f"More than virtual_replicas={self.count} micro-batches in a step.")
                self._move_to(visited)
                visited += 1
                yield micro_batch
        finally:
            if visit == self._visits:  # else this generator was abandoned, and is closed during a later visit
                self._restore_theta()
        if visited != self.count:
            raise ValueError(
                f"Only {visited} micro-batches in a step with virtual_replicas={self.count}. Each virtual replica "
                "needs one."
            )

    @contextmanager
    def at(self, k: int) -> Iterator[None]:
        """Inside the ``with`` block the parameters are replica ``k``'s."""
        self._save_theta()
        try:
            self._move_to(k)
            yield
        finally:
            self._restore_theta()

    @torch.no_grad()
    def _save_theta(self) -> None:
        self._restore_theta()  # after an exception the generator of the last step may still be open
        self._is_displaced = True
        for theta, parameters in zip(self._theta, self._groups, strict=True):
            torch._foreach_copy_(theta, parameters)

    @torch.no_grad()
    def _move_to(self, k: int) -> None:
        groups = zip(self._groups, self._start, self._theta, self._multipliers, strict=True)
        for parameters, start, theta, multipliers in groups:
            torch._foreach_copy_(parameters, start)
            torch._foreach_lerp_(parameters, theta, multipliers[k])

    @torch.no_grad()
    def _restore_theta(self) -> None:
        if not self._is_displaced:
            return
        self._is_displaced = False
        for theta, parameters in zip(self._theta, self._groups, strict=True):
            torch._foreach_copy_(parameters, theta)
