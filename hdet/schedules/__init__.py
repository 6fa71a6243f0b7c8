"""Base schedules: the learning rate's shape over training, as pure functions ``step -> factor``.

In: numbers of steps. Out: the functions; beside them, what is still to come of any torch scheduler
(:mod:`hdet.schedules.forecast`), and the schedule that a run found, saved and replayed (:mod:`hdet.schedules.found`).
"""

from hdet.schedules.shapes import *  # noqa: F403
from hdet.schedules.shapes import __all__ as __all__
