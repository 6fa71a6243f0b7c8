r"""Virtual replicas: K points of the spread, visited by one device in turn.

Under a shared gradient, SGD, momentum and Adam move every replica in proportion to its learning rate, so that replica
``k`` stands at::

    theta_k = start + rho_k (theta - start)

with ``start`` the parameters at the round's start and ``theta`` the run at the base learning rate. So a device that
accumulates gradients over K micro-batches can take each one's gradient at another replica's point, and apply their mean
once: it does what K processes would, with two copies of the parameters and none of the communication. Decoupled weight
decay bends the line by ``(spread * lr * weight_decay)**2`` per step.
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
        self._is_away = False
        self._visits = 0
        self._multipliers: list[Sequence[float]] = [(1.0,) * count] * len(self._groups)

    @torch.no_grad()
    def restart(self, multipliers: Sequence[Sequence[float]]) -> None:
        """Begin again from the parameters as they are: a new round, or a mean.

        Args:
            multipliers: [group][k] ``rho``.
        """
        self._multipliers = list(multipliers)
        for start, live in zip(self._start, self._groups, strict=True):
            torch._foreach_copy_(start, live)

    def visit(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the micro-batches, each with the parameters at its replica's point; afterwards they are back.

        Raises:
            ValueError: if there are not exactly K.
        """
        self._leave_from()
        self._visits += 1
        visit, visited = self._visits, 0
        try:
            for micro_batch in micro_batches:
                if visited == self.count:
                    raise ValueError(f"More than virtual_replicas={self.count} micro-batches in a step.")
                self._go_to(visited)
                visited += 1
                yield micro_batch
        finally:
            if visit == self._visits:  # else it is the end of a loop that was given up, while another is under way
                self._come_back()
        if visited != self.count:
            raise ValueError(
                f"Only {visited} micro-batches in a step with virtual_replicas={self.count}. Each virtual replica "
                "needs one."
            )

    @contextmanager
    def at(self, k: int) -> Iterator[None]:
        """The parameters at replica ``k``'s point, meanwhile."""
        self._leave_from()
        try:
            self._go_to(k)
            yield
        finally:
            self._come_back()

    @torch.no_grad()
    def _leave_from(self) -> None:
        self._come_back()  # from a step that an exception has cut short: its loop may not have been closed yet
        self._is_away = True
        for theta, live in zip(self._theta, self._groups, strict=True):
            torch._foreach_copy_(theta, live)

    @torch.no_grad()
    def _go_to(self, k: int) -> None:
        for start, theta, live, rhos in zip(self._start, self._theta, self._groups, self._multipliers, strict=True):
            torch._foreach_copy_(live, start)
            torch._foreach_lerp_(live, theta, rhos[k])

    @torch.no_grad()
    def _come_back(self) -> None:
        if not self._is_away:
            return
        self._is_away = False
        for theta, live in zip(self._theta, self._groups, strict=True):
            torch._foreach_copy_(live, theta)
