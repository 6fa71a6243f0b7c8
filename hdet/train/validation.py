"""Loss and accuracy on the validation set, shared out over the replicas."""

from __future__ import annotations

import math

import torch
from torch import nn

from hdet.replicas.topology import Replicas
from hdet.train import models
from hdet.train.batches import Batches


@torch.no_grad()
def validate(batches: Batches, model: nn.Module, wrapped: nn.Module, replicas: Replicas) -> dict[str, float]:
    """``validation_loss`` and ``validation_accuracy`` of replicas that are equal. Collective.

    Every replica takes every N-th batch, and all of its members the same: a sharded model needs them all.

    Args:
        batches: from which the validation's are taken.
        model: what is measured.
        wrapped: what trains instead of the model; it is left in evaluation mode.
        replicas: who share the work.
    """
    config, source = batches.config.train, batches.source
    size = config.batch_size
    count = source.validation_batches(size, config.eval_batches)
    wrapped.eval()
    rows = []
    for index in range(replicas.rank, count, replicas.size):
        inputs, targets = batches.to_device(source.validation(index, size, count))
        with batches.autocast():
            logits = model(inputs)
        rows.append(
            torch.stack(
                (
                    models.loss_of(logits.float(), targets).double() * targets.numel(),
                    (logits.argmax(-1) == targets).sum().double(),
                    torch.tensor(targets.numel(), dtype=torch.float64, device=targets.device),
                )
            )
        )
    device = next(model.parameters()).device
    rows += [torch.zeros(3, dtype=torch.float64, device=device)] * (-(-count // replicas.size) - len(rows))
    everyone = replicas.all_gather(torch.stack(rows).flatten().tolist())
    gathered = [members[0] for members in replicas.by_replica(everyone)]
    # fsum is exact, so that the result does not depend on how many replicas shared the work.
    values = [value for row in gathered for value in row]
    loss, right, seen = (math.fsum(values[column::3]) for column in range(3))
    return {"validation_loss": loss / seen, "validation_accuracy": right / seen}
