"""What is trained: its tensors, how they are sharded, and over which ranks its gradients are averaged.

In: the user's modules and optimizer. Out: :class:`Weights`, the tensors that a converge reads and writes;
:class:`Snapshot`, a copy that can be restored; gradient modes (:func:`set_gradients`); and checks, which raise or warn
where the modules or the training loop would not work with replicas.
"""

from hdet.model.gradients import check_gradients, fingerprint_gradients, set_gradients, warn_of_gradients
from hdet.model.guards import another_averages, check_caller, warn_of_batch_norm
from hdet.model.sharding import check_sharding
from hdet.model.snapshot import Snapshot
from hdet.model.watch import GradientWatch, RivalWatch
from hdet.model.weights import Weights, local, weights_of

__all__ = [
    "GradientWatch",
    "RivalWatch",
    "Snapshot",
    "Weights",
    "another_averages",
    "check_caller",
    "check_gradients",
    "check_sharding",
    "fingerprint_gradients",
    "local",
    "set_gradients",
    "warn_of_batch_norm",
    "warn_of_gradients",
    "weights_of",
]
