r"""Warm noisy start: each replica starts from a checkpoint plus noise of its own (arXiv 2604.24708)::

    theta_r = theta + N(0, nu^2 ||theta||^2 / d),      d = number of elements

for every parameter tensor separately: the noise has ``nu`` times the tensor's norm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import nn

from hdet.errors import check_number, check_whole
from hdet.model.start import mark_noisy
from hdet.model.weights import check_modules, is_dtensor
from hdet.replicas.topology import Replicas, ReplicasLike


@torch.no_grad()
def warm_noisy_start(
    model: nn.Module | Iterable[nn.Module], nu: float = 0.01, *, seed: int = 0, replicas: ReplicasLike = None
) -> None:
    """Add this replica's noise to the trainable parameters, in place. Not collective.

    Call it after the checkpoint was loaded and the model wrapped: ``DistributedDataParallel`` sends rank 0's
    parameters to all ranks when it is built. Buffers and frozen parameters stay as they are; tied parameters
    get noise once. The noise depends on (seed, replica, the parameter's name) alone, and no global random state is read
    or changed. The modules are marked: that their trained parameters differ between replicas is no error when the run
    starts.

    Args:
        model: the module or modules.
        nu: the noise's norm in units of the parameter's, in [0, 1e6]; the paper uses 0.01.
        seed: of the noise.
        replicas: as for :class:`hdet.Ensemble`. The members of a replica get the same noise.

    Raises:
        TypeError, ValueError: for a bad argument; TypeError for sharded parameters: add the noise before sharding.

    Examples:
        >>> import torch, hdet
        >>> model = torch.nn.Linear(64, 64, bias=False)
        >>> before = model.weight.detach().clone()
        >>> hdet.warm_noisy_start(model, 0.01)
        >>> 0.009 < ((model.weight - before).norm() / before.norm()).item() < 0.011
        True
    """
    nu = check_number("nu", nu, "in [0, 1e6]", lambda nu: 0 <= nu <= 1e6)
    seed = check_whole("seed", seed, "an int, the same on every rank")
    modules = check_modules("model", model)
    # Within a module named_parameters() yields tied parameters once.
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    if sharded := [name for name, p in named if is_dtensor(p)]:
        raise TypeError(f"{sharded[0]} is sharded. Call warm_noisy_start() before fully_shard().")
    mark_noisy(modules)
    replica = Replicas(replicas).rank
    seen: set[int] = set()
    for index, (name, p) in enumerate(named):
        if id(p) in seen or not p.numel():
            continue
        seen.add(id(p))
        text = f"noisy start/{seed}/{replica}/{index}/{name}"
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
        # Drawn on the CPU, so that it does not depend on the model's device.
        dtype = torch.complex64 if p.is_complex() else torch.float32
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(key), dtype=dtype)
        deviation = nu * torch.linalg.vector_norm(p, dtype=torch.complex128 if p.is_complex() else torch.float64)
        p.add_(noise.to(p.device, p.dtype), alpha=deviation.item() / math.sqrt(p.numel()))
