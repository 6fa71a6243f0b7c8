"""Schedules that fall from the peak to a final value at a known last step. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hdet.errors import check_choice, check_field, check_number, check_whole
from hdet.schedules.curves import check_step, half_cosine, interpolate, progress, warmup


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """Linear warm-up, then from the peak to ``final_factor`` along a shape that subclasses define."""

    total_steps: int
    warmup_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        check_field(self, "total_steps", check_whole, ">= 1", lambda n: n >= 1)
        check_field(
            self,
            "warmup_steps",
            check_whole,
            f"in [0, total_steps={self.total_steps})",
            lambda n: 0 <= n < self.total_steps,
        )
        check_field(self, "final_factor", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)

    def __call__(self, step: int) -> float:
        step = check_step(step)
        p = progress(step, self.warmup_steps, self.total_steps)
        return warmup(step, self.warmup_steps) * interpolate(self._shape(p), self.final_factor)

    def _shape(self, p: float) -> float:
        """From 1 at ``p = 0`` to 0 at ``p = 1``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class linear(_Decay):
    """Linear decay from the peak to ``final_factor``, after a linear warm-up.

    ``factor(t) = f + (1 - f) * (1 - p)`` with ``p = (t - W) / (T - W)``. With ``f = 0`` it is the schedule that the
    worst-case analysis of the last iterate singles out: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning
    Rate Scheduling by Refinement", arXiv 2310.07831.

    Args:
        total_steps: ``T`` >= 1.
        warmup_steps: ``W`` in [0, T).
        final_factor: ``f`` in [0, 1].

    Examples:
        >>> factor = linear(total_steps=4)
        >>> [factor(t) for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def _shape(self, p: float) -> float:
        return 1.0 - p


@dataclass(frozen=True, kw_only=True)
class cosine(_Decay):
    """Half a cosine from the peak to ``final_factor``, after a linear warm-up.

    ``factor(t) = f + (1 - f) * (1 + cos(pi p)) / 2`` with ``p = (t - W) / (T - W)``: one cycle, without restarts, of
    Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983.

    Args:
        total_steps: ``T`` >= 1.
        warmup_steps: ``W`` in [0, T).
        final_factor: ``f`` in [0, 1].

    Examples:
        >>> factor = cosine(total_steps=100, final_factor=0.1)
        >>> [round(factor(t), 3) for t in (0, 25, 50, 75, 100, 101)]
        [1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """

    def _shape(self, p: float) -> float:
        return half_cosine(p)


@dataclass(frozen=True, kw_only=True)
class rex(_Decay):
    """Reflected exponential decay: close to the peak for long, then steep; after a linear warm-up.

    ``factor(t) = f + (1 - f) * (1 - p) / (1/2 + (1 - p) / 2)`` with ``p = (t - W) / (T - W)``. Chen, Wolfe, Kyrillidis
    2021, "REX: Revisiting Budgeted Training with an Improved Schedule", arXiv 2107.04197; there ``W = f = 0``.

    Args:
        total_steps: ``T`` >= 1.
        warmup_steps: ``W`` in [0, T).
        final_factor: ``f`` in [0, 1].

    Examples:
        >>> factor = rex(total_steps=4)
        >>> [round(factor(t), 3) for t in range(6)]
        [1.0, 0.857, 0.667, 0.4, 0.0, 0.0]
    """

    def _shape(self, p: float) -> float:
        return (1.0 - p) / (0.5 + (1.0 - p) / 2)


@dataclass(frozen=True, kw_only=True)
class uba(_Decay):
    r"""Unified budget-aware schedule: one parameter spans nearly constant, cosine and early decay.

    One cycle of Tang et al. 2025, "Stepsize anything: A unified learning rate schedule for budgeted-iteration
    training", arXiv 2505.24452, with ``p = (t - W) / (T - W)`` and ``c = 1 + cos(pi p)``::

        factor(t) = f + (1 - f) * 2 c / (2 phi + (2 - phi) c)

    ``phi = 2`` is :class:`cosine`; ``phi = 1`` is the profile of :class:`rex` applied to the cosine; ``phi -> 0`` stays
    at the peak until the end, and a large ``phi`` falls at once. The authors relate ``phi`` to the condition number.

    Args:
        total_steps: ``T`` >= 1.
        phi: ``phi`` > 0.
        warmup_steps: ``W`` in [0, T). The warm-up is not part of the published schedule.
        final_factor: ``f = eta_min / eta_max`` in [0, 1].

    Examples:
        >>> [round(uba(total_steps=100, phi=phi)(50), 3) for phi in (0.5, 1, 2, 5)]
        [0.8, 0.667, 0.5, 0.286]
    """

    phi: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            self,
            "phi",
            check_number,
            "> 0: 2 is the cosine, and a smaller one stays near the peak for longer",
            lambda x: x > 0,
        )

    def _shape(self, p: float) -> float:
        u = half_cosine(p)  # c = 2u; in this order the denominator is exactly 2 at the peak for every phi
        return 2 * u / (self.phi * (1 - u) + 2 * u)


@dataclass(frozen=True, kw_only=True)
class warmup_stable_decay(_Decay):
    """Warmup-stable-decay (WSD): linear warm-up, then the peak, then a decay over the last ``decay_steps``.

    With ``p = (t - (T - D)) / D``, which is 0 until the decay starts::

        linear       factor(t) = f + (1 - f) * (1 - p)
        cosine       factor(t) = f + (1 - f) * (1 + cos(pi p)) / 2
        sqrt         factor(t) = f + (1 - f) * (1 - sqrt(p))
        exponential  factor(t) = f ** p

    The schedule is of Hu et al. 2024, "MiniCPM", arXiv 2404.06395, who decay exponentially (as we read their formula,
    with a half-life of ``h`` = 5000 steps: ``f = 0.5 ** (D / h)``) and find ``D = 0.1 T`` enough. The "1-sqrt" decay,
    and the finding that it does better than the linear one, are of Hägele et al. 2024, "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", arXiv 2405.18392; the four formulas are those of their
    code, github.com/epfml/schedules-and-scaling.

    Args:
        total_steps: ``T`` >= 1.
        decay_steps: ``D`` in [1, T - W].
        warmup_steps: ``W`` in [0, T).
        decay_type: ``"sqrt"``, ``"linear"``, ``"cosine"`` or ``"exponential"``.
        final_factor: ``f`` in [0, 1]; > 0 if the decay is exponential.

    Examples:
        >>> factor = warmup_stable_decay(total_steps=8, decay_steps=4, warmup_steps=1)
        >>> [round(factor(t), 3) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134, 0.0, 0.0]
    """

    decay_steps: int
    decay_type: str = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        available = self.total_steps - self.warmup_steps
        check_field(
            self,
            "decay_steps",
            check_whole,
            f"in [1, total_steps - warmup_steps = {available}]",
            lambda n: 1 <= n <= available,
        )
        check_field(self, "decay_type", check_choice, ["sqrt", "linear", "cosine", "exponential"])
        if self.decay_type == "exponential":
            check_field(
                self, "final_factor", check_number, "> 0: an exponential decay never reaches 0", lambda x: x > 0
            )

    def __call__(self, step: int) -> float:
        step = check_step(step)
        p = progress(step, self.total_steps - self.decay_steps, self.total_steps)
        if self.decay_type == "exponential":
            return warmup(step, self.warmup_steps) * float(self.final_factor**p)
        return warmup(step, self.warmup_steps) * interpolate(self._shape(p), self.final_factor)

    def _shape(self, p: float) -> float:
        if self.decay_type == "cosine":
            return half_cosine(p)
        return 1.0 - (math.sqrt(p) if self.decay_type == "sqrt" else p)
