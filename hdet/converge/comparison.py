"""Which frozen parameters and buffers differ between replicas, and which replicas must be left out of an average."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hdet.converge.buckets import Bucket
from hdet.converge.finiteness import Design
from hdet.converge.plan import Plan
from hdet.model.fingerprint import fingerprint
from hdet.replicas.topology import Replicas


def compare_untrained(
    plan: Plan,
    replicas: Replicas,
    excluded: set[int],
    fill: Callable[[list[Tensor]], list[Bucket]],
    design: Design,
    *,
    all_ranks: bool,
) -> tuple[set[int], int]:
    """Compare every untrained tensor by its fingerprint, and put those that differ into ``plan``. Collective.

    A replica in which one that differs is not as finite as it must be is excluded. One that is equal in all replicas
    excludes none.

    Args:
        plan: of this rank; its ``differing`` and ``differing_buckets`` are set.
        replicas: the group.
        excluded: replicas excluded so far.
        fill: makes buckets of tensors.
        design: what the tensors may hold.
        all_ranks: whether to compare over all ranks, not only over the peers.

    Returns:
        All excluded replicas, and the bytes this rank sent.
    """
    tensors = list(zip(plan.positions, plan.untrained, strict=True))
    own = [x for i, t in tensors for x in (fingerprint(t), int(design.allows(i, t)), int(design.is_infinite(i)))]
    gather = replicas.all_gather if all_ranks else replicas.all_gather_peers
    rows = gather(own, dtype=torch.int64) if own else []
    members = replicas.members if all_ranks else 1
    differing: list[int] = []
    infinite: list[int] = []
    excluded = set(excluded)
    for i in range(len(plan.untrained)):
        column = [row[3 * i : 3 * i + 3] for row in rows]
        if len({bits for bits, _, _ in column}) > 1:
            differing.append(i)
            excluded |= {i // members for i, (_, finite, _) in enumerate(column) if not finite}
            if any(by_design for _, _, by_design in column):  # on one rank: all must send the same buckets
                infinite.append(i)
    plan.differing = tuple(differing)
    plan.differing_buckets = fill([plan.untrained[i] for i in differing if i not in infinite])
    plan.differing_infinite = [plan.untrained[i] for i in infinite]
    if replicas.members > 1:  # each rank has compared with its peers, and all must exclude the same replicas
        flags = [float(replica in excluded) for replica in range(replicas.size)]
        excluded = {replica for row in replicas.all_gather(flags) for replica, flag in enumerate(row) if flag}
    return excluded, 8 * len(own)
