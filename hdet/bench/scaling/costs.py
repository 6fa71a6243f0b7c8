r"""What a round of hdet costs each rank: bytes, memory, seconds. A model; nothing here is measured.

``P`` parameters, a replica of ``M`` ranks, each of which holds ``P / M`` of them, ``N`` replicas:

- **converge**: an all-reduce of ``4 P / M`` bytes among the N peers, packing and unpacking in five passes over them;
- **agreement**: ``m`` numbers of each rank. In replicas of one rank they travel with the first bucket, a byte in each
  element, ``32 m N`` bytes more; else in an all-gather of ``8 m`` bytes among all ``N M`` ranks
  (:mod:`hdet.converge.piggyback`);
- **probe**: five forward passes on one batch, of ``2 P`` operations per token, and an all-gather of 6 numbers. A
  sharded replica gathers its bf16 parameters for each pass, over NVLink within a node, else over the network;
- **memory**: the copies of weights and AdamW's moments that a round that blew up is undone with, two buckets, and with
  a probe four copies of the weights, all in fp32 and sharded like the parameters.

A step computes ``6 P`` operations per token. Gradients are those of the run without hdet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hdet.bench.scaling.network import Cluster, Cost, all_gather, hierarchical, ring, tree

_FP32 = 4
_BUCKET = 64 * 2**20
_PROBE_PASSES = 5
TRAINING = 16
"""Bytes per parameter of weights, gradients and AdamW's moments in fp32."""
ROLLBACK = 12
"""Of weights and moments, once more."""
PROBE = 16
"""Of the mean, the displacement, the slow average and its trail."""


@dataclass(frozen=True)
class Machine:
    """What the model takes for granted."""

    memory: float = 80e9
    """Bytes of an accelerator."""
    memory_bandwidth: float = 3.35e12
    """Bytes per second: the data sheet of an H100 SXM."""
    operations: float = 400e12
    """Per second that training reaches in bf16: an assumption, 40% of the data sheet's 989e12."""


@dataclass(frozen=True)
class Work:
    """How one trains."""

    steps: int = 100
    """To a round."""
    tokens: int = 8192
    """Of a rank in a step."""
    probe_tokens: int = 8192
    """Of a rank in one forward pass of the probe."""
    numbers: int = 40
    """That a rank tells the others at the end of a round."""
    host_seconds: float = 0.0
    """That a rank's processor takes for what the others tell: measured, by :mod:`.fleet`."""


@dataclass(frozen=True)
class Strategy:
    """How a replica lies."""

    name: str
    members: int
    """Ranks of a replica."""


DDP = Strategy("DDP", 1)
HSDP = Strategy("HSDP", 8)
ZERO3 = Strategy("ZeRO-3", 64)


@dataclass(frozen=True)
class Round:
    """The costs of a round for each rank."""

    converge: Cost
    algorithm: str
    """Of the converge's all-reduce: the fastest."""
    agreement: Cost
    """Beside that, with the processor's part."""
    probe: Cost
    passes: float
    """Seconds of packing and unpacking."""
    compute: float
    """Seconds of the round's training steps, their communication left out."""
    gradient_bytes: float
    """That DDP or FSDP sends for gradients in the round's steps, with hdet and without; 0 in local mode."""
    memory: float
    """Bytes that training takes without hdet, activations left out."""
    added_memory: float
    """Bytes that hdet adds: at most, while a probe runs."""

    @property
    def added_seconds(self) -> float:
        """Of hdet in a round with a probe."""
        return self.converge.seconds + self.agreement.seconds + self.probe.seconds + self.passes

    @property
    def share(self) -> float:
        """Of the round's computing time."""
        return self.added_seconds / self.compute


def algorithms(cluster: Cluster, strategy: Strategy, replicas: int) -> dict[str, Callable[[float], Cost]]:
    """All-reduces among the peers, by name. Peers are neighbours in a node only where a replica is one rank."""
    fits = strategy.members == 1 and replicas <= cluster.per_node
    link = cluster.inside if fits else cluster.between
    found: dict[str, Callable[[float], Cost]] = {
        "ring": lambda n: ring(link, replicas, n),
        "tree": lambda n: tree(link, replicas, n),
    }
    if strategy.members == 1 and replicas > cluster.per_node and replicas % cluster.per_node == 0:
        found["hierarchical"] = lambda n: hierarchical(cluster, replicas, n)
    return found


def of_round(
    parameters: float, replicas: int, strategy: Strategy, cluster: Cluster, work: Work, machine: Machine
) -> Round:
    """The costs of one round with a probe."""
    members, ranks = strategy.members, strategy.members * replicas
    nbytes = _FP32 * parameters / members
    ways = algorithms(cluster, strategy, replicas)
    name, reduce = min(ways.items(), key=lambda way: way[1](nbytes).seconds)
    between = cluster.inside if ranks <= cluster.per_node else cluster.between
    if members == 1 and 64 * replicas * work.numbers <= _BUCKET:
        extra = 8 * _FP32 * work.numbers * replicas
        whole = reduce(nbytes + extra)
        agreement = Cost(whole.seconds - reduce(nbytes).seconds, whole.sent - reduce(nbytes).sent)
    else:
        agreement = all_gather(between, ranks, 8 * work.numbers)
    if replicas == 1:
        agreement = Cost(0.0, 0.0)
    told = all_gather(between, ranks, 8 * 6) if ranks > 1 else Cost(0.0, 0.0)
    sharded = Cost(0.0, 0.0)
    if members > 1:
        link = cluster.inside if members <= cluster.per_node else cluster.between
        gathered = all_gather(link, members, 2 * parameters / members)
        sharded = Cost(_PROBE_PASSES * gathered.seconds, _PROBE_PASSES * gathered.sent)
    forward = _PROBE_PASSES * 2 * parameters * work.probe_tokens / machine.operations
    own = parameters / members
    return Round(
        converge=reduce(nbytes),
        algorithm=name if replicas > 1 else "none",
        agreement=Cost(agreement.seconds + (work.host_seconds if replicas > 1 else 0.0), agreement.sent),
        probe=Cost(forward + told.seconds + sharded.seconds, told.sent + sharded.sent),
        passes=5 * nbytes / machine.memory_bandwidth if replicas > 1 else 0.0,
        compute=work.steps * 6 * parameters * work.tokens / machine.operations,
        gradient_bytes=work.steps * reduce(nbytes).sent,
        memory=TRAINING * own,
        added_memory=(ROLLBACK + PROBE) * own + (min(2 * _BUCKET, 2 * nbytes) if replicas > 1 else 0.0),
    )
