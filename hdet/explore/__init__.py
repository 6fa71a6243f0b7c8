"""Fan-out: in what the replicas differ during a round.

In: spread, seed, round, the centres. Out: which replica holds which level (:mod:`hdet.explore.design`), and the
optimizer's settings written for this replica (:class:`FanOut`), or for each virtual one in turn
(:class:`VirtualReplicas`). Draws depend on (seed, round, hyperparameter) only.
"""

from hdet.explore.design import Design, Effect
from hdet.explore.fan_out import FanOut, copied
from hdet.explore.hyperparameters import (
    Dropout,
    Hyperparameter,
    ParamGroupField,
    check_identified,
    module_attribute,
    param_group,
    scalar,
)
from hdet.explore.noisy_start import warm_noisy_start
from hdet.explore.phase import ExplorePhase
from hdet.explore.prior import Prior
from hdet.explore.virtual import VirtualReplicas

__all__ = [
    "Design",
    "Dropout",
    "Effect",
    "ExplorePhase",
    "FanOut",
    "Hyperparameter",
    "ParamGroupField",
    "Prior",
    "VirtualReplicas",
    "check_identified",
    "copied",
    "module_attribute",
    "param_group",
    "scalar",
    "warm_noisy_start",
]
