"""From settings to the phases of a round. Each knows what it is given here, and nothing of the ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch.optim import Optimizer

from hdet.converge import Averager, ConvergePhase, OptimizerState, OuterMomentum, SlowAverage
from hdet.explore import ExplorePhase, ParamGroupField
from hdet.model import GradientWatch, JoinGuard, LoadWatch, Start, Weights, weights_of
from hdet.monitor import Publisher
from hdet.observe import MovementMeter, ObservePhase, PairedProbe, RoundLosses
from hdet.schedules.base import BaseSchedule, ScheduleLike
from hdet.schedules.course import Course
from hdet.settings import Resolved
from hdet.steer import Controllers, Published, Recovery, SteerPhase


class Phases(NamedTuple):
    """What a round goes through, in this order, and what surrounds it."""

    explore: ExplorePhase
    converge: ConvergePhase
    observe: ObservePhase
    steer: SteerPhase
    publisher: Publisher
    gradients: GradientWatch
    join: JoinGuard
    start: Start
    schedule: BaseSchedule
    course: Course


def build(given: Optimizer, schedule: ScheduleLike, schedule_every: int, resolved: Resolved) -> Phases:
    """The phases of an ensemble. Learning rates are as they were; other hyperparameters have been read.

    Args:
        given: the optimizer as it was passed, on which a function becomes a schedule; all else works on the one inside.

    Raises:
        ValueError: for a schedule or a hyperparameter that does not fit the optimizer.
    """
    optimizer = resolved.optimizer
    groups = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups))
    base = BaseSchedule(given, schedule, schedule_every, groups)
    course = Course(resolved.converge_every, resolved.total_steps)
    looks_ahead = resolved.controller.needs_length or resolved.probe is not None
    if looks_ahead and resolved.total_steps is not None:
        course.forecast = base.forecast(resolved.total_steps)
    converge = _converge_phase(optimizer, resolved)
    explore = _explore_phase(optimizer, resolved, converge.weights, base)
    start = Start(
        optimizer,
        converge.weights,
        resolved.modules,
        resolved.replicas,
        [place for h in explore.hyperparameters if isinstance(h, ParamGroupField) for place in h.places],
    )
    recovery = Recovery(resolved.modules, optimizer, resolved.snapshot_device) if resolved.rolls_back else None
    _watch_loads(resolved, converge, explore, recovery)
    return Phases(
        explore,
        converge,
        _observe_phase(optimizer, resolved, converge, explore, recovery),
        _steer_phase(resolved, course, len(groups), recovery),
        Publisher(resolved.monitors, resolved.replicas),
        GradientWatch(resolved.given["gradients"], optimizer, resolved.modules, resolved.replicas, _own_ids(resolved)),
        JoinGuard(resolved.modules, resolved.replicas),
        start,
        base,
        course,
    )


def _own_ids(resolved: Resolved) -> frozenset[int]:
    """Of parameters that are each rank's own."""
    return resolved.exclusion.ids() | {id(p) for p in resolved.outside}


def _explore_phase(optimizer: Optimizer, resolved: Resolved, weights: Weights, base: BaseSchedule) -> ExplorePhase:
    given = resolved.given
    return ExplorePhase(
        optimizer,
        given["hyperparameters"],
        given["virtual_replicas"],
        resolved.replicas.rank,
        may_park=type(weights) is Weights,  # a framework that keeps the weights may step groups one by one
        overwritten_by=base.overwrites,
    )


def _watch_loads(resolved: Resolved, converge: ConvergePhase, explore: ExplorePhase, recovery: Recovery | None) -> None:
    """Let those that keep copies of the weights know when these are replaced."""
    keeps = converge.follows_loads or explore.virtual is not None or recovery is not None
    if keeps and type(converge.weights) is Weights:
        watch = LoadWatch(resolved.modules, resolved.optimizer, converge.trained)
        converge.watch(watch)
        if explore.virtual is not None:
            explore.virtual.has_loaded = watch.look
        if recovery is not None:
            watch.when_loaded = recovery.renew


def _converge_phase(optimizer: Optimizer, resolved: Resolved) -> ConvergePhase:
    given, modules, replicas, probe = resolved.given, resolved.modules, resolved.replicas, resolved.probe
    averaging, outer = given["averaging"], given["outer"]
    weights = weights_of(modules, resolved.exclusion)
    averager = Averager(
        weights,
        replicas,
        averaging.bucket_bytes,
        wire_dtype=averaging.low_precision,
        piggyback=averaging.overlap_steps == 0,
        has_virtual=given["virtual_replicas"] > 1,
        watches=resolved.rolls_back,
    )
    state = OptimizerState(
        optimizer,
        resolved.optimizer_state,
        replicas,
        averaging.bucket_bytes,
        all_ranks=averager.all_ranks,
        automatic=averaging.optimizer_state == "auto",
        overlapped=averaging.overlap_steps > 0,
        explored=[h.key for h in given["hyperparameters"] if isinstance(h, ParamGroupField)],
        watches=resolved.rolls_back or given["virtual_replicas"] > 1,
        own=_own_ids(resolved),
    )
    return ConvergePhase(
        averager,
        state,
        weights,
        replicas,
        None if probe is None else SlowAverage(probe.power, probe.dtype, probe.torch_device),
        None if outer.is_plain else OuterMomentum(outer.momentum, outer.lr),
    )


def _observe_phase(
    optimizer: Optimizer,
    resolved: Resolved,
    converge: ConvergePhase,
    explore: ExplorePhase,
    recovery: Recovery | None,
) -> ObservePhase:
    given, replicas = resolved.given, resolved.replicas
    losses = RoundLosses(
        given["virtual_replicas"],
        resolved.size,
        needs_each=given["auto_lr"] and isinstance(resolved.controller, Published),
        warns=given["auto_lr"] and replicas.writer,
    )
    probe = None
    if resolved.probe is not None and converge.slow is not None:
        probe = PairedProbe(
            resolved.probe,
            converge.slow,
            resolved.modules,
            converge.weights,
            optimizer,
            replicas,
            explore.virtual,
            resolved.converge_every,
        )
    meter = None
    if recovery is not None or (given["auto_lr"] and resolved.controller.needs_movement):
        kept = None if recovery is None else recovery.copies  # where most rounds began
        meter = MovementMeter(converge.weights, optimizer, replicas, per_group=given["per_group"], kept=kept)
    return ObservePhase(losses, probe, meter)


def _steer_phase(resolved: Resolved, course: Course, groups: int, recovery: Recovery | None) -> SteerPhase:
    given = resolved.given
    controllers = Controllers(
        resolved.controller,
        given["exploration"].controller,
        auto_lr=given["auto_lr"],
        rates=groups if given["per_group"] else 1,
        names=[h.name for h in given["hyperparameters"]],
        replicas=resolved.size,
        spread=given["spread"],
        design=given["exploration"].design,
        seed=given["seed"],
    )
    return SteerPhase(
        controllers,
        resolved.controller,
        course,
        given["hyperparameters"],
        auto_lr=given["auto_lr"],
        recovery=recovery,
    )
