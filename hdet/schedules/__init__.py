"""Base schedules: the learning rate over training, as pure functions ``step -> factor`` with the peak at 1.

In: numbers of steps and shape arguments. Out: callables for ``LambdaLR`` or :class:`hdet.Ensemble`; what they share is
in :mod:`hdet.schedules.curves`. Beside them: what is still to come of any torch scheduler
(:mod:`hdet.schedules.forecast`), and the schedule that a run found, saved and replayed (:mod:`hdet.schedules.found`).
"""

from hdet.schedules.decays import cosine, linear, rex, uba, warmup_stable_decay
from hdet.schedules.onecycle import one_cycle
from hdet.schedules.open_ended import constant, infinite, power

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
