"""torch.distributed.checkpoint: an hdet scheduler's state, of the same structure on every rank and at every time.

::

    state = {"model": ..., "optimizer": ..., "scheduler": Checkpointed(scheduler)}
    scheduler.converge(); dcp.save(state, checkpoint_id=path)
    dcp.load(state, checkpoint_id=path)               # into a new run, also with another number of shards

What the averages of a probe or of an outer momentum hold is saved by parameter: of a sharded one a ``DTensor`` that is
placed as the parameter is, zeros before there is an average. Everything else is one leaf, the same on every rank.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import hdet
from hdet.converge.buckets import Bucket, fill_buckets, wire_dtype
from hdet.errors import check_instance, check_item, check_mapping
from hdet.model.weights import Weights, is_dtensor, local

_PAIRS = {"slow_average": ("slow_average", "slow_trail"), "outer": ("outer_anchor", "outer_velocity")}
"""By key of a scheduler's state, the names of its two tensors for each parameter."""


class Checkpointed:
    """A scheduler as ``torch.distributed.checkpoint`` saves and loads it: its ``Stateful``.

    Args:
        scheduler: a :class:`hdet.OneCycleLR` or :class:`hdet.Ensemble`. Call its ``converge()`` before saving.

    Raises:
        TypeError: for anything else.
        ValueError: under DeepSpeed, whose weights are not the modules'.
    """

    def __init__(self, scheduler: hdet.OneCycleLR | hdet.Ensemble) -> None:
        rule = "an hdet.OneCycleLR or hdet.Ensemble"
        self._scheduler = check_instance("scheduler", scheduler, (hdet.OneCycleLR, hdet.Ensemble), rule)
        self._ensemble: hdet.Ensemble | None = (
            scheduler if isinstance(scheduler, hdet.Ensemble) else getattr(scheduler, "ensemble", None)
        )
        if self._ensemble is not None and type(self._ensemble._phases.converge.weights) is not Weights:
            raise ValueError(
                "Checkpointed() got a scheduler on a DeepSpeed engine, which keeps its weights elsewhere. Use "
                "hdet.integrations.deepspeed.save_checkpoint and load_checkpoint."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state. Not collective. Tensors are copies."""
        state = self._scheduler.state_dict()
        own = self._own(state)
        own["shard"] = [0, 1]  # of a number that depends on the rank, nothing is left
        tensors: dict[str, dict[str, Tensor]] = {}
        for key in self._kept():
            pairs = own[key]
            own[key] = bool(pairs)
            for i, name in enumerate(_PAIRS[key]):
                tensors[name] = self._by_parameter([pair[i] for pair in pairs])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return {"plain": buffer.getvalue(), **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, of any number of shards, or from :meth:`gathered`. Collective if the
        model is sharded and the tensors are whole.

        Raises:
            TypeError, ValueError: if it is no such state; nothing has changed then.
        """
        what = "The saved state"
        given = check_mapping("state_dict", state_dict, "what Checkpointed.state_dict() returned")
        plain = check_instance("plain", check_item(what, given, "plain"), bytes, "bytes")
        state = torch.load(io.BytesIO(plain), map_location="cpu", weights_only=True)
        own = self._own(state)
        own["shard"] = [0, 1] if self._ensemble is None else list(self._ensemble._phases.converge.shard)
        kept = [key for key in _PAIRS if own.get(key)]
        for key in kept:  # before anything is sent
            if key not in self._kept():
                raise ValueError(
                    f"The saved state has {key}, which this run has not. Build the scheduler with the probe= and "
                    "outer= of the run that was saved."
                )
            for name in _PAIRS[key]:
                self._check(name, check_item(what, given, name))
        for key in _PAIRS if self._ensemble is not None else ():
            first, second = (self._wires(given[name]) if key in kept else [] for name in _PAIRS[key])
            own[key] = [list(pair) for pair in zip(first, second, strict=True)]
        self._scheduler.load_state_dict(state)

    def gathered(self) -> dict[str, Any]:
        """:meth:`state_dict` with whole tensors on the CPU instead of shards: the same on every rank, for files that
        one rank writes. Collective if the model is sharded."""
        return {
            name: value
            if name == "plain"
            else {key: (t.full_tensor() if is_dtensor(t) else t).cpu() for key, t in value.items()}
            for name, value in self.state_dict().items()
        }

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """The ensemble's part of a scheduler's state."""
        if self._ensemble is None:
            return {}
        found = state if isinstance(self._scheduler, hdet.Ensemble) else check_item("The saved state", state, "hdet")
        return check_mapping("hdet", found, "what state_dict() returned")  # type: ignore[return-value]

    def _kept(self) -> list[str]:
        """Keys of a state under which there are, or will be, averages."""
        if self._ensemble is None:
            return []
        settings = self._ensemble.settings
        kept = {"slow_average": settings.probe is not None, "outer": not settings.given["outer"].is_plain}
        return [key for key in _PAIRS if kept[key]]

    def _parameters(self) -> list[tuple[str, Tensor]]:
        """What is trained, in the averages' order, and its name in the model; each once."""
        assert self._ensemble is not None
        weights = self._ensemble._phases.converge.weights
        slots = {id(local(slot.tensor)): slot for slot in reversed(weights.slots())}
        found = {id(tensor): slots[id(tensor)] for tensor, trained in weights.tensors() if trained}
        return [(slot.name, slot.tensor) for slot in found.values()]

    def _buckets(self, tensors: Sequence[Tensor]) -> list[Bucket]:
        assert self._ensemble is not None
        averaging = self._ensemble.settings.given["averaging"]
        return fill_buckets(tensors, averaging.bucket_bytes, self._ensemble.replicas.device_for)

    def _by_parameter(self, wires: Sequence[Tensor]) -> dict[str, Tensor]:
        """Flat tensors, one for each bucket, cut into the parameters' shapes; zeros where there are none."""
        named = self._parameters()
        copies = [_empty(parameter).zero_() for _, parameter in named]
        for bucket, wire in zip(self._buckets(copies), wires, strict=True) if wires else ():
            bucket.write(wire)
        return {name: _placed(copy, like) for (name, like), copy in zip(named, copies, strict=True)}

    def _check(self, name: str, tensors: Any) -> None:
        """Raise unless there is a tensor of each parameter's shape."""
        check_mapping(name, tensors, "tensors by the parameters' names")
        for key, parameter in self._parameters():
            found = check_instance(f"{name}[{key!r}]", check_item(name, tensors, key), Tensor, "a tensor")
            if found.shape != parameter.shape:
                raise ValueError(
                    f"Invalid {name}[{key!r}] of shape {tuple(found.shape)}. Must have the parameter's shape, "
                    f"{tuple(parameter.shape)}. Load it into the model that was saved."
                )

    def _wires(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The inverse of :meth:`_by_parameter`."""
        copies = []
        for name, parameter in self._parameters():
            copy = _empty(parameter)
            copy.copy_(_own_part(tensors[name], parameter))
            copies.append(copy)
        return [bucket.pack() for bucket in self._buckets(copies)]


def _empty(parameter: Tensor) -> Tensor:
    """Memory of the layout of this rank's part of a parameter, in the precision in which averages are sent."""
    plain = local(parameter)
    dtype = plain.dtype if plain.is_complex() else wire_dtype(plain.dtype)
    return torch.empty_strided(plain.shape, plain.stride(), dtype=dtype, device=plain.device)


def _placed(copy: Tensor, parameter: Any) -> Tensor:
    """This rank's part as a DTensor, where the parameter is one."""
    if not is_dtensor(parameter):
        return copy
    from torch.distributed.tensor import DTensor

    where = parameter.device_mesh, parameter.placements
    return DTensor.from_local(copy, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _own_part(tensor: Any, parameter: Any) -> Tensor:
    """This rank's part of a saved tensor."""
    if is_dtensor(parameter) and not is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return local(tensor)
