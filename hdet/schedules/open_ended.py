"""Schedules that go on for any number of steps, until a final phase is asked for. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hdet.errors import check_choice, check_field, check_number, check_whole
from hdet.schedules.curves import check_step, half_cosine, interpolate, progress, warmup


@dataclass(frozen=True, kw_only=True)
class constant:
    """The peak throughout, after a linear warm-up.

    ``factor(t) = min(1, (t + 1) / (W + 1))``, the gradual warm-up of Goyal et al. 2017, arXiv 1706.02677.

    Args:
        warmup_steps: ``W`` >= 0.

    Examples:
        >>> factor = constant(warmup_steps=3)
        >>> [factor(t) for t in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_field(self, "warmup_steps", check_whole, ">= 0", lambda n: n >= 0)

    def __call__(self, step: int) -> float:
        step = check_step(step)
        return warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class power:
    r"""The Power scheduler: a power law in the tokens seen, the same for every batch size and run length.

    Shen et al. 2024, "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler", arXiv
    2408.13359, eqs. 7 and 8. With ``n = t * beta * sequence_length`` the tokens already trained on::

        g(t)      = min(eta_max, beta * a * n ** b) / eta_max
        factor(t) = (t + 1) / (W + 1) * g(W)      t < W
                  = g(t)                          W <= t < S, or for ever without decay_start
                  = e(p) * g(S)                   t >= S, with p = (t - S) / D
        e(p)      = (exp(1 - p) - 1) / (exp(1) - 1)

    The formula gives absolute learning rates: **the optimizer's** ``lr`` **must be** ``max_lr``. The cap holds until
    ``n = (eta_max / (beta * a)) ** (1 / b)`` tokens; a longer warm-up peaks at ``g(W)``, below 1. The paper leaves the
    decay's form open and decays "exponentially to 0"; ``e`` is how the authors' training code does it
    (github.com/IBM/dolomite-engine, ``ExponentialScheduler`` with ``lr_decay_factor=0``). The defaults are the
    paper's, found under muP.

    Args:
        batch_size: ``beta`` >= 1, in **sequences**, over all replicas.
        sequence_length: tokens per sequence >= 1.
        max_lr: ``eta_max`` > 0.
        amplitude: ``a`` > 0.
        exponent: ``b`` < 0.
        warmup_steps: ``W`` >= 0.
        decay_start: ``S`` >= W, the step at which the final decay begins; ``None`` for never (yet).
        decay_steps: ``D``, length of the final decay to 0: >= 1 with a ``decay_start``, else 0.

    Examples:
        >>> factor = power(batch_size=1024, sequence_length=4096, warmup_steps=250)
        >>> [round(0.02 * factor(t), 5) for t in (0, 250, 5_000, 50_000, 250_000)]
        [8e-05, 0.02, 0.02, 0.00689, 0.00303]
    """

    batch_size: int
    sequence_length: int
    max_lr: float = 0.02
    amplitude: float = 4.0
    exponent: float = -0.51
    warmup_steps: int = 0
    decay_start: int | None = None
    decay_steps: int = 0

    def __post_init__(self) -> None:
        check_field(self, "batch_size", check_whole, ">= 1, in sequences", lambda n: n >= 1)
        check_field(self, "sequence_length", check_whole, ">= 1, in tokens", lambda n: n >= 1)
        check_field(self, "max_lr", check_number, "> 0, and the optimizer's lr", lambda x: x > 0)
        check_field(self, "amplitude", check_number, "> 0", lambda x: x > 0)
        check_field(
            self, "exponent", check_number, "< 0: the learning rate falls with the tokens seen", lambda x: x < 0
        )
        check_field(self, "warmup_steps", check_whole, ">= 0", lambda n: n >= 0)
        _check_final_phase(self, "decay", self.warmup_steps)

    def __call__(self, step: int) -> float:
        step = check_step(step)
        power_step = max(step, self.warmup_steps)  # the power law starts at W and ends at S
        decay = 1.0
        if self.decay_start is not None:
            power_step = min(power_step, self.decay_start)
            p = progress(step, self.decay_start, self.decay_start + self.decay_steps)
            decay = math.expm1(1.0 - p) / math.expm1(1.0)
        tokens = power_step * self.batch_size * self.sequence_length
        # With no tokens n ** b is infinite, and the cap holds.
        lr = self.batch_size * self.amplitude * float(tokens) ** self.exponent if tokens else math.inf
        return warmup(step, self.warmup_steps) * decay * min(1.0, lr / self.max_lr)


@dataclass(frozen=True, kw_only=True)
class infinite:
    r"""Infinite schedule for continual pre-training: warm-up, cooldown to a constant, which holds for any time.

    Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models", arXiv
    2403.08763, section 7; Singh et al. 2025, "Beyond Cosine Decay", arXiv 2503.02844. After the linear warm-up, with
    ``p = (t - W) / C`` and ``q = (t - S) / A``, both clamped to [0, 1]::

        factor(t) = k + (1 - k) * s(p)            before S
                  = k * (f / k) ** q              from S on
        s(p)      = (1 + cos(pi p)) / 2           cooldown_type "cosine"
                  = 1 - h(p) / h(1)               cooldown_type "inverse_sqrt", h(p) = 1 / sqrt(1 + 10 p) - 1

    (the 10 is that of public implementations). To train on new data, go on from the constant phase; to get a model for
    use, anneal from any of its checkpoints.

    Args:
        cooldown_steps: ``C`` >= 1.
        constant_factor: ``k`` in (0, 1]. Ibrahim et al.: 0.55.
        warmup_steps: ``W`` >= 0.
        cooldown_type: ``"cosine"`` or ``"inverse_sqrt"``.
        anneal_start: ``S`` >= W + C, the step at which the final annealing begins; ``None`` for never (yet).
        anneal_steps: ``A``, length of the final annealing: >= 1 with an ``anneal_start``, else 0.
        final_factor: ``f`` in (0, k], used with an ``anneal_start``. Ibrahim et al.: 0.1.

    Examples:
        >>> factor = infinite(cooldown_steps=4, constant_factor=0.4, anneal_start=6, anneal_steps=2)
        >>> [round(factor(t), 3) for t in range(10)]
        [1.0, 0.912, 0.7, 0.488, 0.4, 0.4, 0.4, 0.2, 0.1, 0.1]
    """

    cooldown_steps: int
    constant_factor: float
    warmup_steps: int = 0
    cooldown_type: str = "cosine"
    anneal_start: int | None = None
    anneal_steps: int = 0
    final_factor: float = 0.1

    def __post_init__(self) -> None:
        check_field(self, "warmup_steps", check_whole, ">= 0", lambda n: n >= 0)
        check_field(self, "cooldown_steps", check_whole, ">= 1", lambda n: n >= 1)
        check_field(self, "cooldown_type", check_choice, ["cosine", "inverse_sqrt"])
        check_field(self, "constant_factor", check_number, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_final_phase(self, "anneal", self.warmup_steps + self.cooldown_steps)
        check_field(self, "final_factor", check_number, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.anneal_start is not None:
            low = self.constant_factor
            check_field(
                self,
                "final_factor",
                check_number,
                f"<= constant_factor={low}, from which it anneals",
                lambda x: x <= low,
            )

    def __call__(self, step: int) -> float:
        step = check_step(step)
        if self.anneal_start is not None and step >= self.anneal_start:
            q = progress(step, self.anneal_start, self.anneal_start + self.anneal_steps)
            return float(self.constant_factor * (self.final_factor / self.constant_factor) ** q)
        p = progress(step, self.warmup_steps, self.warmup_steps + self.cooldown_steps)
        shape = half_cosine(p) if self.cooldown_type == "cosine" else _inverse_sqrt(p)
        return warmup(step, self.warmup_steps) * interpolate(shape, self.constant_factor)


def _inverse_sqrt(p: float) -> float:
    """``s(p)`` of cooldown_type "inverse_sqrt" in :class:`infinite`."""
    return 1.0 - (1 / math.sqrt(1 + 10 * p) - 1) / (1 / math.sqrt(11) - 1)


def _check_final_phase(schedule: power | infinite, name: str, earliest: int) -> None:
    """Check ``<name>_start`` (``None`` or >= ``earliest``) and ``<name>_steps`` of a final phase."""
    if getattr(schedule, f"{name}_start") is None:
        check_field(
            schedule,
            f"{name}_steps",
            check_whole,
            f"0 without {name}_start: pass the step at which it begins",
            lambda n: n == 0,
        )
        return
    check_field(
        schedule,
        f"{name}_start",
        check_whole,
        f">= {earliest}, the end of the phases before it",
        lambda n: n >= earliest,
    )
    check_field(schedule, f"{name}_steps", check_whole, f">= 1 with {name}_start", lambda n: n >= 1)
