"""Steer: what is made of a round.

In: what it said. Out: the next round's gain, by a controller, and the centres of the other hyperparameters
(:class:`Centres`); or the way back, where it blew up (:class:`Recovery`). Controllers are pure functions of plain
floats.
"""

from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.steer.controllers import Controller, Controllers, RoundObservation, RoundSignal
from hdet.steer.lr_finder import LRFinding, find_lr
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import CentreState, OneSlope
from hdet.steer.phase import SteerPhase
from hdet.steer.published import Published, hypergradient
from hdet.steer.recovery import CUT, Recovery
from hdet.steer.report import ControllerReport, HyperparameterReport
from hdet.steer.two_slope import TwoSlope

__all__ = [
    "CUT",
    "CentreState",
    "Controller",
    "ControllerReport",
    "ControllerState",
    "Controllers",
    "HyperparameterReport",
    "LRFinding",
    "Observation",
    "OneSlope",
    "ProbeLosses",
    "Published",
    "Recovery",
    "RoundObservation",
    "RoundSignal",
    "Slopes",
    "SteerPhase",
    "TwoSlope",
    "find_lr",
    "hypergradient",
    "slopes_of",
]
