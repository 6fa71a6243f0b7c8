"""Leaves the world as it was: what :func:`hdet.find_lr` moves beside the parameters, buffers and optimizer state."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from hdet.errors import HdetError
from hdet.model.wrappers import without_ddp


class _OwnBatchNorm(_BatchNorm):
    """A ``SyncBatchNorm`` while replicas train apart: the statistics are those of the replica's own batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@contextmanager
def untouched(models: Sequence[nn.Module], optimizer: Optimizer, batches: Any) -> Iterator[tuple[nn.Module, ...]]:
    """The models without ``DistributedDataParallel``, to be trained by the optimizer; nothing of it is seen afterwards.

    Put back are the random number generators of Python, numpy and torch, on the CPU and on GPUs, and those that the
    data loader was given; modules' training flags, attributes and registered tensors; gradients; and the optimizer's
    parameter groups and attributes. The values of parameters, buffers and optimizer state are not. Meanwhile hooks on
    the optimizer's steps do not run, and ``SyncBatchNorm`` normalises each replica by itself.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_generators(batches))
        stack.enter_context(_optimizer(optimizer))
        stack.enter_context(_refused(models))
        bare = stack.enter_context(without_ddp(models))
        stack.enter_context(_modules(bare))
        yield bare


@contextmanager
def _generators(batches: Any) -> Iterator[None]:
    python, cpu, numpy = random.getstate(), torch.get_rng_state(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    holders = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    given = {id(g): g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in given.values()]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for device, state in enumerate(gpus):
            torch.cuda.set_rng_state(state, device)
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _optimizer(optimizer: Optimizer) -> Iterator[None]:
    groups = [
        {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    tensors = [dict(group) for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    plain = {key: v for key, v in vars(optimizer).items() if v is None or isinstance(v, (bool, int, float, str))}
    known = set(vars(optimizer))
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    kept = [list(of.items()) for of in hooks if of is not None]
    for of in hooks:
        if of is not None:
            of.clear()
    try:
        yield
    finally:
        for of, items in zip((of for of in hooks if of is not None), kept, strict=True):
            of.clear()
            of.update(items)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for group, saved, own in zip(optimizer.param_groups, groups, tensors, strict=True):
            for key in [key for key in group if key not in saved]:
                del group[key]
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    group[key] = own[key]
                    with torch.no_grad():
                        own[key].copy_(value)
                else:
                    group[key] = value
        for key in set(vars(optimizer)) - known:
            delattr(optimizer, key)
        vars(optimizer).update(plain)


@contextmanager
def _refused(models: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile a forward pass through ``DistributedDataParallel`` is an error: replicas would wait for one another."""

    def refuse(*_: object) -> None:
        raise HdetError(
            "loss_fn called the DistributedDataParallel module, whose gradients are shared by all replicas, while each "
            "tries a learning rate of its own. Call the model that loss_fn is given."
        )

    ddps = {m for model in models for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)}
    handles = [ddp.register_forward_pre_hook(refuse) for ddp in ddps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _modules(models: Sequence[nn.Module]) -> Iterator[None]:
    modules = list({id(m): m for model in models for m in model.modules()}.values())
    saved = [(m, dict(vars(m)), [dict(of) for of in _registered(m)]) for m in modules]
    own = [
        (value, value._version, value.detach().clone())
        for _, attributes, _ in saved
        for value in attributes.values()
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_inference()
    ]
    norms = [m for m in modules if type(m) is nn.SyncBatchNorm]
    for norm in norms:
        norm.__class__ = _OwnBatchNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm
        for module, attributes, registered in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for of, items in zip(_registered(module), registered, strict=True):
                if list(of) != list(items) or any(of[key] is not items[key] for key in of):
                    of.clear()
                    of.update(items)
        with torch.no_grad():
            for value, version, copied in own:
                if value._version != version:
                    value.copy_(copied)


def _registered(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules
