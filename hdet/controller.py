"""``hdet.controller``: what moves the gain and the hyperparameters' centres, and what it is told.

:class:`Published`, :class:`TwoSlope` and :class:`OneSlope` are settings; their ``update`` is a pure function of plain
floats.
"""

from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.steer.controllers import Controller
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import CentreState, OneSlope
from hdet.steer.published import Published, hypergradient
from hdet.steer.two_slope import TwoSlope

__all__ = [
    "CentreState",
    "Controller",
    "ControllerState",
    "Observation",
    "OneSlope",
    "ProbeLosses",
    "Published",
    "Slopes",
    "TwoSlope",
    "hypergradient",
    "slopes_of",
]
