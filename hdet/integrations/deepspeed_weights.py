"""Where a DeepSpeed engine keeps the weights that it trains: one class for each way."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from hdet.model.weights import Weights


def weights_of(engine: Any) -> Weights:
    """The weights that ``engine`` trains, as they are kept: in the module, or as fp32 masters in its optimizer.

    Raises:
        ValueError: for a way of keeping them that is not known.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return Weights((engine.module,))
    kind = _KINDS.get(type(optimizer))
    reason = f"its optimizer is a {type(optimizer).__name__}" if kind is None else _obstacle(engine)
    if kind is None or reason:
        raise ValueError(
            f"hdet cannot average what this DeepSpeed engine trains: {reason}. Supported are ZeRO 0 to 3 with fp32, "
            "bf16 or fp16, and offload to the CPU."
        )
    return kind(engine)


def _obstacle(engine: Any) -> str:
    optimizer = engine.optimizer
    if engine.has_moe_layers:
        return "the model has mixture-of-experts layers"
    if engine.zero_hpz_partition_size() > 1:
        return "zero_hpz_partition_size keeps a second copy of the shards"
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        return "its weights are on NVMe"
    return ""


class _Masters(Weights):
    """Masters in the optimizer, of which the module holds copies; what is not trained is in the module alone.

    The engine is referred to weakly, as :func:`hdet.model.weights.register_weights` asks.
    """

    masters: str
    """The optimizer's attribute that lists the masters."""
    copies: str
    """That which lists, by parameter group, the module's parameters that they are the masters of."""

    def __init__(self, engine: Any) -> None:
        self._ref = ref(engine)

    @property
    def _engine(self) -> Any:
        engine = self._ref()
        if engine is None:
            raise RuntimeError("The DeepSpeed engine is gone. Keep it as long as its scheduler.")
        return engine

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    def tensors(self) -> Iterator[tuple[Tensor, bool]]:
        """The masters, then buffers and parameters that no optimizer trains."""
        yield from ((master, True) for master in self._trained())
        trained = {id(p) for group in getattr(self._optimizer, self.copies) for p in group}
        module: nn.Module = self._engine.module
        for p in module.parameters():
            if id(p) not in trained:
                yield self._own_part(p), False
        for buffer in module.buffers():
            yield buffer, False

    def shapes(self) -> Iterable[tuple[int, ...]]:
        """Flat partitions are whole tensors here: they hold parts of several parameters."""
        return [tuple(tensor.shape) for tensor, _ in self.tensors()]

    def _trained(self) -> Iterable[Tensor]:
        return getattr(self._optimizer, self.masters)

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        return parameter


class _Sharded(_Masters):
    """ZeRO 1 and 2: every rank has the masters of its shard, and all ranks a copy of the whole."""

    masters, copies = "single_partition_of_fp32_groups", "bit16_groups"

    def written(self) -> None:
        """Round this shard into the module's parameters and gather the others. Collective in the replica."""
        self._optimizer.update_lp_params()


class _ShardedBF16(_Sharded):
    """ZeRO 1 in bf16 with gradients accumulated in fp32."""

    masters, copies = "fp32_groups_flat_partition", "bf16_groups"


class _ShardedParameters(_Masters):
    """ZeRO 3: masters and copies are sharded; parameters are gathered when a module needs them."""

    masters, copies = "fp32_partitioned_groups_flat", "fp16_groups"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._masters = [
            piece
            for flat, group in zip(super()._trained(), self._optimizer.fp16_groups, strict=True)
            for shard, p in zip(flat.detach().split([p.partition_numel() for p in group]), group, strict=True)
            if (piece := self._filled(p, shard)).numel()
        ]

    @torch.no_grad()
    def written(self) -> None:
        """What ``optimizer.step()`` does when the masters have moved: let go of all gathered parameters, round the
        masters into the shards, and gather again the small ones that always stay. Collective in the replica."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _trained(self) -> Iterable[Tensor]:
        return self._masters

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        return self._filled(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]

    def _filled(self, parameter: Any, shard: Tensor) -> Tensor:
        """The part of a shard that holds the parameter. The last shard goes on with memory that nobody has written: any
        bits, NaNs among them."""
        member = dist.get_rank(self._optimizer.dp_process_group)
        return shard[: max(0, parameter.ds_numel - member * parameter.partition_numel())]


class _Whole(_Masters):
    """ZeRO 0 in bf16 or fp16: a master of every parameter on every rank."""

    masters, copies = "fp32_groups", "fp16_groups"
    whole = True

    def _trained(self) -> Iterable[Tensor]:
        return itertools.chain.from_iterable(self._optimizer.fp32_groups)

    @torch.no_grad()
    def written(self) -> None:
        """Round the masters into the module's parameters."""
        for masters, copies in zip(self._optimizer.fp32_groups, self._optimizer.fp16_groups, strict=True):
            torch._foreach_copy_([copy.data for copy in copies], masters)


class _WholeFlat(_Masters):
    """The same under DeepSpeed's fused optimizers: one flat master for each parameter group."""

    masters, copies = "fp32_groups_flat", "fp16_groups"
    whole = True

    @torch.no_grad()
    def written(self) -> None:
        """Round the masters into the memory that the module's parameters are views of."""
        torch._foreach_copy_(self._optimizer.fp16_groups_flat, self._optimizer.fp32_groups_flat)


_KINDS: dict[type, type[_Masters]] = {
    DeepSpeedZeroOptimizer: _Sharded,
    BF16_Optimizer: _ShardedBF16,
    DeepSpeedZeroOptimizer_Stage3: _ShardedParameters,
    FP16_UnfusedOptimizer: _Whole,
    FP16_Optimizer: _WholeFlat,
}
