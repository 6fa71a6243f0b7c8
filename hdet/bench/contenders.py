"""The contenders of the ``converge`` section: ours, and the ways others average a model over processes.

All average ``model.parameters()`` over the default process group; :class:`Ours` averages the buffers too. What is a
library's own code is called, and what needs a library's whole environment is restated here, as its docstring says.
"""

from __future__ import annotations

import importlib
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.distributed_c10d import _coalescing_manager

import hdet
from hdet.bench.measure import OURS, Unavailable
from hdet.converge.averager import Averager, Inspection
from hdet.model.weights import Weights
from hdet.replicas.topology import Replicas
from hdet.settings import Averaging

_NEVER = 2**62


class Contender:
    """One way to average a model.

    Attributes:
        averages_buffers: whether the model's buffers too.
        tolerance: how far from the mean it may end, in units of values of about 1.

    Args:
        model: averaged in place, though ``p.data`` may become another tensor. All its tensors are on one device.

    Raises:
        Unavailable: with the reason, if it cannot run here.
    """

    averages_buffers = False
    tolerance = 1e-6

    def __init__(self, model: nn.Module) -> None:
        self.model, self.size = model, dist.get_world_size()

    def tensors(self) -> list[Tensor]:
        """The parameters' values."""
        return [p.data for p in self.model.parameters()]

    def prepare(self) -> None:
        """What goes before and does not count. Called after the parameters were made to differ."""

    def average(self) -> None:
        """Replace every parameter by its mean over the processes. This is what is timed."""
        raise NotImplementedError


class Ours(Contender):
    """``scheduler.converge()`` as users call it: with its checks of agreement and finiteness, and its report."""

    averages_buffers = True
    averaging = Averaging()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self._ensemble = hdet.Ensemble(
            optimizer,
            model=model,
            spread=1 / 9,
            converge_every=_NEVER,
            averaging=self.averaging,
        )

    def prepare(self) -> None:
        self._ensemble.step()  # there is something to converge only after a step

    def average(self) -> None:
        self._ensemble.converge()


class OursInBfloat16(Ours):
    """The same with a wire of bfloat16: half the traffic, a copy of the parameters, and a mean that is a little off."""

    tolerance = 5e-2
    averaging = Averaging(wire_dtype="bfloat16")


class OursInOneBucket(Ours):
    """The same with one bucket for the whole model: a second copy of it, as the alternatives keep. What bounded memory
    costs."""

    averaging = Averaging(bucket_mib=2.0**20)


class AverageOnly(Contender):
    """hdet's average without what is around it: that replicas agree, that all is finite, and the report. Not an
    alternative, but the measure of what these cost."""

    averages_buffers = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._averager = Averager(Weights([model]), Replicas(), Ours.averaging.bucket_bytes)

    def prepare(self) -> None:
        mine = self._averager.inspect()
        constants = [None] * self.size
        dist.all_gather_object(constants, mine)
        self._seen = [Inspection(*seen) for seen in constants]  # type: ignore[misc]

    def average(self) -> None:
        self._averager.average(self._seen)


class CommunicationOnly(Contender):
    """A bare all-reduce and a division, of parameters that were moved into one buffer before. Not an alternative, but
    what no way of averaging parameters where they are can beat."""

    def prepare(self) -> None:
        tensors = self.tensors()
        self._flat = torch.cat([t.view(-1) for t in tensors])
        for p, slot in zip(self.model.parameters(), _slots(self._flat, tensors), strict=True):
            p.data = slot

    def average(self) -> None:
        dist.all_reduce(self._flat)
        self._flat /= self.size
        del self._flat  # the parameters keep it until they move out


class PerTensor(Contender):
    """One blocking all-reduce per tensor: the HDET paper's published code."""

    def average(self) -> None:
        for tensor in self.tensors():
            dist.all_reduce(tensor)
            tensor /= self.size


class TorchAverager(Contender):
    """torch's own ``PeriodicModelAverager``: one flat copy of the model, which the parameters then live in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for p in model.parameters():
            p.grad = p.new_zeros(()).expand_as(p)  # it leaves out parameters without a gradient
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a period of 1 is better served by DDP
            self._averager = PeriodicModelAverager(period=1, process_group=dist.group.WORLD)

    def average(self) -> None:
        self._averager.average_parameters(self.model.parameters())


class Accelerate(Contender):
    """accelerate's own ``LocalSGD``: an all-reduce of a copy of each tensor, which replaces it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        try:
            accelerate = importlib.import_module("accelerate")
            local_sgd = importlib.import_module("accelerate.local_sgd")
        except ModuleNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from None
        accelerator = accelerate.Accelerator(cpu=next(model.parameters()).device.type == "cpu")
        self._local_sgd = local_sgd.LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=1)

    def average(self) -> None:
        self._local_sgd.step()


class TorchftLocalSGD(Contender):
    """torchft's ``LocalSGD``, restated without its Manager (which needs a server and adds a vote per average): all
    tensors' copies are all-reduced at once, and copied back when all have arrived."""

    def average(self) -> None:
        tensors = self.tensors()
        copies = [tensor.clone() for tensor in tensors]
        works = [dist.all_reduce(copy, async_op=True) for copy in copies]
        for work in works:
            work.wait()
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy.div_(self.size))


class TorchftBuckets(Contender):
    """torchft's bucketing in ``DiLoCo`` (32 MiB, off by default there), restated without its Manager: whole tensors in
    zeroed buckets, all in flight at once. Its loop drops a tensor larger than a bucket; here that has a bucket of its
    own."""

    capacity = 32 * 2**20

    def average(self) -> None:
        left = self.tensors()
        flights: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        while left:
            room, count = max(self.capacity // left[0].element_size(), left[0].numel()), 0
            while count < len(left) and (room := room - left[count].numel()) >= 0:
                count += 1
            members, left = left[:count], left[count:]
            wire = members[0].new_zeros(sum(t.numel() for t in members))
            start = 0
            for tensor in members:
                wire[start : start + tensor.numel()].copy_(tensor.view(-1))
                start += tensor.numel()
            flights.append((dist.all_reduce(wire, async_op=True), wire, members))
        for work, wire, members in flights:
            work.wait()
            wire /= self.size
            start = 0
            for tensor in members:
                tensor.copy_(wire[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()


class Coalescing(Contender):
    """torch's coalescing manager around per-tensor calls: NCCL groups them; gloo flattens them into one."""

    def average(self) -> None:
        tensors = self.tensors()
        with _coalescing_manager():
            for tensor in tensors:
                dist.all_reduce(tensor)
        torch._foreach_div_(tensors, self.size)


class ForeachFlat(Contender):
    """``torch._foreach_copy_`` into one flat buffer, which is kept: a second model in memory all along."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        tensors = self.tensors()
        self._flat = tensors[0].new_empty(sum(t.numel() for t in tensors))
        self._slots = _slots(self._flat, tensors)

    def average(self) -> None:
        tensors = self.tensors()
        torch._foreach_copy_(self._slots, tensors)
        dist.all_reduce(self._flat)
        self._flat /= self.size
        torch._foreach_copy_(tensors, self._slots)


def _slots(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of ``flat`` in the shapes of ``tensors``, end to end."""
    pieces = flat.split([t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


CONTENDERS: dict[str, type[Contender]] = {
    OURS: Ours,
    "hdet_bf16": OursInBfloat16,
    "hdet_one_bucket": OursInOneBucket,
    "hdet_average": AverageOnly,
    "hdet_floor": CommunicationOnly,
    "per_tensor": PerTensor,
    "torch_averager": TorchAverager,
    "accelerate": Accelerate,
    "torchft_localsgd": TorchftLocalSGD,
    "torchft_buckets": TorchftBuckets,
    "coalescing": Coalescing,
    "foreach_flat": ForeachFlat,
}
