"""Hyperparameter-divergent ensemble training: N data-parallel replicas train under N learning rates, are averaged every
few steps, and their losses move the schedule. See the README for how to use it and how it works."""

from hdet import controller, ops, schedules
from hdet.ensemble import Ensemble
from hdet.errors import DivergedError, HdetError, ReplicaMismatchError
from hdet.explore import Dropout, Hyperparameter, module_attribute, param_group, scalar, warm_noisy_start
from hdet.lr_scheduler import OneCycleLR
from hdet.monitor import JsonLines, Monitor, Report, TensorBoard
from hdet.observe import Probe
from hdet.schedules.found import FoundSchedule
from hdet.settings import Averaging, Exploration, Outer, Settings
from hdet.steer import LRFinding, find_lr

__version__ = "0.1.0"

__all__ = [
    "Averaging",
    "DivergedError",
    "Dropout",
    "Ensemble",
    "Exploration",
    "FoundSchedule",
    "HdetError",
    "Hyperparameter",
    "JsonLines",
    "LRFinding",
    "Monitor",
    "OneCycleLR",
    "Outer",
    "Probe",
    "ReplicaMismatchError",
    "Report",
    "Settings",
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
