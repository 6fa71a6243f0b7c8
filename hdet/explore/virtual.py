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

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hdet.model.step_hook import BeforeStep


class VirtualReplicas:
    """K replicas that share one model's memory.

    They follow the model. What is written into the parameters before the optimizer's first step of a round moves
    ``start``, so that weights loaded by then are every replica's; weights loaded later by ``load_state_dict()`` bring
    all replicas together there. A parameter that is frozen rests at ``theta``; one that is released starts from its
    value then.

    Args:
        optimizer: whose trained parameters move, each under its group's multiplier.
        count: ``K``.
    """

    def __init__(self, optimizer: Optimizer, count: int) -> None:
        self.count = count
        self.has_loaded: Callable[[], bool] = lambda: False
        """Whether other weights were loaded since the last call."""
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        self._trained: list[list[bool]] = []
        self._groups: list[list[Tensor]] = []
        self._start: list[list[Tensor]] = []
        self._theta: list[list[Tensor]] = []
        self._version = 0
        self._is_displaced = False  # the parameters are those of one replica, not theta
        self._is_round_new = True  # the optimizer has taken no step since restart()
        self._before_step = BeforeStep(optimizer, self._leave_start)
        self._has_hooks = True  # the optimizer calls them
        self._visits = self._first_visit = 0
        self._multipliers: list[Sequence[float]] = [(1.0,) * count] * len(self._parameters)
        self._follow()

    @torch.no_grad()
    def restart(self, multipliers: Sequence[Sequence[float]]) -> None:
        """Set ``start`` to the parameters as they are: at a round's start, and after the replicas were averaged.

        Args:
            multipliers: ``rho``, [parameter group][virtual replica].
        """
        self._multipliers = list(multipliers)
        self._follow()
        self._gather()
        if self._is_round_new and self._visits > self._first_visit + 1:
            self._has_hooks = False  # as where a CUDA graph takes the step
        self._is_round_new, self._first_visit = True, self._visits
        self._before_step.arm()

    def close(self) -> None:
        """The parameters are ``theta`` from now on."""
        self._restore_theta()
        self._before_step.remove()
        self._visits += 1

    def _leave_start(self) -> None:
        self._before_step.disarm()
        self._is_round_new = False

    def _gather(self) -> None:
        _copy(self._start, self._groups)
        self._version = self._version_now()

    def _version_now(self) -> int:
        """It grows when a parameter is written in place."""
        return sum(p._version for group in self._groups for p in group)

    def _follow(self) -> None:
        """Keep copies of those parameters that are trained now. One that was not until now starts where it is."""
        trained = [[p.requires_grad for p in group] for group in self._parameters]
        if trained == self._trained and all(
            start.dtype == p.dtype and start.device == p.device and start.shape == p.shape
            for starts, group in zip(self._start, self._groups, strict=True)
            for start, p in zip(starts, group, strict=True)
        ):
            return
        pairs = zip(self._groups, self._start, strict=True)
        known = {id(p): start for group, starts in pairs for p, start in zip(group, starts, strict=True)}
        self._trained = trained
        self._groups = [[p for p in group if p.requires_grad] for group in self._parameters]

        def start_of(p: Tensor) -> Tensor:
            start = known.get(id(p))
            fits = start is not None and (start.dtype, start.device, start.shape) == (p.dtype, p.device, p.shape)
            return start if start is not None and fits else p.detach().clone()

        self._start = [[start_of(p) for p in group] for group in self._groups]
        self._theta = [[torch.empty_like(start) for start in group] for group in self._start]

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
        self._follow()
        is_first = self._is_round_new and (self._has_hooks or self._visits == self._first_visit)
        if self.has_loaded() or (is_first and self._version != self._version_now()):
            self._gather()
        self._is_displaced = True
        _copy(self._theta, self._groups)

    @torch.no_grad()
    def _move_to(self, k: int) -> None:
        _copy(self._groups, self._start)
        for parameters, theta, multipliers in zip(self._groups, self._theta, self._multipliers, strict=True):
            if parameters:
                torch._foreach_lerp_(parameters, theta, multipliers[k])

    @torch.no_grad()
    def _restore_theta(self) -> None:
        if not self._is_displaced:
            return
        self._is_displaced = False
        _copy(self._groups, self._theta)
        if self._is_round_new:
            self._version = self._version_now()


def _copy(to: Sequence[list[Tensor]], of: Sequence[list[Tensor]]) -> None:
    """[parameter group][parameter] from others. All of a group may be frozen: torch's operators refuse empty lists."""
    for mine, theirs in zip(to, of, strict=True):
        if mine:
            torch._foreach_copy_(mine, theirs)
