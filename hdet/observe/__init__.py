"""Observe: measure the losses of a round.

In: the training losses of its steps, and each replica's parameters at its end. Out: every replica's mean training loss
(:class:`TrainingLoss`), how far the weights have moved (:class:`MovementMeter`) and, with a probe, its losses at five
points in parameter space (:class:`PairedProbe`), from which :mod:`hdet.observe.slopes` computes slopes over the log
learning rate.
"""

from hdet.observe.movement import MovementMeter
from hdet.observe.paired_probe import PairedProbe
from hdet.observe.phase import ObservePhase
from hdet.observe.probe import LossFunction, Probe
from hdet.observe.round_losses import Loss, RoundLosses
from hdet.observe.slopes import ProbeLosses
from hdet.observe.training_loss import TrainingLoss, check_loss, finite_mean, mean_losses

__all__ = [
    "Loss",
    "LossFunction",
    "MovementMeter",
    "ObservePhase",
    "PairedProbe",
    "Probe",
    "ProbeLosses",
    "RoundLosses",
    "TrainingLoss",
    "check_loss",
    "finite_mean",
    "mean_losses",
]
