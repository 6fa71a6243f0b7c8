"""From settings to the phases of a round. Each knows what it is given here, and nothing of the ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch.optim import Optimizer

from hdet.converge import Averager, ConvergePhase, OptimizerState, OuterMomentum, SlowAverage
from hdet.explore import ExplorePhase
from hdet.model import GradientWatch, weights_of
from hdet.monitor import Publisher
from hdet.observe import MovementMeter, ObservePhase, PairedProbe, RoundLosses
from hdet.schedules.base import BaseSchedule, ScheduleLike
from hdet.schedules.course import Course
from hdet.settings import Resolved
from hdet.steer import Controllers, Recovery, SteerPhase


class Phases(NamedTuple):
    """What a round goes through, in this order, and what surrounds it."""

    explore: ExplorePhase
    converge: ConvergePhase
    observe: ObservePhase
    steer: SteerPhase
    publisher: Publisher
    gradients: GradientWatch
    schedule: BaseSchedule
    course: Course


def build(optimizer: Optimizer, schedule: ScheduleLike, schedule_every: int, resolved: Resolved) -> Phases:
    """The phases of an ensemble. Learning rates are as they were; other hyperparameters have been read.

    Raises:
        ValueError: for a schedule or a hyperparameter that does not fit the optimizer.
    """
    groups = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups))
    base = BaseSchedule(optimizer, schedule, schedule_every, groups)
    course = Course(resolved.converge_every, resolved.total_steps)
    if resolved.controller.needs_probe and resolved.total_steps is not None:
        course.forecast = base.forecast(resolved.total_steps)
    converge, explore = _converge_phase(optimizer, resolved), _explore_phase(optimizer, resolved)
    recovery = Recovery(resolved.modules, optimizer, resolved.snapshot_device) if resolved.rolls_back else None
    return Phases(
        explore,
        converge,
        _observe_phase(optimizer, resolved, converge, explore, recovery),
        _steer_phase(resolved, course, len(groups), recovery),
        Publisher(resolved.monitors, resolved.replicas),
        GradientWatch(resolved.given["gradients"], optimizer, resolved.modules, resolved.replicas),
        base,
        course,
    )


def _explore_phase(optimizer: Optimizer, resolved: Resolved) -> ExplorePhase:
    given = resolved.given
    return ExplorePhase(optimizer, given["hyperparameters"], given["virtual_replicas"], resolved.replicas.rank)


def _converge_phase(optimizer: Optimizer, resolved: Resolved) -> ConvergePhase:
    given, modules, replicas, probe = resolved.given, resolved.modules, resolved.replicas, resolved.probe
    averaging, outer = given["averaging"], given["outer"]
    owned = {p for m in modules for p in m.parameters()}
    extra = [p for group in optimizer.param_groups for p in group["params"] if p not in owned] if modules else []
    weights = weights_of(modules, extra)
    averager = Averager(
        weights,
        replicas,
        averaging.bucket_bytes,
        wire_dtype=averaging.low_precision,
        piggyback=averaging.overlap_steps == 0,
        has_virtual=given["virtual_replicas"] > 1,
    )
    state = OptimizerState(
        optimizer,
        resolved.optimizer_state,
        replicas,
        averaging.bucket_bytes,
        all_ranks=averager.all_ranks,
        automatic=averaging.optimizer_state == "auto",
        overlapped=averaging.overlap_steps > 0,
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
        needs_each=given["auto_lr"] and not resolved.controller.needs_probe,
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
    if recovery is not None:  # its copy of the state is where the round began
        meter = MovementMeter(
            converge.weights, optimizer, replicas, per_group=given["per_group"], starts=recovery.copies
        )
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
