"""Every setting, declared once: its type, default, rule and meaning."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import nn
from typing_extensions import TypedDict

from hdet.errors import (
    check_choice,
    check_flag,
    check_instance,
    check_list,
    check_number,
    check_path,
    check_whole,
    shown,
)
from hdet.explore.hyperparameters import Hyperparameter
from hdet.model.devices import check_device
from hdet.model.exclusion import ExcludeLike, check_exclude
from hdet.model.weights import check_modules
from hdet.monitor.base import MonitorLike
from hdet.observe.probe import LossFunction, Probe, check_loss_function
from hdet.replicas.topology import ReplicasLike, check_replicas
from hdet.settings.groups import Averaging, Exploration, Outer
from hdet.steer.controllers import Controller

_GRADIENTS = ("shared", "grouped", "local")


class Setting(NamedTuple):
    """Of one setting."""

    default: Any
    check: Callable[[str, Any], Any]
    """The value as it is kept. Raises TypeError or ValueError for one that is wrong by itself."""


def _number(rule: str, ok: Callable[[float], bool]) -> Callable[[str, Any], Any]:
    return functools.partial(check_number, rule=rule, ok=ok)


def _whole(rule: str, ok: Callable[[int], bool]) -> Callable[[str, Any], Any]:
    return functools.partial(check_whole, rule=rule, ok=ok)


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _instance(kind: type) -> Callable[[str, Any], Any]:
    return functools.partial(check_instance, kinds=kind, rule=f"an instance of hdet.{kind.__name__}")


def _controller(name: str, value: Any) -> Any:
    kinds = get_args(Controller)
    rule = f"an instance of {' or '.join(f'hdet.controller.{kind.__name__}' for kind in kinds)}"
    return check_instance(name, value, (*kinds, type(None)), rule)


def _hyperparameters(name: str, value: Any) -> tuple[Hyperparameter, ...]:
    rule = "a list of what hdet.param_group, hdet.module_attribute and hdet.scalar make"
    given = tuple(check_list(name, value, rule))
    for one in given:
        check_instance(name, one, Hyperparameter, rule)
    if len({id(one) for one in given}) < len(given):
        raise ValueError(f"Invalid {name}={shown(value)}. Must hold each hyperparameter once.")
    return given


def _rollback(name: str, value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    rule = "True, False, or a device such as 'cpu'"
    check_instance(name, value, (str, torch.device), rule)
    return check_device(name, value, rule)


def _path(name: str, value: Any) -> str:
    return check_path(name, value, "the path of a file that save_prior() wrote")


def _modules(name: str, value: Any) -> Any:
    """``None``, a module, or a tuple of several."""
    return value if value is None or isinstance(value, nn.Module) else check_modules(name, value)


def _probe(name: str, value: Any) -> Any:
    return value if value is None or isinstance(value, Probe) else check_loss_function(name, value)


def _monitors(name: str, value: Any) -> Any:
    """As it is, or a tuple where it is an iterator, which can be read only once."""
    return tuple(value) if isinstance(value, Iterator) else value


class Settings(TypedDict, total=False):
    """What :class:`hdet.OneCycleLR` and :class:`hdet.Ensemble` take by keyword."""

    model: Annotated[nn.Module | Iterable[nn.Module] | None, Setting(None, _modules)]
    """The module or modules whose parameters and buffers are averaged. Required when replicas differ.
    Parameters that the optimizer trains beside theirs are not averaged, and warned of."""
    exclude: Annotated[ExcludeLike, Setting((), check_exclude)]
    """Parameters and buffers of ``model`` that are each rank's own, such as experts, queues and heads: neither averaged
    nor compared, and neither is what the optimizer keeps for them. Name patterns as ``fnmatch`` reads them
    (``"experts.*"``; a ``module.`` of ``DistributedDataParallel`` may be there or not), tensors, modules, or a list of
    these. One that matches nothing is an error. What ``DistributedDataParallel`` was told to ignore is excluded, too.
    """
    broadcast: Annotated[bool, Setting(False, check_flag)]
    """Whether the first ``step()``, and the first after a load, makes unequal replicas equal: parameters, buffers and
    optimizer state become replica 0's, in place. Otherwise weights that differ at the start are an error there."""
    spread: Annotated[float, Setting(0.0, _number("in [0, 1)", lambda alpha: 0 <= alpha < 1))]
    """``alpha``, in [0, 1): replicas train under ``[1 - alpha, 1 + alpha]`` times the base learning rate. The paper
    uses 1/9."""
    converge_every: Annotated[
        int | None, Setting(None, _optional(_whole(">= 1 step: replicas are averaged this often", lambda n: n >= 1)))
    ]
    """``T``, the round's length in steps; by default a hundred rounds, and in a run of more than 10,000 steps rounds of
    100 steps, up to 400 rounds."""
    auto_lr: Annotated[bool, Setting(False, check_flag)]
    """Whether the controller moves the gain. Needs the loss in ``step()``, ``model``, and the run's length."""
    probe: Annotated[LossFunction | Probe | None, Setting(None, _probe)]
    """``loss_fn(model, batch)``, or a :class:`hdet.Probe`: the paired probe, whose losses are evidence for the
    controller beside how far the weights move, and show what hyperparameters do. Pass the batch to ``step()`` then."""
    controller: Annotated[Controller | None, Setting(None, _controller)]
    """What moves the gain; default ``hdet.controller.Posterior()``, which goes by how far the weights move, and with a
    probe by its losses too. ``hdet.controller.Published()`` is the paper's, whose hypergradient is also in the reports
    of a run without ``auto_lr``."""
    per_group: Annotated[bool, Setting(False, check_flag)]
    """Whether each parameter group has a gain, and multipliers, of its own; default one for all."""
    hyperparameters: Annotated[Sequence[Hyperparameter], Setting((), _hyperparameters)]
    """What else the replicas differ in, made by :func:`hdet.param_group`, :func:`hdet.module_attribute` and
    :func:`hdet.scalar`; the probe moves the centre of each."""
    exploration: Annotated[Exploration, Setting(Exploration(), _instance(Exploration))]
    """How these are told apart and moved."""
    virtual_replicas: Annotated[int, Setting(1, _whole(">= 1", lambda count: count >= 1))]
    """``K``: with gradient accumulation over K micro-batches, every process trains K replicas, one for each
    micro-batch; see ``each()``. With N processes there are ``N K``."""
    prior: Annotated[str | os.PathLike[str] | None, Setting(None, _optional(_path))]
    """Gains and centres to start from: a file that :meth:`hdet.Ensemble.save_prior` wrote."""
    rollback: Annotated[bool | str | torch.device, Setting(True, _rollback)]
    """With ``auto_lr``, whether a round that blew up is undone: parameters, buffers or optimizer state are finite on no
    replica; or the loss jumped, in units of its own spread so far, while the weights moved
    (:class:`hdet.steer.Recovery`; neither the loss's zero nor its sign matters). Parameters, buffers and optimizer
    state go back to the last good converge, and the gain falls to a third; also in a ``converge()`` inside a round, if
    nothing is finite. It takes memory for one copy of them, on the device named instead of ``True`` (``"cpu"``). Not
    with ``averaging.overlap_steps``. Pass ``False`` for a loss whose jumps are meant."""
    replicas: Annotated[ReplicasLike, Setting(None, check_replicas)]
    """Who they are: a number of replicas (each of as many consecutive ranks), a ``ProcessGroup`` (every rank in it is
    one), a 1-D ``DeviceMesh``, or one dimension of a mesh (``mesh["replicate"]``; the ranks along the others are a
    replica's members, over which it is sharded). Default: every rank is one. Members share a learning rate, and their
    losses are averaged. Without an initialised process group there is one replica, with multiplier 1."""
    gradients: Annotated[
        Literal["shared", "grouped", "local"], Setting("shared", functools.partial(check_choice, choices=_GRADIENTS))
    ]
    """Over whom gradients are averaged: ``shared``, all ranks, as DDP and HSDP do it; ``grouped``, the members of a
    replica; ``local``, nobody beyond a replica: Local SGD. The synchronisation is switched off for you, and on again by
    the next ensemble built on the module with ``shared`` (:mod:`hdet.model.gradients`)."""
    averaging: Annotated[Averaging, Setting(Averaging(), _instance(Averaging))]
    """How the replicas are averaged: bucket size, overlap, precision on the wire, the optimizer's state."""
    outer: Annotated[Outer, Setting(Outer(), _instance(Outer))]
    """With local gradients, the outer optimizer that moves the replicas' mean."""
    seed: Annotated[int, Setting(0, _whole("an int, the same on every rank", lambda seed: True))]
    """Of the permutations, by which multipliers are assigned to replicas."""
    monitor: Annotated[MonitorLike, Setting(None, _monitors)]
    """Where the reports go: :class:`hdet.TensorBoard`, :class:`hdet.JsonLines`, a function of a :class:`hdet.Report`,
    or several of these."""


DECLARED: dict[str, Setting] = {
    name: next(part for part in get_args(hint)[1:] if isinstance(part, Setting))
    for name, hint in get_type_hints(Settings, include_extras=True).items()
}
"""By name, in the order of :class:`Settings`."""
GROUPS = {"averaging": Averaging, "outer": Outer, "exploration": Exploration}


def documentation(declared: type) -> dict[str, str]:
    """What each field of :class:`Settings`, or of a dataclass, means: the text below it, in one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(declared))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(after, ast.Expr), f"{statement.target.id} has no text below it"
            assert isinstance(after.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts
