"""The learning rate of torch's ``OneCycleLR`` as a function of the step. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hdet.errors import check_choice, check_field, check_flag, check_number, check_whole
from hdet.schedules.curves import check_step


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
        check_field(self, "total_steps", check_whole, ">= 1", lambda n: n >= 1)
        check_field(self, "pct_start", check_number, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_field(self, "anneal_strategy", check_choice, ["cos", "linear"])
        check_field(self, "div_factor", check_number, ">= 1: it divides the peak", lambda x: x >= 1)
        check_field(self, "three_phase", check_flag)
        least = 1.0 if self.three_phase else 1 / self.div_factor
        check_field(
            self,
            "final_div_factor",
            check_number,
            f">= {least}: the end must not rise above what precedes it",
            lambda x: x >= least,
        )

    def __call__(self, step: int) -> float:
        step = check_step(step)
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
        # A phase of no length counts as finished; torch divides by zero there.
        p = (step - start_step) / (end_step - start_step) if end_step != start_step else 1.0
        if self.anneal_strategy == "cos":
            return end + (start - end) / 2.0 * (math.cos(math.pi * p) + 1)
        return (end - start) * p + start
