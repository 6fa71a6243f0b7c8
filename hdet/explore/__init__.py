"""Fan-out: in which hyperparameters the replicas differ during a round.

In: spread, seed, round, and the centres. Out: which replica holds which level (:mod:`hdet.explore.design`); this
replica's values, written into the optimizer and the modules (:class:`FanOut`); or the parameters of each virtual
replica in turn (:class:`VirtualReplicas`). All draws depend on (seed, round, hyperparameter) alone.
"""

from hdet.explore.design import Design, Effect
from hdet.explore.dropout import Dropout
from hdet.explore.fan_out import FanOut, hand_over, keep_fan_out
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.identification import check_identified
from hdet.explore.kinds import ParamGroupField, module_attribute, param_group, scalar
from hdet.explore.noisy_start import warm_noisy_start
from hdet.explore.phase import ExplorePhase
from hdet.explore.prior import Prior
from hdet.explore.rates import copied, like
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
    "hand_over",
    "keep_fan_out",
    "like",
    "module_attribute",
    "param_group",
    "scalar",
    "warm_noisy_start",
]
