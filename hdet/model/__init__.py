"""What is trained: where its weights lie, how it is sharded, over whom its gradients are averaged, and copies of it.

In: the user's modules and optimizer. Out: :class:`Weights`, the tensors that a converge reads and writes;
:class:`Snapshot`, a copy that can be put back; checks of what surrounds the modules.
"""

from hdet.model.gradients import check_gradients, fingerprint_gradients, set_gradients, warn_of_gradients
from hdet.model.guards import check_caller, has_rival, warn_of_batch_norm
from hdet.model.sharding import check_sharding
from hdet.model.snapshot import Snapshot
from hdet.model.watch import GradientWatch, RivalWatch
from hdet.model.weights import Weights, local, weights_of

__all__ = [
    "GradientWatch",
    "RivalWatch",
    "Snapshot",
    "Weights",
    "check_caller",
    "check_gradients",
    "check_sharding",
    "fingerprint_gradients",
    "has_rival",
    "local",
    "set_gradients",
    "warn_of_batch_norm",
    "warn_of_gradients",
    "weights_of",
]
