"""Steer: move the gain and the hyperparameters' centres by what a round's losses show.

In: the losses of a round, and what is known of the run (:class:`RoundObservation`). Out: the gains and centres of the
next round (:class:`Controllers`) and a :class:`ControllerReport`; after a round that blew up, the last good state
(:class:`Recovery`); before the run, a ``max_lr`` (:func:`find_lr`). Controllers are pure functions of plain floats.
"""

from hdet.observe.slopes import ProbeLosses, Slopes, slopes_of
from hdet.steer.controllers import Controller, Controllers, RoundObservation, RoundSignal
from hdet.steer.lr_finder import LRFinding, find_lr, learning_rates
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.one_slope import CentreState, OneSlope
from hdet.steer.phase import SteerPhase
from hdet.steer.posterior import Belief, Posterior
from hdet.steer.published import Published, hypergradient
from hdet.steer.recovery import GAIN_DIVISOR, Recovery
from hdet.steer.report import ControllerReport, HyperparameterReport

__all__ = [
    "GAIN_DIVISOR",
    "Belief",
    "CentreState",
    "Controller",
    "ControllerReport",
    "ControllerState",
    "Controllers",
    "HyperparameterReport",
    "LRFinding",
    "Observation",
    "OneSlope",
    "Posterior",
    "ProbeLosses",
    "Published",
    "Recovery",
    "RoundObservation",
    "RoundSignal",
    "Slopes",
    "SteerPhase",
    "find_lr",
    "hypergradient",
    "learning_rates",
    "slopes_of",
]
