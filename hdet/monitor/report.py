"""The report of one converge, and how it is assembled. Plain Python values, the same on every rank but for ``writer``,
``converge_ms`` and, where replicas are sharded, ``converge_bytes``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from hdet.observe.slopes import UNKNOWN_SLOPES, Slopes
from hdet.observe.training_loss import finite_mean
from hdet.steer.report import ControllerReport, HyperparameterReport, Judgement

__all__ = ["Converged", "HyperparameterReport", "Judgement", "Moment", "Report", "assemble"]

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One converge. ``[g]`` is a parameter group, ``[r]`` a replica; a loss or slope that is not known is NaN.

    The fields up to ``losses`` describe the round that just ended or, for a converge inside a round, the round so far:
    the learning rates of its last step, and its losses.
    """

    step: int
    """Scheduler steps taken so far."""
    round: int
    """Index of the round, from 0."""
    complete: bool
    """Whether this converge ends its round. ``scheduler.converge()`` inside a round only averages."""
    replicas: int
    """Number of replicas ``N``."""
    groups: tuple[str, ...]
    """Names of the parameter groups."""
    schedule_lr: tuple[float, ...]
    """[g] the base schedule alone."""
    gain: tuple[float, ...]
    """[g] the gain in force."""
    base_lr: tuple[float, ...]
    """[g] schedule x gain, the centre of the spread."""
    replica_lr: tuple[tuple[float, ...], ...]
    """[g][r] schedule x gain x multiplier."""
    losses: tuple[float, ...]
    """[r] mean training loss over the round."""
    mean_loss: float
    """Mean of the finite ``losses``."""
    hypergradient: tuple[float, ...]
    """[g] > 0 where a larger learning rate did better."""
    probe: Slopes
    """The paired probe's slopes."""
    movement: tuple[float, ...]
    """[g] how far the round took the weight matrices, relative to their size; NaN where it was not measured."""
    velocity: tuple[float, ...]
    """[g] the controller's momentum after this round."""
    next_gain: tuple[float, ...]
    """[g] the gain from here on."""
    hyperparameters: tuple[HyperparameterReport, ...] = ()
    """The other hyperparameters."""
    distance: tuple[float, ...]
    """[r] Euclidean distance of the replica's parameters from their mean, before averaging."""
    excluded: tuple[int, ...]
    """Replicas left out of the average because they held a non-finite value."""
    rolled_back: bool
    """Whether the round blew up and was undone."""
    cause: str = ""
    """Why it was undone."""
    judgements: tuple[Judgement, ...] = ()
    """[g] what the controller makes of the round; unknown in a converge inside a round, and where it is not
    :class:`hdet.controller.Posterior` that moves the gain."""
    peak_lr: float = math.nan
    """The highest learning rate of the base schedule, of the first parameter group; NaN where it is not known."""
    nonfinite: tuple[str, ...] = ()
    """What is finite on no replica, and was not undone: ``buffers``, ``optimizer state``."""
    rescaled: bool = False
    """Whether values were so large that their sum could overflow, and was taken in a smaller scale."""
    converge_ms: float
    """Wall-clock time of this converge on this rank, in milliseconds."""
    converge_bytes: int
    """Bytes this rank handed to the collectives in this converge."""
    writer: bool
    """True on exactly one rank: the one that writes files."""

    def with_converged(self, converged: Converged) -> Report:
        """The same report with what the average did, once it is known."""
        return replace(
            self,
            distance=converged.distance or self.distance,
            excluded=converged.excluded,
            nonfinite=converged.nonfinite,
            rescaled=converged.rescaled,
            converge_ms=converged.seconds * 1e3,
            converge_bytes=converged.bytes,
        )


class Moment(NamedTuple):
    """When a converge takes place, and who takes part."""

    step: int
    round: int
    complete: bool
    groups: tuple[str, ...]
    """[g] names of the parameter groups."""
    schedule: tuple[float, ...]
    """[g] the base schedule's learning rates."""
    distances: int
    """Number of distances from the mean: the replicas without the virtual ones."""
    writer: bool


class Converged(NamedTuple):
    """What the average did."""

    distance: tuple[float, ...]
    """[r] as in :class:`Report`; empty if it was not measured."""
    excluded: tuple[int, ...]
    bytes: int
    """Sent by this rank."""
    seconds: float
    """On this rank."""
    nonfinite: tuple[str, ...] = ()
    rescaled: bool = False


def assemble(
    moment: Moment, losses: tuple[float, ...], controllers: ControllerReport, *, rolled_back: bool = False
) -> Report:
    """The report of a converge, but for what the average did; see :meth:`Report.with_converged`.

    Args:
        moment: when it takes place.
        losses: [r] mean training loss of every replica, virtual ones included.
        controllers: what they did.
        rolled_back: whether the round was undone.
    """
    count = len(moment.groups)
    gain = _by_group(controllers.gain, count)
    base = tuple(lr * factor for lr, factor in zip(moment.schedule, gain, strict=True))
    multipliers = _by_group(controllers.multipliers, count)
    return Report(
        step=moment.step,
        round=moment.round,
        complete=moment.complete,
        replicas=len(losses),
        groups=moment.groups,
        schedule_lr=moment.schedule,
        gain=gain,
        base_lr=base,
        replica_lr=tuple(tuple(lr * rho for rho in rhos) for lr, rhos in zip(base, multipliers, strict=True)),
        losses=losses,
        mean_loss=finite_mean(losses),
        hypergradient=_by_group(controllers.hypergradient, count),
        movement=_by_group(controllers.movement, count),
        velocity=_by_group(controllers.velocity, count),
        next_gain=_by_group(controllers.next_gain, count),
        hyperparameters=controllers.hyperparameters,
        distance=(math.nan,) * moment.distances,
        excluded=(),
        probe=controllers.slopes,
        rolled_back=rolled_back,
        cause=controllers.cause,
        judgements=_by_group(controllers.judgements, count),
        peak_lr=controllers.peak_lr,
        converge_ms=0.0,
        converge_bytes=0,
        writer=moment.writer,
    )


def report_of(record: Mapping[str, Any]) -> Report:
    """The report of a line that :class:`hdet.JsonLines` wrote; what is ``None`` there is NaN here.

    Lines of earlier versions have no ``cause``, ``judgements`` and ``peak_lr``: these are unknown then.

    Raises:
        ValueError: for what is no such line; it names the field.
    """
    found = {name: _field(record, name) for name in _READ if name in record or name not in _LATER}
    groups, replicas = len(found["groups"]), found["replicas"]
    for name in ("schedule_lr", "gain", "base_lr", "replica_lr", "hypergradient", "movement", "velocity", "next_gain"):
        if len(found[name]) != groups:
            raise ValueError(f"its {name} has {len(found[name])} values for {groups} parameter groups")
    if not groups or replicas < 1 or len(found["losses"]) != replicas:
        raise ValueError(f"it has {groups} parameter groups, and {len(found['losses'])} losses of {replicas} replicas")
    return Report(**found, writer=True)


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"it has no {name}")
    try:
        return _READ[name](record[name])
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        raise ValueError(f"its {name} cannot be {str(record[name])[:60]}") from error


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(value)
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _several(read: Callable[[Any], Value]) -> Callable[[Any], tuple[Value, ...]]:
    def values(given: Any) -> tuple[Value, ...]:
        if not isinstance(given, (list, tuple)):
            raise TypeError(given)
        return tuple(read(value) for value in given)

    return values


def _judgement(value: Any) -> Judgement:
    numbers = {name: _number(value[name]) for name in Judgement._fields if name != "rests"}
    return Judgement(**numbers, rests=_flag(value["rests"]))


def _hyperparameter(value: Any) -> HyperparameterReport:
    return HyperparameterReport(
        name=_text(value["name"]),
        values=_numbers(value["values"]),
        **{name: _number(value[name]) for name in ("centre", "effect", "error", "next_centre")},
    )


_numbers = _several(_number)
_READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("step", "round", "replicas", "converge_bytes"), _whole),
    **dict.fromkeys(("complete", "rolled_back", "rescaled"), _flag),
    **dict.fromkeys(("groups", "nonfinite"), _several(_text)),
    **dict.fromkeys(("schedule_lr", "gain", "base_lr", "losses", "hypergradient", "movement", "velocity"), _numbers),
    **dict.fromkeys(("next_gain", "distance"), _numbers),
    **dict.fromkeys(("mean_loss", "converge_ms", "peak_lr"), _number),
    "replica_lr": _several(_numbers),
    "excluded": _several(_whole),
    "cause": _text,
    "probe": lambda value: Slopes(*(_number(value.get(name)) for name in UNKNOWN_SLOPES._fields)),
    "judgements": _several(_judgement),
    "hyperparameters": _several(_hyperparameter),
}
"""How each field of a line is read."""
_LATER = ("cause", "judgements", "peak_lr")
"""Fields that a line may lack."""


def _by_group(values: Sequence[Value], groups: int) -> tuple[Value, ...]:
    """[g] values by learning rate: one for each parameter group, or one for all."""
    return tuple(values) if len(values) == groups else tuple(values) * groups
