"""What the model gets: batches, drawn by seed and moved to the device, and the loss of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdet.train import data, models
from hdet.train.config import Config
from hdet.train.processes import Process


class Batches:
    """This rank's batches.

    Args:
        config: the run.
        process: this process of it.
        source: the data they are drawn from.
        model: whose parameters' type says what the inputs must be.
    """

    def __init__(self, config: Config, process: Process, source: data.Data, model: nn.Module) -> None:
        self.config, self.source = config, source
        self._process, self._model = process, model

    def draw(self, step: int, purpose: int | str, *, held_out: bool = False) -> data.Batch:
        """The batch for a purpose beside training itself."""
        seed = data.step_seed(self.config.train.seed, self._process.rank, step, purpose)
        return self.source.draw(self.config.train.batch_size, torch.Generator().manual_seed(seed), held_out=held_out)

    def loss_of(self, model: nn.Module, batch: data.Batch, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss over a batch, on the device."""
        inputs, targets = self.to_device(batch)
        with self.autocast():
            return models.loss_of(model(inputs).float(), targets, label_smoothing)

    def to_device(self, batch: data.Batch) -> data.Batch:
        """The batch where the model is."""
        if batch.inputs.is_floating_point():  # a model that is bfloat16 itself takes nothing else
            batch = batch._replace(inputs=batch.inputs.to(self._dtype))
        if self._process.device.type == "cpu":
            return batch
        return data.Batch(*(t.pin_memory().to(self._process.device, non_blocking=True) for t in batch))

    def autocast(self) -> torch.autocast:
        """``train.dtype`` of forward passes."""
        bf16 = self.config.train.dtype == "bfloat16" and self._dtype == torch.float32
        return torch.autocast(self._process.device.type, torch.bfloat16, enabled=bf16)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return next(self._model.parameters()).dtype
