"""``hdet.controller``: what moves the gain and the hyperparameters' centres, and what it is told.

:class:`Posterior`, :class:`Published` and :class:`OneSlope` are settings; their ``update`` is a pure function of plain
floats.
"""

from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.steer.controllers import Controller
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import CentreState, OneSlope
from hdet.steer.posterior import Belief, Posterior
from hdet.steer.published import Published, hypergradient

__all__ = [
    "Belief",
    "CentreState",
    "Controller",
    "ControllerState",
    "Observation",
    "OneSlope",
    "Posterior",
    "ProbeLosses",
    "Published",
    "Slopes",
    "hypergradient",
    "slopes_of",
]
