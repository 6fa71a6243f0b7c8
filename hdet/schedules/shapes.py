r"""Base schedules: the learning rate's shape over training, as pure functions of the step. No torch here.

Each schedule is called once with its arguments, which it validates, and gives a callable ``factor(step)``: the
learning rate at a step divided by the optimizer's ``lr``, which is the peak. It fits wherever such a callable does::

    torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.cosine(total_steps=1000))
    hdet.Ensemble(optimizer, schedule=schedules.cosine(total_steps=1000))

What they share:

- **Steps** count from 0: ``factor(t)`` is for the update after ``t`` others. A run of ``total_steps`` updates sees
  ``factor(0)`` to ``factor(total_steps - 1)``; the final value is reached at ``factor(total_steps)``, as in torch's
  ``CosineAnnealingLR``. Only :class:`one_cycle` reaches it one step earlier, as torch's ``OneCycleLR`` does.
- **Warm-up** is linear: the factor is multiplied by ``min(1, (t + 1) / (warmup_steps + 1))``. So steps 0 to
  ``warmup_steps - 1`` are below the peak, step ``warmup_steps`` is the first at it, and no step is wasted at 0. It is
  torch's ``LinearLR(start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)``.
- **Progress** is ``p = (t - start) / (end - start)``, clamped to [0, 1]: **past its end a schedule holds its final
  value**, so training on is safe and slow rather than an error.
- Values lie in [0, 1], and never rise again after the peak.
- All arguments are keywords; one outside its range raises ``ValueError``.

``LambdaLR.state_dict()`` saves a schedule's arguments (plain numbers and strings, readable with
``torch.load(weights_only=True)``), and loading it **restores** them. To resume under other arguments, for a longer run
or to begin the final decay, build the scheduler with the new ones and leave the saved ones out::

    state["lr_lambdas"] = [None] * len(state["lr_lambdas"])  # of hdet.Ensemble: state["schedule"]["lr_lambdas"]
    scheduler.load_state_dict(state)

The names are lower-case because they are used as functions are; being frozen dataclasses, they compare, print, pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

__all__ = [
    "constant",
    "cosine",
    "infinite",
    "linear",
    "one_cycle",
    "power",
    "rex",
    "uba",
    "warmup_stable_decay",
]


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
        _whole(self, "warmup_steps", lambda n: n >= 0, ">= 0")

    def __call__(self, step: int) -> float:
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """Linear warm-up, then from the peak to ``final_factor`` along a shape that subclasses define."""

    total_steps: int
    warmup_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _whole(self, "total_steps", lambda n: n >= 1, ">= 1")
        _whole(self, "warmup_steps", lambda n: 0 <= n < self.total_steps, f"in [0, total_steps={self.total_steps})")
        _real(self, "final_factor", lambda x: 0 <= x <= 1, "in [0, 1]")

    def __call__(self, step: int) -> float:
        p = _progress(step, self.warmup_steps, self.total_steps)
        return _warmup(step, self.warmup_steps) * _blend(self._shape(p), self.final_factor)

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
        return _half_cosine(p)


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
    r"""Unified budget-aware schedule: one parameter from nearly constant, by way of cosine, to early decay.

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
        _real(self, "phi", lambda x: x > 0, "> 0: 2 is the cosine, and a smaller one stays near the peak for longer")

    def _shape(self, p: float) -> float:
        u = _half_cosine(p)  # c = 2u, and the denominator regrouped so that it is exactly 2 at the peak for every phi
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
        room = self.total_steps - self.warmup_steps
        _whole(self, "decay_steps", lambda n: 1 <= n <= room, f"in [1, total_steps - warmup_steps = {room}]")
        _choice(self, "decay_type", ["sqrt", "linear", "cosine", "exponential"])
        if self.decay_type == "exponential":
            _real(self, "final_factor", lambda x: x > 0, "> 0: an exponential decay never reaches 0")

    def __call__(self, step: int) -> float:
        p = _progress(step, self.total_steps - self.decay_steps, self.total_steps)
        if self.decay_type == "exponential":
            return _warmup(step, self.warmup_steps) * float(self.final_factor**p)
        return _warmup(step, self.warmup_steps) * _blend(self._shape(p), self.final_factor)

    def _shape(self, p: float) -> float:
        if self.decay_type == "cosine":
            return _half_cosine(p)
        return 1.0 - (math.sqrt(p) if self.decay_type == "sqrt" else p)


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
        _whole(self, "batch_size", lambda n: n >= 1, ">= 1, in sequences")
        _whole(self, "sequence_length", lambda n: n >= 1, ">= 1, in tokens")
        _real(self, "max_lr", lambda x: x > 0, "> 0, and the optimizer's lr")
        _real(self, "amplitude", lambda x: x > 0, "> 0")
        _real(self, "exponent", lambda x: x < 0, "< 0: the learning rate falls with the tokens seen")
        _whole(self, "warmup_steps", lambda n: n >= 0, ">= 0")
        _check_final_phase(self, "decay", self.warmup_steps)

    def __call__(self, step: int) -> float:
        held = max(step, self.warmup_steps)
        fade = 1.0
        if self.decay_start is not None:
            held = min(held, self.decay_start)
            p = _progress(step, self.decay_start, self.decay_start + self.decay_steps)
            fade = math.expm1(1.0 - p) / math.expm1(1.0)
        tokens = held * self.batch_size * self.sequence_length
        # No tokens yet: n ** b is infinite and the cap holds.
        lr = self.batch_size * self.amplitude * float(tokens) ** self.exponent if tokens else math.inf
        return _warmup(step, self.warmup_steps) * fade * min(1.0, lr / self.max_lr)


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

    (the 10 is that of public implementations). Go on from the constant phase for new data; anneal from any of its
    checkpoints for a model to use.

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
        _whole(self, "warmup_steps", lambda n: n >= 0, ">= 0")
        _whole(self, "cooldown_steps", lambda n: n >= 1, ">= 1")
        _choice(self, "cooldown_type", ["cosine", "inverse_sqrt"])
        _real(self, "constant_factor", lambda x: 0 < x <= 1, "in (0, 1]")
        _check_final_phase(self, "anneal", self.warmup_steps + self.cooldown_steps)
        _real(self, "final_factor", lambda x: 0 < x <= 1, "in (0, 1]")
        if self.anneal_start is not None:
            low = self.constant_factor
            _real(self, "final_factor", lambda x: x <= low, f"<= constant_factor={low}, from which it anneals")

    def __call__(self, step: int) -> float:
        if self.anneal_start is not None and step >= self.anneal_start:
            q = _progress(step, self.anneal_start, self.anneal_start + self.anneal_steps)
            return float(self.constant_factor * (self.final_factor / self.constant_factor) ** q)
        p = _progress(step, self.warmup_steps, self.warmup_steps + self.cooldown_steps)
        shape = _half_cosine(p) if self.cooldown_type == "cosine" else _inverse_sqrt(p)
        return _warmup(step, self.warmup_steps) * _blend(shape, self.constant_factor)


@dataclass(frozen=True, kw_only=True)
class one_cycle:
    """The learning rate of ``torch.optim.lr_scheduler.OneCycleLR``, divided by its ``max_lr``.

    Up from ``1 / div_factor`` to 1 in the first ``pct_start * T`` steps, then down to
    ``1 / (div_factor * final_div_factor)`` at step ``T - 1``; with ``three_phase`` first down to ``1 / div_factor`` in
    as many steps as it took up, and to the end in the rest. Each phase interpolates between its ends ``s`` and ``e``
    by ``e + (s - e) * (1 + cos(pi p)) / 2`` or linearly. Smith & Topin 2017, "Super-Convergence", arXiv 1708.07120, in
    torch's form. Momentum is not cycled. ``factor`` is exactly 1 only if ``pct_start * T`` is a whole number >= 1.

    Args:
        total_steps: ``T`` >= 1.
        pct_start: fraction of the steps that go up, in [0, 1].
        anneal_strategy: ``"cos"`` or ``"linear"``.
        div_factor: peak / initial value, >= 1.
        final_div_factor: initial / final value, >= ``1 / div_factor``; >= 1 with ``three_phase``. It never rises again.
        three_phase: see above.

    Examples:
        >>> factor = one_cycle(total_steps=10, anneal_strategy="linear", div_factor=10)
        >>> [round(factor(t), 3) for t in range(11)]
        [0.1, 0.55, 1.0, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143, 0.0, 0.0]
    """

    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        _whole(self, "total_steps", lambda n: n >= 1, ">= 1")
        _real(self, "pct_start", lambda x: 0 <= x <= 1, "in [0, 1]")
        _choice(self, "anneal_strategy", ["cos", "linear"])
        _real(self, "div_factor", lambda x: x >= 1, ">= 1: it divides the peak")
        _flag(self, "three_phase")
        least = 1.0 if self.three_phase else 1 / self.div_factor
        _real(
            self, "final_div_factor", lambda x: x >= least, f">= {least}: the end must not rise above what precedes it"
        )

    def __call__(self, step: int) -> float:
        # The same arithmetic in the same order as torch's, so that the two agree to rounding for all arguments.
        initial = 1.0 / self.div_factor
        final = initial / self.final_div_factor
        last = self.total_steps - 1
        phases = [(self.pct_start * self.total_steps - 1, initial, 1.0), (last, 1.0, final)]
        if self.three_phase:
            phases[1:] = [(2 * self.pct_start * self.total_steps - 2, 1.0, initial), (last, initial, final)]
        step = min(step, last)
        i = next(i for i, (end_step, _, _) in enumerate(phases) if step <= end_step)
        start_step = phases[i - 1][0] if i else 0.0
        end_step, start, end = phases[i]
        # Where a rise of one step has no length torch divides by zero; here it is at its end.
        p = (step - start_step) / (end_step - start_step) if end_step != start_step else 1.0
        if self.anneal_strategy == "cos":
            return end + (start - end) / 2.0 * (math.cos(math.pi * p) + 1)
        return (end - start) * p + start


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(step: int, start: int, end: int) -> float:
    """How much of ``[start, end]`` lies behind ``step``, clamped to [0, 1]."""
    return min(max((step - start) / (end - start), 0.0), 1.0)


def _blend(shape: float, final: float) -> float:
    """From 1 to ``final`` as ``shape`` goes from 1 to 0; exact at both ends."""
    return final + (1.0 - final) * shape


def _half_cosine(p: float) -> float:
    return (1.0 + math.cos(math.pi * p)) / 2


def _inverse_sqrt(p: float) -> float:
    return 1.0 - (1 / math.sqrt(1 + 10 * p) - 1) / (1 / math.sqrt(11) - 1)


def _check_final_phase(schedule: power | infinite, name: str, earliest: int) -> None:
    if getattr(schedule, f"{name}_start") is None:
        _whole(schedule, f"{name}_steps", lambda n: n == 0, f"0 without {name}_start: pass the step at which it begins")
        return
    _whole(schedule, f"{name}_start", lambda n: n >= earliest, f">= {earliest}, the end of the phases before it")
    _whole(schedule, f"{name}_steps", lambda n: n >= 1, f">= 1 with {name}_start")


def _whole(schedule: object, name: str, ok: Callable[[int], bool], rule: str) -> None:
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or not ok(int(value)):
        raise ValueError(f"Invalid {name}={value!r}. Must be an int {rule}.")
    # Kept as a plain int (NumPy's would not load with weights_only=True).
    object.__setattr__(schedule, name, int(value))


def _real(schedule: object, name: str, ok: Callable[[float], bool], rule: str) -> None:
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not ok(float(value)):
        raise ValueError(f"Invalid {name}={value!r}. Must be a finite number, {rule}.")
    object.__setattr__(schedule, name, float(value))


def _flag(schedule: object, name: str) -> None:
    value = getattr(schedule, name)
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}={value!r}. Must be True or False.")


def _choice(schedule: object, name: str, choices: list[str]) -> None:
    value = getattr(schedule, name)
    if value not in choices:
        raise ValueError(f"Invalid {name}={value!r}. Must be one of {', '.join(map(repr, choices))}.")
