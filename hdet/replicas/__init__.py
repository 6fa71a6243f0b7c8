"""Who trains: the replicas, the ranks that make up each, and the only code that sends anything between them.

In: a number, process group or mesh dimension. Out: :class:`Replicas`, which gathers and reduces, and
:func:`gather_agreed`, with which all ranks make sure that they are at the same step, with the same settings and model.
"""

from hdet.replicas.agreement import Term, digest, gather_agreed, same
from hdet.replicas.topology import Replicas, ReplicasLike

__all__ = ["Replicas", "ReplicasLike", "Term", "digest", "gather_agreed", "same"]
