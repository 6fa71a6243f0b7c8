"""The state machine: rounds of fan-out, observe, converge and control, around any learning-rate schedule."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from hdet.agreement import gather_agreed
from hdet.averager import Averaged, Averager, Inspection, Pending, Point, SlowAverage
from hdet.config import EnsembleConfig
from hdet.controller import (
    Controller,
    ControllerState,
    Observation,
    ProbeLosses,
    Published,
    Slopes,
    TwoSlope,
    slopes_of,
)
from hdet.forecast import Forecast, forecast
from hdet.found_schedule import FoundSchedule, Recorder
from hdet.monitor import Monitor, MonitorLike, as_monitors
from hdet.probe import Batches, LossFunction, Probe, evaluate, gathered
from hdet.replicas import Replicas
from hdet.report import Report
from hdet.signal import TrainingLoss, check_loss, mean_losses
from hdet.snapshot import Snapshot
from hdet.spread import assignment
from hdet.weights import weights_of

logger = logging.getLogger("hdet")


_MIB = 2**20
_STATE_VERSION = 2
_MAX_ROLLBACKS = 8
_BLOWN_UP = 2.0
"""A round blew up if its mean loss is this many times the first round's."""
_CUT = 3.0
"""What a rollback divides the gain by."""
_ENSEMBLES: WeakKeyDictionary[Optimizer, ref[Ensemble]] = WeakKeyDictionary()
"""The ensemble that fans out an optimizer's learning rates: the last one built on it."""


class _Gathered(NamedTuple):
    """What one replica tells the others when they agree."""

    loss_sum: float
    loss_count: int
    monitored: bool
    can_probe: bool
    moved: bool
    seen: Inspection


@dataclass
class _Flight:
    """An average under way, and what is to be said when it has landed."""

    pending: Pending
    report: Report
    watched: bool
    seconds: float


class Ensemble:
    r"""N replicas of one model that train under N learning rates around a shared base schedule.

    With the schedule at ``eta_g(t)`` for parameter group ``g``, replica ``r`` takes step ``t`` of round ``k`` under::

        lr_{g,r}(t) = eta_g(t) * gain_g * rho_{pi_{g,k}(r)}

    where ``rho`` is the symmetric spread (:mod:`hdet.spread`), ``pi_{g,k}`` a permutation drawn for each group and
    round, and ``gain_g`` what the controller (:mod:`hdet.controller`) has made of the replicas' losses; it stays 1
    unless ``auto_lr=True``. Every ``converge_every`` calls of :meth:`step` the replicas' parameters and buffers are
    averaged in place; all ranks are then bitwise equal, until the next step fans them out again.

    Gradients are not touched: under ``DistributedDataParallel`` they are shared, and the replicas lie on one line
    through the round's start, so that the average is the run at the base learning rate. Without it the same class is
    Local SGD.

    Args:
        optimizer: whose ``param_groups[g]["lr"]`` are fanned out; float and tensor learning rates alike.
        schedule: the base schedule: a torch ``LRScheduler`` built on ``optimizer``, a function ``step -> factor`` such
            as those of :mod:`hdet.schedules` (wrapped in ``LambdaLR``), or ``None`` for the optimizer's constant rates.
            :meth:`step` steps it; do not step it yourself. ``ReduceLROnPlateau`` is stepped once per round, with the
            replicas' mean loss.
        schedule_every: calls of :meth:`step` to one step of ``schedule``, for schedules that count epochs.
        model: the module or modules whose parameters and buffers are averaged. Required when ``spread > 0``.
        spread: ``alpha``, in [0, 1). The paper uses 1/9.
        converge_every: ``T``, the round's length in steps. Required when ``spread > 0``.
        auto_lr: whether the controller moves the gain. Needs the loss in :meth:`step`.
        probe: ``loss_fn(model, batch)``, or a :class:`hdet.Probe`: the paired probe, by which learning rates can be
            told apart in short rounds.
        controller: default ``hdet.controller.TwoSlope()`` with a probe, ``hdet.controller.Published()`` without.
        per_group: whether each parameter group has a gain, and permutations, of its own; default one for all.
        total_steps: calls of :meth:`step` in the whole run. ``TwoSlope`` must know, and what is still to come of the
            schedule: a copy of it is run ahead in the constructor.
        rollback: with ``auto_lr``, whether a round that blew up is undone: the loss at twice the first round's, or no
            replica finite. Parameters, buffers and optimizer state go back to the last converge, and the gain falls to
            a third. It takes memory for one copy of them, at the device named instead of ``True`` (``"cpu"``).
        replicas: ``ProcessGroup`` or 1-D ``DeviceMesh`` of the replicas; default: the world. Without an initialised
            process group there is one replica, with multiplier 1.
        seed: of the permutations. Must be the same on every rank, like every other setting; the first call of
            :meth:`step` checks that.
        bucket_mib: size of a communication bucket in MiB.
        overlap_steps: ``tau``, in [0, T). With ``tau > 0`` the all-reduce at a round's end runs behind the next ``tau``
            steps: a snapshot is sent at step ``kT``, and ``theta += mean(snapshot) - snapshot`` applied at ``kT+tau``.
            That takes out all divergence up to ``kT`` and keeps what each replica has done since, so replicas are equal
            only after :meth:`converge`. It takes memory for two copies of the model in fp32 meanwhile.
        monitor: :class:`hdet.TensorBoard`, :class:`hdet.JsonLines`, a function of a :class:`hdet.Report`, or several.

    Raises:
        TypeError, ValueError: for a bad argument, before anything was changed. No argument causes communication: ranks
            that disagree are found at the first :meth:`step`.

    Examples:
        >>> import torch, hdet
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> cosine = hdet.schedules.cosine(total_steps=1000)
        >>> ensemble = hdet.Ensemble(optimizer, cosine, model=model, spread=0.1, converge_every=50, auto_lr=True)
        >>> loss = model(torch.ones(1, 4)).square().mean()
        >>> loss.backward(); optimizer.step(); ensemble.step(loss)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRScheduler | Callable[[int], float] | None = None,
        *,
        schedule_every: int = 1,
        model: nn.Module | Iterable[nn.Module] | None = None,
        spread: float = 0.0,
        converge_every: int | None = None,
        auto_lr: bool = False,
        probe: LossFunction | Probe | None = None,
        controller: Controller | None = None,
        per_group: bool = False,
        total_steps: int | None = None,
        rollback: bool | str | torch.device = True,
        replicas: ProcessGroup | DeviceMesh | None = None,
        seed: int = 0,
        bucket_mib: float = 32.0,
        overlap_steps: int = 0,
        monitor: MonitorLike = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        if schedule_every < 1:
            raise ValueError(f"Invalid {schedule_every=}. Must be >= 1 step.")
        self.config, models, self._probe, self._monitors, self.replicas = check_arguments(
            model=model,
            spread=spread,
            converge_every=converge_every,
            auto_lr=auto_lr,
            probe=probe,
            controller=controller,
            per_group=per_group,
            total_steps=total_steps,
            rollback=rollback,
            replicas=replicas,
            seed=seed,
            bucket_mib=bucket_mib,
            overlap_steps=overlap_steps,
            monitor=monitor,
        )
        if isinstance(schedule, (LRScheduler, ReduceLROnPlateau)):
            if schedule.optimizer is not optimizer:
                raise ValueError("The schedule was built on another optimizer than the one passed to hdet.")
        elif schedule is not None:
            schedule = LambdaLR(optimizer, schedule)
        self.optimizer, self.schedule, self._schedule_every = optimizer, schedule, schedule_every

        self._forecast: Forecast | None = None
        self._until = 1.0
        if isinstance(self.config.controller, TwoSlope) and self.config.total_steps is not None:
            self.look_ahead(forecast(schedule, optimizer, -(-self.config.total_steps // schedule_every)))
        owned = {p for m in models for p in m.parameters()}
        extra = [p for group in optimizer.param_groups for p in group["params"] if p not in owned] if models else []
        self._weights = weights_of(models, extra)
        self._averager = Averager(self._weights, self.replicas, int(self.config.bucket_mib * _MIB))
        self._group_names = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups))
        self._models = models
        self._states = [ControllerState()] * (len(self._group_names) if per_group else 1)
        self._slow: SlowAverage | None = None
        self._batches: Batches | None = None
        if self._probe is not None and auto_lr:
            self._batches = Batches(self._probe, self.config.converge_every)
            self._slow = SlowAverage(self._probe.decay, self._probe.dtype, self._probe.place)
        self._snapshot: Snapshot | None = None
        if self.config.rollback:
            device = None if isinstance(rollback, bool) else torch.device(rollback)
            self._snapshot = Snapshot(models, optimizer, device)
        self._has_snapshot = False
        self._recorder = Recorder(self._group_names)
        self._first_loss = math.nan
        self._rollbacks = 0
        self._signal = TrainingLoss()
        self._totals: list[tuple[float, int]] = [(0.0, 0)] * self.replicas.size
        self._factors: list[float] = []
        self._is_fresh = True
        self._steps = 0
        self._converged_at = 0
        self._written = self._version()
        self._started = False
        self._told_no_loss = False
        self._is_current = True
        self._flight: _Flight | None = None
        self.last_report: Report | None = None
        """The report of the latest converge."""
        self._base: list[float | Tensor] = [group["lr"] for group in optimizer.param_groups]
        self._attach()
        self._draw()
        self.fan_out()

    # ------------------------------------------------------------------------------------------------ what it shows

    @property
    def steps(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._steps

    @property
    def round(self) -> int:
        """Index of the round in progress."""
        return self._steps // self.config.converge_every

    @property
    def gains(self) -> tuple[float, ...]:
        """The gain of every parameter group."""
        return tuple(self._state_of(g).gain for g in range(len(self._group_names)))

    def multipliers(self, group: int = 0) -> tuple[float, ...]:
        """Every replica's multiplier ``rho_pi(r)`` for one parameter group, in the round in progress."""
        return self._assignment(group, self.round)

    def _state_of(self, group: int) -> ControllerState:
        return self._states[group if self.config.per_group else 0]

    def found_schedule(self) -> FoundSchedule:
        """The base learning rates of the run so far, schedule x gain: to be saved, and replayed without replicas.

        Recorded at the two ends of every round; between them the replay is linear.
        """
        return self._recorder.schedule()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by group."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_base_lr(self) -> list[float | Tensor]:
        """The schedule's learning rates before gain and multiplier, by group: the same on every rank."""
        return [_copy(lr) for lr in self._base]

    # ----------------------------------------------------------------------------------------------------- the loop

    def step(self, loss: float | Tensor | None = None, *, batch: Any = None) -> None:
        """Call after every ``optimizer.step()``.

        Collective at the end of each round and on the very first call (which checks that the replicas agree); between
        them it neither communicates nor waits for the device.

        Args:
            loss: this replica's training loss of the step: a float or a scalar tensor, detached here. Without it the
                replicas still fan out and converge, and the controller rests. A non-finite loss is ignored.
            batch: the batch of the step, for a probe without ``batches`` of its own; see :class:`hdet.Probe`.

        Raises:
            TypeError, ValueError: for an int, an integer tensor, or a tensor of more than one element.
            ReplicaMismatchError: on every replica, if they disagree about step, settings, learning rates or model.
            DivergedError: on every replica, if none has finite parameters.
        """
        self.end_step(loss, batch)
        self._write_lr(self._base)  # chainable schedulers compute the next rate from the one they find
        self._step_schedule()
        self.fan_out()

    def converge(self) -> Report | None:
        """Average the replicas now: before evaluating, saving, or after the last step.

        Collective. It does not end the round: multipliers, loss sums and the schedule of rounds stay as they are, so
        evaluating more often changes nothing else. At a round's end, and twice in a row, there is nothing to average,
        unless a parameter was written since: by a last ``optimizer.step()`` that no :meth:`step` followed.

        Returns:
            The report, or ``None`` if the replicas had converged already.
        """
        gathered = self._agree()
        if self._converged_at == self._steps and not any(now.moved for now in gathered):
            return None
        self._land()
        return self._converge(gathered, complete=False)

    def end_step(self, loss: float | Tensor | None, batch: Any = None) -> None:
        """First part of :meth:`step`, for adapters around a scheduler of their own: observe, and converge if the round
        is over."""
        checked = None if loss is None else check_loss(loss)
        if not self._is_current or len(self.optimizer.param_groups) != len(self._base):
            self._refuse()
        if not self._started:
            self._start()
        if checked is not None:
            self._signal.add(checked)
        elif self.config.auto_lr and not self._told_no_loss:
            self._told_no_loss = True
            if self.replicas.writer:
                logger.warning("scheduler.step() was called without a loss: the gain does not move until it gets one.")
        self._steps += 1
        if self._flight and self._steps == self._flight.report.step + self.config.overlap_steps:
            self._land()
        if self._steps % self.config.converge_every == 0:
            self._record(self._steps - 1)
            self._converge(self._agree(), complete=True)
            if self._batches is not None and self._wants_probe():
                self._batches.offer(batch)
            self._draw()

    def fan_out(self) -> None:
        """Last part of :meth:`step`: read the schedule's learning rates and write this replica's."""
        base, factors = self._base, self._factors
        for i, group in enumerate(self.optimizer.param_groups):
            lr = group["lr"]
            if type(lr) is not float and isinstance(lr, Tensor):
                base[i] = lr.clone()
                lr.mul_(factors[i])  # in place: compiled optimizers and CUDA graphs hold on to the tensor
            else:
                base[i] = lr
                group["lr"] = lr * factors[i]
        if self._is_fresh:
            self._is_fresh = False
            if self._steps % self.config.converge_every == 0:
                self._record(self._steps)

    # ---------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, equal on every rank if the replicas have just converged. Makes no collective
        call; loads with ``torch.load(weights_only=True)``.

        The batches that a probe has kept are each replica's own, and not saved: it pauses after a resume until there
        are others."""
        state = self.own_state()
        state["schedule"] = None if self.schedule is None else self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Settings stay those of the constructor; gains, velocities and step are loaded.

        Another number of replicas, spread or round length may resume: multipliers are computed anew, and the loss sums
        of an unfinished round are kept only if the number of replicas is the same.
        """
        self.check_state(state_dict)
        if self.schedule is not None and state_dict["schedule"] is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
        self.load_own_state(state_dict)

    def look_ahead(self, ahead: Forecast) -> None:
        """For adapters around a scheduler of their own: tell what is to come of it."""
        self._forecast = ahead
        if isinstance(self.config.controller, TwoSlope):
            self._until = ahead.high_until(self.config.controller.rest_below)

    def own_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the schedule's."""
        if self._converged_at != self._steps and self.replicas.size > 1 and self.config.spread > 0:
            warnings.warn(
                f"state_dict() was called {self._steps - self._converged_at} steps after the replicas last converged, "
                "so that each rank saves a different model. Call scheduler.converge() before saving.",
                stacklevel=3,
            )
        return {
            "version": _STATE_VERSION,
            "steps": self._steps,
            "replicas": self.replicas.size,
            "base_lr": self.get_base_lr(),
            "controller": [list(state) for state in self._states],
            "first_loss": self._first_loss,
            "rollbacks": self._rollbacks,
            "slow_average": [list(part) for part in self._slow.state()] if self._slow else [],
            "found_schedule": [[step, list(lrs)] for step, lrs in self._recorder.knots],
            "round_losses": [list(total) for total in self._totals],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` cannot be loaded, before anything is changed."""
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"Cannot load an hdet state of version {state.get('version')!r}; this hdet reads version "
                f"{_STATE_VERSION}."
            )
        if len(state["controller"]) != len(self._states):
            raise ValueError(
                f"The saved state has {len(state['controller'])} gains, this run {len(self._states)}: another number "
                "of parameter groups, or another per_group=."
            )

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` saved."""
        self._states = [ControllerState(*values) for values in state["controller"]]
        self._first_loss, self._rollbacks = state["first_loss"], state["rollbacks"]
        self._recorder.knots = [(step, tuple(lrs)) for step, lrs in state["found_schedule"]]
        if self._slow is not None:
            self._slow.load(state["slow_average"])
        self.resume_at(state["steps"], state["base_lr"])
        if state["replicas"] == self.replicas.size:
            self._totals = [(total, count) for total, count in state["round_losses"]]

    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor]) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``."""
        self._flight = None
        if self._batches is not None:
            self._batches.forget()
        self._steps = self._converged_at = steps
        self._written = self._version()
        self._signal.reset()
        self._totals = [(0.0, 0)] * self.replicas.size
        self._draw()
        self._write_lr(base_lr)
        self.fan_out()

    # --------------------------------------------------------------------------------------------------- inner parts

    def _step_schedule(self) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            report = self.last_report
            if self._converged_at == self._steps and report is not None and math.isfinite(report.mean_loss):
                self.schedule.step(report.mean_loss)
        elif self.schedule is not None and self._steps % self._schedule_every == 0:
            self.schedule.step()

    def _draw(self) -> None:
        """This replica's factors on the schedule, which change once per round."""
        self._is_fresh = True  # the next fan_out() is the first under these
        self._factors = [gain * self.multipliers(g)[self.replicas.rank] for g, gain in enumerate(self.gains)]

    def _record(self, step: int) -> None:
        """Remember the base learning rates of the update after ``step`` others."""
        self._recorder.add(step, [float(lr) * gain for lr, gain in zip(self._base, self.gains, strict=True)])

    def _write_lr(self, rates: Sequence[float | Tensor]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _assignment(self, group: int, round: int) -> tuple[float, ...]:
        name = f"lr/{group if self.config.per_group else 0}"
        return assignment(
            self.replicas.size, self.config.spread, seed=self.config.seed, round=round, hyperparameter=name
        )

    def _save_base_lr(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """An optimizer's saved state holds the base learning rates: rank 0's own would load as everybody's."""
        for group, base in zip(state_dict["param_groups"], self._base, strict=True):
            group["lr"] = _copy(base)

    def _refuse(self) -> NoReturn:
        """Say why this ensemble cannot step any more."""
        if not self._is_current:
            raise RuntimeError("Another hdet scheduler was built on this optimizer since; step that one.")
        raise ValueError(
            f"The optimizer has {len(self.optimizer.param_groups)} parameter groups and had {len(self._base)} when "
            "hdet was built. Build the scheduler after the last add_param_group()."
        )

    def _start(self) -> None:
        self._agree()
        self._started = True
        for monitor in self._monitors:
            monitor.start(self._settings(), writer=self.replicas.writer, step=self._steps)

    def _settings(self) -> dict[str, Any]:
        """The run's settings as plain values, for error messages and for TensorBoard's hparams."""
        settings = asdict(self.config)
        for name, value in settings.pop("controller").items():
            settings[f"controller.{name}"] = str(value) if isinstance(value, tuple) else value
        settings["replicas"] = self.replicas.size
        settings["schedule"] = type(self.schedule).__name__
        for name, lr in zip(self._group_names, self._base, strict=True):
            settings[f"schedule_lr.{name}"] = float(lr)
        return settings

    def _attach(self) -> None:
        """Keep the optimizer's saved state free of this replica's multipliers, and its loaded state under them."""
        attached = _ENSEMBLES.get(self.optimizer)
        if attached is not None and (previous := attached()) is not None:
            previous._is_current = False
            for hook in previous._hooks:
                hook.remove()
        _ENSEMBLES[self.optimizer] = ref(self)
        self._hooks: tuple[RemovableHandle, ...] = (
            self.optimizer.register_state_dict_post_hook(self._save_base_lr),
            self.optimizer.register_load_state_dict_post_hook(lambda _: self.fan_out()),
        )

    def _version(self) -> int:
        """A number that grows whenever a trained tensor is written in place."""
        return sum(tensor._version for tensor, trained in self._weights.tensors() if trained)

    def _agree(self) -> list[_Gathered]:
        """Make sure that all replicas are at the same point, and gather what each has to tell."""
        facts = self._settings() | {"controller state": [tuple(state) for state in self._states]}
        layout, *seen = self._averager.inspect()
        payload = (
            *self._signal.total(),
            bool(self._monitors),
            self._batches is not None and self._batches.ready,
            self._version() != self._written,
            *seen,
        )
        rows = gather_agreed(self.replicas, self._steps, layout, facts, payload)
        return [
            _Gathered(
                total,
                int(count),
                bool(monitored),
                bool(can_probe),
                bool(moved),
                Inspection(layout, bool(finite), int(constants)),
            )
            for total, count, monitored, can_probe, moved, finite, constants in rows
        ]

    def _converge(self, gathered: list[_Gathered], complete: bool) -> Report:
        """Average, or send what will be averaged, and let the controller see the round if it is complete."""
        started = time.perf_counter()
        self._signal.reset()
        self._totals = [
            (total + now.loss_sum, count + now.loss_count)
            for (total, count), now in zip(self._totals, gathered, strict=True)
        ]
        # A monitor passed on one rank only must not leave the others out of the gather.
        watched = any(now.monitored for now in gathered)
        seen = [now.seen for now in gathered]
        with torch.profiler.record_function("hdet::converge"):
            if complete and self._has_blown_up(gathered):
                return self._roll_back(watched, started)
            if complete and self.config.overlap_steps:
                pending = self._averager.start(seen)
                self.last_report = report = self._control(complete)
                self._flight = _Flight(pending, report, watched, time.perf_counter() - started)
                return report
            slow = self._slow if complete and self._wants_probe() else None
            can_probe = slow is not None and all(now.can_probe for now in gathered)
            averaged = self._averager.average(seen, slow, keep_points=can_probe)
        self._converged_at = self._steps
        losses = self._evaluate(averaged.points) if averaged.points else None
        report = self._control(complete, losses)
        if complete and self._snapshot is not None and self._may_move():
            self._snapshot.take()
            self._has_snapshot = True
        return self._tell(report, averaged, watched, time.perf_counter() - started)

    @property
    def _progress(self) -> float:
        return self._steps / self.config.total_steps if self.config.total_steps else math.nan

    def _wants_probe(self) -> bool:
        return (
            self._slow is not None
            and self.replicas.size > 1
            and self.config.controller.wants_probe(self._progress, self._until)
        )

    def _may_move(self) -> bool:
        """Whether the controller may still move the gain: while it may, it can also take it back."""
        return not isinstance(self.config.controller, TwoSlope) or self._wants_probe()

    def _evaluate(self, points: Sequence[Point]) -> ProbeLosses:
        """Every replica's probe. Collective: one that fails tells the others before it raises."""
        assert self._probe is not None
        assert self._slow is not None
        assert self._batches is not None
        failure: Exception | None = None
        losses = (math.nan,) * 4
        try:
            batch = self._batches.take()
            losses = evaluate(self._models, self._probe.loss_fn, batch, points, self._slow, self._weights)
        except Exception as error:
            failure = error
        rows = self.replicas.all_gather([float(failure is not None), *losses])
        if failure is not None:
            raise failure
        if failed := [rank for rank, row in enumerate(rows) if row[0]]:
            raise RuntimeError(f"The probe's loss function failed on replica {', '.join(map(str, failed))}: see there.")
        return gathered([row[1:] for row in rows])

    def _has_blown_up(self, gathered: Sequence[_Gathered]) -> bool:
        """Whether the round that just ended is to be undone: its losses lie far above the first round's, or no replica
        is finite."""
        if self._snapshot is None or not self._has_snapshot or self._rollbacks >= _MAX_ROLLBACKS:
            return False
        if not any(now.seen.finite for now in gathered):
            return True
        losses = mean_losses(self._totals)
        if not self._may_move() or not any(count for _, count in self._totals):
            return False
        finite = [loss for loss in losses if math.isfinite(loss)]
        return not finite or math.fsum(finite) / len(finite) > _BLOWN_UP * abs(self._first_loss)

    def _roll_back(self, watched: bool, started: float) -> Report:
        """Undo the round: the model and the optimizer as they last converged, under a smaller gain."""
        assert self._snapshot is not None
        self._snapshot.restore()
        self._rollbacks += 1
        self._converged_at = self._steps
        report = self._control(False)
        self._totals = [(0.0, 0)] * self.replicas.size
        self._states = [ControllerState(gain=state.gain / _CUT) for state in self._states]
        if self._slow is not None:
            self._slow.restart()
        if self.replicas.writer:
            logger.warning(
                f"Step {self._steps}: the run blew up (mean loss {report.mean_loss:.4g}). Back to the last converged "
                f"state, with learning rates divided by {_CUT:.3g} (rollback {self._rollbacks} of {_MAX_ROLLBACKS})."
            )
        averaged = Averaged(math.nan, (), 0)
        report = replace(report, next_gain=self.gains, rolled_back=True)
        return self._tell(report, averaged, watched, time.perf_counter() - started)

    def _land(self) -> None:
        """Apply the average that has been under way, if one is."""
        if self._flight:
            started = time.perf_counter()
            with torch.profiler.record_function("hdet::converge"):
                averaged = self._flight.pending.finish()
            seconds = self._flight.seconds + time.perf_counter() - started
            self._tell(self._flight.report, averaged, self._flight.watched, seconds)
            self._flight = None

    def _tell(self, report: Report, averaged: Averaged, watched: bool, seconds: float) -> Report:
        distances = self.replicas.all_gather([averaged.squared_distance]) if watched else []
        self._written = self._version()
        self.last_report = report = replace(
            report,
            distance=tuple(math.sqrt(row[0]) for row in distances) or report.distance,
            excluded=averaged.excluded,
            converge_ms=seconds * 1e3,
            converge_bytes=averaged.bytes,
        )
        for monitor in self._monitors:
            monitor.report(report)
        return report

    def _control(self, complete: bool, losses_of_probe: ProbeLosses | None = None) -> Report:
        """The report of a converge but for the average itself; if it ends the round, the controller moves."""
        round = (self._steps - 1) // self.config.converge_every
        losses = mean_losses(self._totals)
        finite = [loss for loss in losses if math.isfinite(loss)]
        schedule = [float(lr) for lr in self._base]
        gains = self.gains
        multipliers = [self._assignment(g, round) for g in range(len(schedule))]
        slopes = [math.nan] * len(self._states)
        if complete:
            peak, final = (self._forecast.peak, self._forecast.final) if self._forecast else (0.0, 0.0)
            height = min(1.0, schedule[0] / peak) if peak else 1.0
            lag = self._probe.lag if self._probe else 1.0
            for g, state in enumerate(self._states):
                seen = Observation(
                    losses,
                    multipliers[g],
                    schedule[g],
                    self._progress,
                    height,
                    self._until,
                    final,
                    losses_of_probe,
                    lag,
                )
                moved, slope = self.config.controller.update(state, seen)
                slopes[g] = math.nan if slope is None else slope
                if self.config.auto_lr:
                    self._states[g] = moved
            self._totals = [(0.0, 0)] * self.replicas.size
            if math.isnan(self._first_loss) and finite:
                self._first_loss = math.fsum(finite) / len(finite)
        if not self.config.per_group:
            slopes = slopes * len(schedule)
        probed = None
        if losses_of_probe is not None and self._probe is not None:
            probed = slopes_of(losses_of_probe, multipliers[0], self._probe.lag)
        base = tuple(lr * gain for lr, gain in zip(schedule, gains, strict=True))
        return Report(
            step=self._steps,
            round=round,
            complete=complete,
            replicas=self.replicas.size,
            groups=self._group_names,
            schedule_lr=tuple(schedule),
            gain=gains,
            base_lr=base,
            replica_lr=tuple(tuple(lr * rho for rho in rhos) for lr, rhos in zip(base, multipliers, strict=True)),
            losses=losses,
            mean_loss=math.fsum(finite) / len(finite) if finite else math.nan,
            hypergradient=tuple(slopes),
            velocity=tuple(self._state_of(g).velocity for g in range(len(schedule))),
            next_gain=self.gains,
            distance=(math.nan,) * self.replicas.size,
            excluded=(),
            probe=Slopes(*(math.nan,) * 3) if probed is None else probed,
            rolled_back=False,
            converge_ms=0.0,
            converge_bytes=0,
            writer=self.replicas.writer,
        )


def check_arguments(
    *,
    model: nn.Module | Iterable[nn.Module] | None,
    spread: float,
    converge_every: int | None,
    auto_lr: bool,
    probe: LossFunction | Probe | None,
    controller: Controller | None,
    per_group: bool,
    total_steps: int | None,
    rollback: bool | str | torch.device,
    replicas: ProcessGroup | DeviceMesh | None,
    seed: int,
    bucket_mib: float,
    overlap_steps: int,
    monitor: MonitorLike,
) -> tuple[EnsembleConfig, tuple[nn.Module, ...], Probe | None, tuple[Monitor, ...], Replicas]:
    """What an ensemble is made of, or the error that names the bad argument; changes nothing and sends nothing."""
    if converge_every is None and spread > 0:
        raise ValueError("Pass converge_every, the round's length in steps (total steps / 100 is a good start).")
    if probe is not None and not isinstance(probe, Probe):
        probe = Probe(loss_fn=probe)
    if controller is None:
        controller = Published() if probe is None else TwoSlope()
    config = EnsembleConfig(
        spread=spread,
        converge_every=1 if converge_every is None else converge_every,
        auto_lr=auto_lr,
        controller=controller,
        per_group=per_group,
        total_steps=total_steps,
        probe=probe is not None,
        rollback=auto_lr and rollback is not False and not overlap_steps,
        seed=seed,
        bucket_mib=bucket_mib,
        overlap_steps=overlap_steps,
    )
    modules = () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model= takes an nn.Module or several, got {type(module).__name__}.")
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise TypeError(
                "model= has DTensor parameters (FSDP2 or tensor parallelism), which hdet cannot average yet."
            )
    if spread > 0 and not modules:
        raise ValueError("spread > 0 needs model=: its parameters and buffers are averaged every converge_every steps.")
    return config, modules, probe, as_monitors(monitor), Replicas(replicas)


def _copy(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr
