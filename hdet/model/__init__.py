"""What is trained: its tensors, how they are sharded, and over which ranks its gradients are averaged.

In: the user's modules and optimizer. Out: :class:`Weights`, the tensors that a converge reads and writes;
:class:`Snapshot`, a copy that can be restored; gradient modes (:func:`set_gradients`); and checks, which raise or warn
where the modules or the training loop would not work with replicas.
"""

from hdet.model.exclusion import Exclusion
from hdet.model.gradients import check_gradients, fingerprint_gradients, set_gradients, warn_of_gradients
from hdet.model.guards import JoinGuard, another_averages, check_caller, warn_of_batch_norm
from hdet.model.inference import outside_inference
from hdet.model.load_watch import LoadWatch
from hdet.model.mid_round import MidRoundWatch
from hdet.model.optimizers import check_unsharded, inside
from hdet.model.sharding import check_sharding
from hdet.model.snapshot import Snapshot
from hdet.model.start import Start, warn_of_outside
from hdet.model.watch import GradientWatch, RivalWatch
from hdet.model.weights import Weights, local, weights_of

__all__ = [
    "Exclusion",
    "GradientWatch",
    "JoinGuard",
    "LoadWatch",
    "MidRoundWatch",
    "RivalWatch",
    "Snapshot",
    "Start",
    "Weights",
    "another_averages",
    "check_caller",
    "check_gradients",
    "check_sharding",
    "check_unsharded",
    "fingerprint_gradients",
    "inside",
    "local",
    "outside_inference",
    "set_gradients",
    "warn_of_batch_norm",
    "warn_of_gradients",
    "warn_of_outside",
    "weights_of",
]
