"""The ensemble: a run as rounds, each told in order in :mod:`hdet.ensemble.rounds`: explore, converge, observe, steer.

In: an optimizer, a base schedule and settings. Out: :class:`Ensemble`, which a training loop steps.
"""

from hdet.ensemble.ensemble import Ensemble

__all__ = ["Ensemble"]
