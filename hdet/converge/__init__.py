"""Converge: the replicas become one model again.

In: every replica's weights and optimizer state. Out: their mean, written in place and bitwise equal on all ranks, and
what the average found (:class:`Averaged`): distances, excluded replicas, bytes. Also here: slow averages of the means
over the rounds (:class:`SlowAverage`), and momentum on whole rounds (:class:`OuterMomentum`).
"""

from hdet.converge.averager import Averager
from hdet.converge.optimizer_policy import policy_of
from hdet.converge.optimizer_state import OptimizerState
from hdet.converge.outer import OuterMomentum
from hdet.converge.pending import Averaged, Pending, Point
from hdet.converge.phase import ConvergePhase, Findings
from hdet.converge.slow_average import SlowAverage

__all__ = [
    "Averaged",
    "Averager",
    "ConvergePhase",
    "Findings",
    "OptimizerState",
    "OuterMomentum",
    "Pending",
    "Point",
    "SlowAverage",
    "policy_of",
]
