r"""Base schedules: the learning rate's shape over training, as pure functions of the step. No torch here.

Each schedule is called once with its arguments, which it validates, and gives a callable ``factor(step)``: the
learning rate at a step divided by the optimizer's ``lr``, which is the peak. It fits wherever such a callable does::

    torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.cosine(total_steps=1000))
    hdet.Ensemble(optimizer, schedule=schedules.cosine(total_steps=1000))

All schedules share these rules:

- **Steps** count from 0: ``factor(t)`` is for the update after ``t`` others. A run of ``total_steps`` updates sees
  ``factor(0)`` to ``factor(total_steps - 1)``; the final value is reached at ``factor(total_steps)``, as in torch's
  ``CosineAnnealingLR``. Only :class:`one_cycle` reaches it one step earlier, as torch's ``OneCycleLR`` does.
- **Warm-up** is linear: the factor is multiplied by ``min(1, (t + 1) / (warmup_steps + 1))``. So steps 0 to
  ``warmup_steps - 1`` are below the peak, step ``warmup_steps`` is the first at it, and no step is wasted at 0. It is
  torch's ``LinearLR(start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)``.
- **Progress** is ``p = (t - start) / (end - start)``, clamped to [0, 1]: **past its end a schedule holds its final
  value**, and further steps are no error.
- Values lie in [0, 1], and never rise again after the peak.
- All arguments are keywords; one of a wrong type raises ``TypeError``, one outside its range ``ValueError``. So does a
  step that is no whole number >= 0.

``LambdaLR.state_dict()`` saves a schedule's arguments (plain numbers and strings, readable with
``torch.load(weights_only=True)``), and loading it **restores** them. To resume under other arguments, for a longer run
or to begin the final decay, build the scheduler with the new ones and leave the saved ones out::

    state["lr_lambdas"] = [None] * len(state["lr_lambdas"])  # of hdet.Ensemble: state["schedule"]["lr_lambdas"]
    scheduler.load_state_dict(state)

The schedules are frozen dataclasses, which can be compared, printed and pickled. Their names are lower-case because
they are used like functions.
"""

from __future__ import annotations

import math

from hdet.errors import check_whole


def check_step(step: int) -> int:
    """``step``, if it is a number of steps."""
    if type(step) is int and 0 <= step < 2**63:  # between converges this is all that most calls cost
        return step
    return check_whole("step", step, ">= 0: so many updates came before", lambda n: n >= 0)


def warmup(step: int, warmup_steps: int) -> float:
    """The factor of the linear warm-up, in (0, 1]."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def progress(step: int, start: int, end: int) -> float:
    """``(step - start) / (end - start)``, clamped to [0, 1]."""
    return min(max((step - start) / (end - start), 0.0), 1.0)


def interpolate(shape: float, final: float) -> float:
    """``1`` where ``shape`` is 1, ``final`` where it is 0, linear between; exact at both ends."""
    return final + (1.0 - final) * shape


def half_cosine(p: float) -> float:
    """``(1 + cos(pi p)) / 2``: 1 at ``p = 0``, 0 at ``p = 1``."""
    return (1.0 + math.cos(math.pi * p)) / 2
