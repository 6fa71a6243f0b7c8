"""Section ``traffic``: the bytes that a training step hands to collectives, counted as they are handed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hdet
from hdet.bench.measure import Comparison
from hdet.bench.processes import meet
from hdet.replicas.topology import Replicas
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

# configs/char_lm_demo.yaml
_MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32)
_BATCH, _VOCABULARY = 2, 256


@dataclass
class _Counted:
    inside: int = 0
    """Bytes handed to collectives among the members of one replica."""
    across: int = 0
    """Bytes handed to collectives in which several replicas take part."""


class _Counter(TorchDispatchMode):
    """Counts what every collective is given on this rank, DDP's own included: all of them go through the dispatcher."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own, self.counted = own, _Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            # allreduce_(tensors, group, ...), allgather_(outputs, inputs, group, ...): what is given is the one before
            # the group.
            place = next((i for i, value in enumerate(args) if isinstance(value, torch.ScriptObject)), None)
            if place:
                handed = sum(x.nbytes for x in tree_leaves(args[place - 1]) if isinstance(x, Tensor))
                ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[place]))
                if set(ranks) <= self._own:
                    self.counted.inside += handed
                else:
                    self.counted.across += handed
        return func(*args, **kwargs or {})


def measure(*, converge_every: int) -> Iterator[Comparison]:
    """Train the demo's model for a round's length in every gradient mode, and count. Collective."""
    size = dist.get_world_size()
    half: dict[str, Any] = {"replicas": size // 2} if size % 2 == 0 and size > 2 else {}
    modes: dict[str, dict[str, Any]] = {"plain_ddp": {}, "shared": {"gradients": "shared"}}
    if half:
        modes["grouped"] = {"gradients": "grouped", **half}
    modes["local"] = {"gradients": "local"}
    for name, settings in modes.items():
        counted, facts = _count(settings, converge_every)
        facts |= {"processes": size, "mode": name, "converge_every": converge_every}
        facts |= {"across": counted.across / converge_every, "inside": counted.inside / converge_every}
        facts["replicas"] = settings.get("replicas", size)
        yield Comparison("traffic", f"{size} processes, T={converge_every}, {name}", facts)


def _count(settings: dict[str, Any], converge_every: int) -> tuple[_Counted, dict[str, Any]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT(_MODEL, _VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = None
    if settings:
        scheduler = hdet.Ensemble(optimizer, model=model, spread=0.3, converge_every=converge_every, **settings)
    replicas = Replicas(settings.get("replicas"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    converging = 0

    def step() -> int:
        tokens = torch.randint(_VOCABULARY, (_BATCH, _MODEL.block_size + 1), generator=generator)
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is None:
            return 0
        before = scheduler.last_report
        scheduler.step(loss)
        report = scheduler.last_report
        return 0 if report is before or report is None else report.converge_bytes

    # In the first steps DDP sends its order of buckets, and hdet its first agreement.
    for _ in range(2):
        step()
    meet()
    with _Counter(set(replicas.own_ranks)) as counter:
        for _ in range(converge_every):
            converging += step()
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "reported": converging / converge_every,
    }
    return counter.counted, facts
