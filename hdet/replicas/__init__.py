"""Who trains: the replicas, the ranks that make up each, and all collective calls.

In: a number of replicas, a process group or a mesh dimension. Out: :class:`Replicas`, which knows the ranks, gathers
and reduces; and :func:`gather_agreed`, which gathers numbers and raises on all ranks if these are not at the same step,
or have different settings or models.
"""

from hdet.replicas.agreement import Call, Term, differing, digest, gather_agreed, same
from hdet.replicas.topology import Replicas, ReplicasLike

__all__ = ["Call", "Replicas", "ReplicasLike", "Term", "differing", "digest", "gather_agreed", "same"]
