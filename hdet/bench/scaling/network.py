r"""An alpha-beta model of all-reduces: ``alpha`` seconds for each message, and bytes over a bandwidth.

For ``n`` bytes on each of ``N`` ranks (Thakur, Rabenseifner, Gropp 2005, without the time of adding):

- **ring**: ``2 (N - 1) alpha + 2 (N - 1) / N * n / B``
- **tree**, pipelined: ``2 ceil(log2 N) alpha + 2 n / B``
- **hierarchical**, ``g`` ranks in each of ``N / g`` nodes: reduce-scatter inside the nodes, an all-reduce of ``n / g``
  between them, by ring or tree, all-gather inside: ``2 (g - 1) alpha_in + 2 (g - 1) / g * n / B_in + ...``

A ring or tree here is one over one link. NCCL's, between nodes, are one for each adapter, which is close to the
hierarchical one.

Where all ranks share one memory, as processes of one machine do, the bytes of all count: ``2 (N - 1) n / B`` in a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Link:
    """One kind of connection."""

    alpha: float
    """Seconds that a message takes beside its bytes."""
    bandwidth: float
    """Bytes per second, of one rank in one direction; of all ranks together where it is shared."""
    source: str
    """Where the two numbers are from."""
    is_shared: bool = False
    """Whether the ranks share the bandwidth."""


class Cost(NamedTuple):
    """Of one collective."""

    seconds: float
    sent: float
    """Bytes that leave each rank."""

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.seconds + other.seconds, self.sent + other.sent)


@dataclass(frozen=True)
class Cluster:
    """Nodes of several ranks each. The published one has a network adapter for each rank."""

    inside: Link
    between: Link
    per_node: int
    """Ranks."""


PUBLISHED = Cluster(
    inside=Link(3.4e-6, 360e9, "NCCL's own cost model: NVLink on Hopper, 3.4 us per hop of a ring, 360 GB/s"),
    between=Link(14e-6, 50e9, "NCCL's own cost model: 14 us per hop; 400 Gb/s InfiniBand for each GPU (DGX H100)"),
    per_node=8,
)
"""Constants in NCCL's sources (``hwLatencies`` of a ring under protocol Simple, ``nvlinkBws``), and the data sheet's
rate of a ConnectX-7 adapter. Inputs: nothing here was measured."""


def ring(link: Link, ranks: int, nbytes: float) -> Cost:
    """All-reduce ``nbytes`` among ``ranks``."""
    if ranks == 1:
        return Cost(0.0, 0.0)
    sent = 2 * (ranks - 1) / ranks * nbytes
    return Cost(2 * (ranks - 1) * link.alpha + _total(link, ranks, sent) / link.bandwidth, sent)


def tree(link: Link, ranks: int, nbytes: float) -> Cost:
    """The same, pipelined along a binary tree; ``sent`` is that of an inner node of a double tree."""
    if ranks == 1:
        return Cost(0.0, 0.0)
    sent = 2.0 * nbytes
    return Cost(2 * math.ceil(math.log2(ranks)) * link.alpha + _total(link, ranks, sent) / link.bandwidth, sent)


def hierarchical(cluster: Cluster, ranks: int, nbytes: float) -> Cost:
    """The same in nodes, between which the faster of ring and tree runs.

    Raises:
        ValueError: unless ``ranks`` fill whole nodes.
    """
    group = min(cluster.per_node, ranks)
    if ranks % group:
        raise ValueError(f"Invalid {ranks=}. Must be below {group} or a multiple of it, the ranks of a node.")
    inside = ring(cluster.inside, group, nbytes)
    across = min((f(cluster.between, ranks // group, nbytes / group) for f in (ring, tree)), key=lambda c: c.seconds)
    return inside + across


def all_gather(link: Link, ranks: int, nbytes: float) -> Cost:
    """Gather ``nbytes`` of each rank on every rank, in a ring."""
    sent = (ranks - 1) * nbytes
    return Cost((ranks - 1) * link.alpha + _total(link, ranks, sent) / link.bandwidth, sent)


def _total(link: Link, ranks: int, sent: float) -> float:
    """The bytes that the bandwidth is to be divided by."""
    return sent * (ranks if link.is_shared else 1)
