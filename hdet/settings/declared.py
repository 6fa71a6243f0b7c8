"""Every setting, declared once: its type, default, rule and meaning."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import nn
from typing_extensions import TypedDict

from hdet.errors import check_choice, check_flag, check_number, check_whole
from hdet.explore.hyperparameters import Hyperparameter
from hdet.monitor.base import MonitorLike
from hdet.observe.probe import LossFunction, Probe
from hdet.replicas.topology import ReplicasLike
from hdet.settings.groups import Averaging, Exploration, Outer
from hdet.steer.controllers import Controller
from hdet.steer.published import Published
from hdet.steer.two_slope import TwoSlope

_GRADIENTS = ("shared", "grouped", "local")


class Setting(NamedTuple):
    """Of one setting."""

    default: Any
    check: Callable[[str, Any], object] = lambda name, value: None
    """Raises TypeError or ValueError for a value that is wrong by itself."""


def _number(rule: str, ok: Callable[[float], bool]) -> Callable[[str, Any], object]:
    return functools.partial(check_number, rule=rule, ok=ok)


def _whole(rule: str, ok: Callable[[int], bool]) -> Callable[[str, Any], object]:
    return functools.partial(check_whole, rule=rule, ok=ok)


def _optional(check: Callable[[str, Any], object]) -> Callable[[str, Any], object]:
    return lambda name, value: None if value is None else check(name, value)


def _instance(kind: type) -> Callable[[str, Any], object]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"Invalid {name}={value!r}. Must be an instance of hdet.{kind.__name__}.")

    return check


def _controller(name: str, value: Any) -> None:
    if not isinstance(value, (Published, TwoSlope, type(None))):
        raise TypeError(f"Invalid {name}={value!r}. Must be an instance of hdet.controller.TwoSlope or Published.")


def _hyperparameters(name: str, value: Any) -> None:
    known = isinstance(value, Sequence) and not isinstance(value, str)
    if not known or not all(isinstance(h, Hyperparameter) for h in value):
        raise TypeError(
            f"Invalid {name}={value!r}. Must be a list of what hdet.param_group, hdet.module_attribute and hdet.scalar "
            "make."
        )


def _rollback(name: str, value: Any) -> None:
    if not isinstance(value, (bool, str, torch.device)):
        raise TypeError(f"Invalid {name}={value!r}. Must be True, False, or a device such as 'cpu'.")
    if isinstance(value, str):
        try:
            torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"Invalid {name}={value!r}. Must be True, False, or a device such as 'cpu'.") from error


def _path(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Invalid {name}={value!r}. Must be the path of a file that save_prior() wrote.")


class Settings(TypedDict, total=False):
    """What :class:`hdet.OneCycleLR` and :class:`hdet.Ensemble` take by keyword."""

    model: Annotated[nn.Module | Iterable[nn.Module] | None, Setting(None)]
    """The module or modules whose parameters and buffers are averaged. Required when replicas differ."""
    spread: Annotated[float, Setting(0.0, _number("in [0, 1)", lambda alpha: 0 <= alpha < 1))]
    """``alpha``, in [0, 1): replicas train under ``[1 - alpha, 1 + alpha]`` times the base learning rate. The paper
    uses 1/9."""
    converge_every: Annotated[
        int | None, Setting(None, _optional(_whole(">= 1 step: replicas are averaged this often", lambda n: n >= 1)))
    ]
    """``T``, the round's length in steps; by default a hundred rounds, and in a run of more than 10,000 steps rounds of
    100 steps, up to 400 rounds."""
    auto_lr: Annotated[bool, Setting(False, check_flag)]
    """Whether the controller moves the gain. Needs the loss in ``step()``, and ``spread > 0``."""
    probe: Annotated[LossFunction | Probe | None, Setting(None)]
    """``loss_fn(model, batch)``, or a :class:`hdet.Probe`: the paired probe, by which learning rates can be told apart
    in short rounds. Pass the batch to ``step()`` then."""
    controller: Annotated[Controller | None, Setting(None, _controller)]
    """What moves the gain; default ``hdet.controller.TwoSlope()`` with a probe, ``hdet.controller.Published()``
    without."""
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
    """With ``auto_lr``, whether a round that blew up is undone: the loss at twice the first round's (twice as high
    again after each rollback), or no replica finite. Parameters, buffers and optimizer state go back to the last
    converge whose round was not above 1.1 times the first one, and the gain falls to a third. It takes memory for one
    copy of them, on the device named instead of ``True`` (``"cpu"``). Not with ``averaging.overlap_steps``."""
    replicas: Annotated[ReplicasLike, Setting(None)]
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
    monitor: Annotated[MonitorLike, Setting(None)]
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
