"""Observe: what a round says.

In: the training losses of its steps, and where each replica stood when it ended. Out: every replica's mean loss
(:class:`TrainingLoss`), and, with a probe, the losses that all found on the same batch (:class:`PairedProbe`).
"""

from hdet.observe.paired_probe import PairedProbe
from hdet.observe.phase import ObservePhase
from hdet.observe.probe import LossFunction, Probe
from hdet.observe.round_losses import Loss, RoundLosses
from hdet.observe.slopes import ProbeLosses
from hdet.observe.training_loss import TrainingLoss, check_loss, finite_mean, mean_losses

__all__ = [
    "Loss",
    "LossFunction",
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
