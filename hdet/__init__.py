"""Hyperparameter-divergent ensemble training: N data-parallel replicas train under N learning rates, are averaged every
few steps, and their losses move the schedule. See the README for how to use it and how it works."""

from hdet import controller, ops, schedules
from hdet.ensemble import Ensemble
from hdet.errors import DivergedError, HdetError, ReplicaMismatchError
from hdet.found_schedule import FoundSchedule
from hdet.hyperparameters import Dropout, Hyperparameter, module_attribute, param_group, scalar
from hdet.lr_finder import LRFinding, find_lr
from hdet.lr_scheduler import OneCycleLR
from hdet.monitor import JsonLines, Monitor
from hdet.noisy_start import warm_noisy_start
from hdet.probe import Probe
from hdet.report import Report
from hdet.tensorboard import TensorBoard

__version__ = "0.1.0"

__all__ = [
    "DivergedError",
    "Dropout",
    "Ensemble",
    "FoundSchedule",
    "HdetError",
    "Hyperparameter",
    "JsonLines",
    "LRFinding",
    "Monitor",
    "OneCycleLR",
    "Probe",
    "ReplicaMismatchError",
    "Report",
    "TensorBoard",
    "controller",
    "find_lr",
    "module_attribute",
    "ops",
    "param_group",
    "scalar",
    "schedules",
    "warm_noisy_start",
]
