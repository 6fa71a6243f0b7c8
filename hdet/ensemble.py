"""The state machine: rounds of fan-out, observe, converge and control, around any learning-rate schedule."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from hdet.arguments import check_arguments
from hdet.converge.averager import Averager, Inspection
from hdet.converge.optimizer_policy import policy_of
from hdet.converge.optimizer_state import NOT_INSPECTED, OptimizerState, StateInspection
from hdet.converge.outer import OuterMomentum
from hdet.converge.pending import Averaged, Pending
from hdet.converge.slow_average import SlowAverage
from hdet.explore.design import Design, Effect
from hdet.explore.fan_out import FanOut, copied
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.prior import Prior
from hdet.explore.virtual import VirtualReplicas
from hdet.model.gradients import fingerprint_gradients, set_gradients, warn_of_gradients
from hdet.model.guards import another_averages, check_caller, warn_of_batch_norm
from hdet.model.weights import weights_of
from hdet.monitor.base import MonitorLike
from hdet.monitor.report import HyperparameterReport, Report
from hdet.observe.paired_probe import PairedProbe
from hdet.observe.probe import LossFunction, Probe
from hdet.observe.slopes import ProbeLosses, Slopes
from hdet.observe.training_loss import TrainingLoss, check_loss, mean_losses
from hdet.replicas.agreement import digest, gather_agreed
from hdet.replicas.topology import ReplicasLike
from hdet.schedules.forecast import Forecast, forecast
from hdet.schedules.found import FoundSchedule, Recorder
from hdet.steer.centres import Centres, RoundObservation, RoundSignal
from hdet.steer.controllers import Controller
from hdet.steer.one_slope import OneSlope
from hdet.steer.published import Published
from hdet.steer.recovery import CUT, Recovery
from hdet.steer.two_slope import TwoSlope

logger = logging.getLogger("hdet")


Loss = float | Tensor | Sequence[float | Tensor] | None

_SINGLE = frozenset((float, Tensor))
_MIB = 2**20
_STATE_VERSION = 6


class _Gathered(NamedTuple):
    """What one replica tells the others when they agree."""

    totals: tuple[tuple[float, int], ...]
    """Of its virtual replicas: sum of the losses since the last time, and their number."""
    monitored: bool
    can_probe: bool
    moved: bool
    gradients: float
    seen: Inspection
    state: StateInspection


# By value that a rank tells: what a replica of several members tells. Their losses are added up, and their number with
# them, which makes the replica's the mean of theirs.
_MERGE: tuple[Callable[[list[float]], float], ...] = (
    max,  # monitored
    min,  # can_probe
    max,  # moved
    lambda marks: -1.0 if min(marks) < 0 else float(digest(marks)),  # gradients
    min,  # finite
    lambda hashes: float(digest(hashes)),  # constants
    lambda hashes: float(digest(hashes)),  # the optimizer state's layout
    min,  # whether it is finite
    lambda marks: float(digest(marks)),  # its bits
    max,  # whether it holds weights
)


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

    where ``rho`` is the symmetric spread (:mod:`hdet.explore.spread`), ``pi_{g,k}`` a permutation drawn for each group
    and round, and ``gain_g`` what the controller (:mod:`hdet.steer`) has made of the replicas' losses; it stays 1
    unless ``auto_lr=True``. Every ``converge_every`` calls of :meth:`step` the replicas' parameters and buffers are
    averaged in place; all ranks are then bitwise equal, until the next step fans them out again.

    By default gradients are not touched: under ``DistributedDataParallel`` they are shared, and the replicas lie on one
    line through the round's start, so that the average is the run at the base learning rate. With
    ``gradients="local"`` the same class is Local SGD.

    Args:
        optimizer: whose ``param_groups[g]["lr"]`` are fanned out; float and tensor learning rates alike.
        schedule: the base schedule: a torch ``LRScheduler`` built on ``optimizer``, a function ``step -> factor`` such
            as those of :mod:`hdet.schedules` (wrapped in ``LambdaLR``), or ``None`` for the optimizer's constant rates.
            :meth:`step` steps it; do not step it yourself. ``ReduceLROnPlateau`` is stepped once per round, with the
            replicas' mean loss.
        schedule_every: calls of :meth:`step` to one step of ``schedule``, for schedules that count epochs.
        model: the module or modules whose parameters and buffers are averaged. Required when ``spread > 0``.
        spread: ``alpha``, in [0, 1). The paper uses 1/9.
        converge_every: ``T``, the round's length in steps; by default a hundred rounds, and in a run of more than
            10,000 steps rounds of 100 steps, up to 400 rounds. Required when ``spread > 0`` without ``total_steps``.
        auto_lr: whether the controller moves the gain. Needs the loss in :meth:`step`.
        probe: ``loss_fn(model, batch)``, or a :class:`hdet.Probe`: the paired probe, by which learning rates can be
            told apart in short rounds.
        controller: default ``hdet.controller.TwoSlope()`` with a probe, ``hdet.controller.Published()`` without.
        per_group: whether each parameter group has a gain, and multipliers, of its own; default one for all.
        hyperparameters: what else the replicas differ in, made by :func:`hdet.param_group`,
            :func:`hdet.module_attribute` and :func:`hdet.scalar`; each one's centre moves by what the probe says.
        hyperparameter_controller: how; default ``hdet.controller.OneSlope()``.
        design: with several factors (groups' learning rates, hyperparameters), how levels are assigned to replicas:
            ``"orthogonal"``, so that one round tells their effects apart, or ``"independent"``, as in the paper.
        virtual_replicas: ``K``: with gradient accumulation over K micro-batches, every process trains K replicas, one
            per micro-batch; see :meth:`each`. With N processes there are ``N K``.
        prior: gains and centres to start from: a file that :meth:`save_prior` wrote.
        total_steps: calls of :meth:`step` in the whole run. ``TwoSlope`` must know, and what is still to come of the
            schedule: a copy of it is run ahead in the constructor.
        rollback: with ``auto_lr``, whether a round that blew up is undone: the loss at twice the first round's (twice
            as high again after each rollback), or no replica finite. Parameters, buffers and optimizer state go back to
            the last converge whose round was not above 1.1 times the first one, and the gain falls to a third. It takes
            memory for one copy of them, at the device named instead of ``True`` (``"cpu"``).
        replicas: who they are: a number of replicas (each of as many consecutive ranks), a ``ProcessGroup`` (every rank
            in it is one), a 1-D ``DeviceMesh``, or one dimension of a mesh (``mesh["replicate"]``; the ranks along the
            others are a replica's members, over which it is sharded). Default: every rank is one. Members share a
            learning rate, and their losses are averaged. Without an initialised process group there is one replica,
            with multiplier 1.
        seed: of the permutations. Must be the same on every rank, like every other setting; the first call of
            :meth:`step` checks that.
        bucket_mib: size of a communication bucket in MiB.
        overlap_steps: ``tau``, in [0, T). With ``tau > 0`` the all-reduce at a round's end runs behind the next ``tau``
            steps: a snapshot is sent at step ``kT``, and ``theta += mean(snapshot) - snapshot`` applied at ``kT+tau``.
            That takes out all divergence up to ``kT`` and keeps what each replica has done since, so replicas are equal
            only after :meth:`converge`. It takes memory for two copies of the model in fp32 meanwhile.
        monitor: :class:`hdet.TensorBoard`, :class:`hdet.JsonLines`, a function of a :class:`hdet.Report`, or several.
        gradients: over whom gradients are averaged: ``"shared"``, all ranks, as DDP and HSDP do it; ``"grouped"``, the
            members of a replica; ``"local"``, nobody beyond a replica. The synchronisation is switched off for you, and
            on again by the next ensemble built on the module with ``"shared"``; see :mod:`hdet.model.gradients`.
        outer_momentum: ``mu``, in [0, 1): with local gradients, Nesterov momentum on what a whole round has done;
            see :mod:`hdet.converge.outer`. It takes memory for two copies of the parameters.
        outer_lr: ``nu``, > 0: the share of the way to the mean that the outer optimizer goes.
        optimizer_state: what a converge does with it: ``"verify"`` that it agrees, by a fingerprint that reads all of
            it in the first three converges and every 32nd after; ``"average"`` it, in fp32 and in place; ``"keep"``
            each replica's own; ``"reset"`` it at a round's end. ``"auto"`` verifies where gradients are shared and
            the optimizer makes its state of them alone, and averages elsewhere; see docs/optimizer_state.md.
        wire_dtype: ``torch.bfloat16`` lets trainable parameters travel in half the bytes: as bf16 differences from the
            last converged mean, of which a copy is kept in fp32. The mean, the same on all replicas, is then off by at
            most about ``(N + 3) / 2 * 2**-9`` of the largest distance that a parameter has moved since; see
            :mod:`hdet.converge.delta`. The first converge, and the first after a rollback or a resume, travels in fp32,
            so that a resumed run is not the uninterrupted one bit for bit. fp64, buffers and optimizer state travel as
            they are. Worth it where the network is what a converge waits for: packing and unpacking take more memory
            traffic, and between processes of one machine it is not faster. Not with ``overlap_steps``.

    Raises:
        TypeError, ValueError: for a bad argument, before anything was changed. No argument causes communication: ranks
            that disagree are found at the first :meth:`step`.

    Examples:
        >>> import torch, hdet
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> cosine = hdet.schedules.cosine(total_steps=1000)
        >>> ensemble = hdet.Ensemble(optimizer, cosine, model=model, spread=0.1, converge_every=10, auto_lr=True)
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
        hyperparameters: Sequence[Hyperparameter] = (),
        hyperparameter_controller: OneSlope | None = None,
        design: Design = "orthogonal",
        virtual_replicas: int = 1,
        prior: str | os.PathLike[str] | None = None,
        total_steps: int | None = None,
        rollback: bool | str | torch.device = True,
        replicas: ReplicasLike = None,
        seed: int = 0,
        bucket_mib: float = 64.0,
        overlap_steps: int = 0,
        monitor: MonitorLike = None,
        gradients: Literal["shared", "local", "grouped"] = "shared",
        outer_momentum: float = 0.0,
        outer_lr: float = 1.0,
        optimizer_state: Literal["auto", "verify", "average", "keep", "reset"] = "auto",
        wire_dtype: torch.dtype | None = None,
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
            hyperparameters=hyperparameters,
            hyperparameter_controller=hyperparameter_controller,
            design=design,
            virtual_replicas=virtual_replicas,
            prior=prior,
            total_steps=total_steps,
            rollback=rollback,
            replicas=replicas,
            seed=seed,
            bucket_mib=bucket_mib,
            overlap_steps=overlap_steps,
            monitor=monitor,
            gradients=gradients,
            outer_momentum=outer_momentum,
            outer_lr=outer_lr,
            optimizer_state=optimizer_state,
            wire_dtype=wire_dtype,
        )
        policy = policy_of(
            optimizer_state, optimizer, hyperparameters, gradients=gradients, overlap_steps=overlap_steps
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
        self._averager = Averager(
            self._weights,
            self.replicas,
            int(self.config.bucket_mib * _MIB),
            wire_dtype=wire_dtype,
            piggyback=overlap_steps == 0,
            has_virtual=virtual_replicas > 1,
        )
        self._optimizer_state = OptimizerState(
            optimizer,
            policy,
            self.replicas,
            int(self.config.bucket_mib * _MIB),
            all_ranks=self._averager.all_ranks,
            automatic=optimizer_state == "auto",
            overlapped=overlap_steps > 0,
        )
        self._group_names = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups))
        self._models = models
        self._hyperparameters = tuple(hyperparameters)
        self._fan_out = FanOut(optimizer, self._hyperparameters)
        self._centres = Centres(
            self.config.controller,
            self.config.hyperparameter_controller,
            auto_lr=auto_lr,
            rates=len(self._group_names) if per_group else 1,
            names=[h.name for h in self._hyperparameters],
            replicas=self.size,
            spread=spread,
            design=design,
            seed=seed,
        )
        if prior is not None:
            self._begin_from(Prior.load(prior))
        self._virtual = VirtualReplicas(optimizer, virtual_replicas) if virtual_replicas > 1 else None
        self._slow: SlowAverage | None = None
        self._prober: PairedProbe | None = None
        if self._probe is not None:
            self._slow = SlowAverage(self._probe.power, self._probe.dtype, self._probe.place)
            self._prober = PairedProbe(
                self._probe,
                self._slow,
                models,
                self._weights,
                optimizer,
                self.replicas,
                self._virtual,
                self.config.converge_every,
            )
        self._outer = OuterMomentum(outer_momentum, outer_lr) if self.config.outer else None
        self._told_gradients = False
        self._recovery: Recovery | None = None
        if self.config.rollback:
            device = None if isinstance(rollback, bool) else torch.device(rollback)
            self._recovery = Recovery(models, optimizer, device)
        self._recorder = Recorder(self._group_names)
        self._signals = [TrainingLoss() for _ in range(virtual_replicas)]
        self._totals: list[tuple[float, int]] = [(0.0, 0)] * self.size
        self._is_fresh = True
        self._steps = 0
        self._converged_at = 0
        self._written = self._averager.version()
        self._started = False
        self._told_no_loss = False
        self._told_rival = False
        self._flight: _Flight | None = None
        self.last_report: Report | None = None
        """The report of the latest converge."""
        set_gradients(gradients, models, self.replicas)
        warn_of_batch_norm(models, gradients, self.replicas)
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
    def size(self) -> int:
        """Number of replicas, real times virtual."""
        return self.replicas.size * self.config.virtual_replicas

    @property
    def gains(self) -> tuple[float, ...]:
        """The gain of every parameter group."""
        return tuple(self._centres.learning_rates[self._rate_of(g)].gain for g in range(len(self._group_names)))

    @property
    def centres(self) -> dict[str, float]:
        """The centre of every hyperparameter but the learning rate; where it has several places, at the first."""
        pairs = zip(self._hyperparameters, self._centres.hyperparameters, strict=True)
        return {h.name: h.value(place.position) for h, place in pairs}

    def multipliers(self, group: int = 0) -> tuple[float, ...]:
        """Every replica's multiplier ``rho`` for one parameter group, in the round in progress."""
        return self._centres.multipliers(self._rate_of(group), self.round)

    def _rate_of(self, group: int) -> int:
        return group if self.config.per_group else 0

    def save_prior(self, path: str | os.PathLike[str]) -> None:
        """Write the gains of the parameter groups, in their order, and the centres of the other hyperparameters as
        they are now into a small YAML file, from which another run can start: ``prior=path``."""
        if self.replicas.writer:
            Prior(dict(zip(self._group_names, self.gains, strict=True)), self.centres).save(path)

    def found_schedule(self) -> FoundSchedule:
        """The base learning rates of the run so far, schedule x gain: to be saved, and replayed without replicas.

        Recorded at the two ends of every round; between them the replay is linear.
        """
        return self._recorder.schedule()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by group."""
        return [copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_base_lr(self) -> list[float | Tensor]:
        """The schedule's learning rates before gain and multiplier, by group: the same on every rank."""
        return [copied(lr) for lr in self._fan_out.base]

    # ----------------------------------------------------------------------------------------------------- the loop

    def each(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """With ``virtual_replicas=K``, iterate over the K micro-batches of a step::

            for micro_batch in scheduler.each(micro_batches):
                loss = loss_fn(model, micro_batch) / K
                loss.backward()
            optimizer.step()
            scheduler.step(loss)

        Each is yielded with the parameters at its virtual replica's point; afterwards they are back. Without virtual
        replicas the micro-batches are passed on as they are.

        Raises:
            ValueError: if there are not exactly K.
        """
        return iter(micro_batches) if self._virtual is None else self._virtual.visit(micro_batches)

    def step(self, loss: Loss = None, *, batch: Any = None) -> None:
        """Call after every ``optimizer.step()``.

        Collective at the end of each round and on the very first call (which checks that the replicas agree); between
        them it neither communicates nor waits for the device.

        Args:
            loss: this replica's training loss of the step: a float or a scalar tensor, detached here. With virtual
                replicas it may be a list of theirs. Without it the replicas still fan out and converge, and the
                published controller rests. A non-finite loss is ignored.
            batch: the batch of the step, for a probe without ``batches`` of its own; see :class:`hdet.Probe`.

        Raises:
            TypeError, ValueError: for an int, an integer tensor, or a tensor of more than one element.
            ReplicaMismatchError: on every replica, if they disagree about step, settings, learning rates or model.
            DivergedError: on every replica, if none has finite parameters.
        """
        self.end_step(loss, batch)
        self._fan_out.undo()
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

    def end_step(self, loss: Loss, batch: Any = None) -> None:
        """First part of :meth:`step`, for adapters around a scheduler of their own: observe, and converge if the round
        is over."""
        # Between converges this is all that a step costs: what most runs pass, one loss, goes the short way.
        one = checked = None
        if self._virtual is None and type(loss) in _SINGLE:
            one = check_loss(loss)
        elif loss is not None:
            checked = self._checked(loss)
        fan_out = self._fan_out
        if not fan_out.is_current or len(self.optimizer.param_groups) != len(fan_out.base):
            self._refuse()
        if not self._started:
            self._start()
        if one is not None:
            self._signals[0].add(one)
        elif checked is not None:
            for signal, own in zip(self._signals, checked, strict=True):
                signal.add(own)
        elif self.config.auto_lr and not self._told_no_loss:
            self._told_no_loss = True
            if self.replicas.writer:
                logger.warning("scheduler.step() was called without a loss: the gain does not move until it gets one.")
        steps = self._steps = self._steps + 1
        if self._flight and steps == self._flight.report.step + self.config.overlap_steps:
            self._land()
        if steps % self.config.converge_every == 0:
            self._record(self._steps - 1)
            self._converge(self._agree(), complete=True)
            if self._prober is not None and self._wants_probe():
                self._prober.batches.offer(batch)
            self._draw()

    def fan_out(self) -> None:
        """Last part of :meth:`step`: read the schedule's learning rates and write this replica's."""
        self._fan_out.apply()
        if self._is_fresh:
            self._is_fresh = False
            if self._steps % self.config.converge_every == 0:
                self._record(self._steps)

    # ---------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, equal on every rank if the replicas have just converged. Makes no collective
        call; loads with ``torch.load(weights_only=True)``.

        If the model is sharded and there is a probe or outer momentum, their averages are sharded too: the state is
        then equal on the ranks that hold the same shard, and each shard must be saved, and loaded there again.

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
            "replicas": self.size,
            "base_lr": self.get_base_lr(),
            **self._centres.state(),
            "starts": {h.name: list(h.starts) for h in self._hyperparameters},
            "first_loss": self._recovery.first_loss if self._recovery else math.nan,
            "rollbacks": self._recovery.count if self._recovery else 0,
            "slow_average": [list(part) for part in self._slow.state()] if self._slow else [],
            "slow_rounds": self._slow.rounds if self._slow else 0,
            "outer": [list(part) for part in self._outer.state()] if self._outer else [],
            "shard": list(self._shard),
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
        self._centres.check_state(state)
        for h in self._hyperparameters:
            if len(state["starts"][h.name]) != len(h.starts):
                raise ValueError(
                    f"The saved state has {h.name} in {len(state['starts'][h.name])} places, this run in "
                    f"{len(h.starts)}: other parameter groups or modules."
                )
        if (state["slow_average"] or state.get("outer")) and tuple(state.get("shard", (0, 1))) != self._shard:
            raise ValueError(
                f"The saved state is of shard {state.get('shard', (0, 1))[0]} of {state.get('shard', (0, 1))[1]}, and "
                f"this rank holds shard {self._shard[0]} of {self._shard[1]}. The averages of the probe and of the "
                "outer momentum are sharded like the parameters: save the state of every shard, load each where it was."
            )

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` saved."""
        self._centres.load(state)
        for h in self._hyperparameters:
            h.starts = list(state["starts"][h.name])
        if self._recovery is not None:
            self._recovery.first_loss, self._recovery.count = state["first_loss"], state["rollbacks"]
        self._recorder.knots = [(step, tuple(lrs)) for step, lrs in state["found_schedule"]]
        if self._slow is not None:
            self._slow.load(state["slow_average"], state["slow_rounds"])
        if self._outer is not None:
            self._outer.load(state.get("outer", ()))
        self.resume_at(state["steps"], state["base_lr"])
        if state["replicas"] == self.size:
            self._totals = [(total, count) for total, count in state["round_losses"]]

    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor]) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``."""
        self._flight = None
        if self._prober is not None:
            self._prober.batches.forget()
        if self._recovery is not None:
            self._recovery.watch()
        self._steps = self._converged_at = steps
        self._averager.restart()
        self._written = self._averager.version()
        for signal in self._signals:
            signal.reset()
        self._totals = [(0.0, 0)] * self.size
        self._draw()
        self._fan_out.undo(base_lr)
        self.fan_out()

    # --------------------------------------------------------------------------------------------------- inner parts

    def _step_schedule(self) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            report = self.last_report
            if self._converged_at == self._steps and report is not None and math.isfinite(report.mean_loss):
                self.schedule.step(report.mean_loss)
        elif self.schedule is not None and self._steps % self._schedule_every == 0:
            self.schedule.step()

    def _checked(self, loss: Any) -> list[float | Tensor]:
        """The losses of this process's replicas."""
        count = self.config.virtual_replicas
        if isinstance(loss, (list, tuple)):
            if len(loss) != count and count == 1:
                raise TypeError(f"scheduler.step() got {type(loss).__name__} of {len(loss)} losses; pass one.")
            if len(loss) != count:
                raise ValueError(f"scheduler.step() got {len(loss)} losses for virtual_replicas={count}.")
            return [check_loss(one) for one in loss]
        if count > 1 and isinstance(self.config.controller, Published) and self.config.auto_lr:
            raise TypeError(
                f"Without a probe the controller needs the loss of each of virtual_replicas={count}: pass "
                "scheduler.step([loss_0, loss_1, ...])."
            )
        return [check_loss(loss)] * count

    def _draw(self) -> None:
        """What this replica trains under, which changes once per round."""
        self._is_fresh = True  # the next fan_out() is the first under these
        gains, places, own = self.gains, self._centres.hyperparameters, self.replicas.rank
        held = [
            (place.position, levels[own]) for place, levels in zip(places, self._centres.held(self.round), strict=True)
        ]
        if self._virtual is None:
            self._fan_out.begin_round([gain * self.multipliers(g)[own] for g, gain in enumerate(gains)], held)
        else:  # their mean is what the one optimizer takes its steps at
            self._fan_out.begin_round(gains, held)
            self._restart_virtual()

    def _restart_virtual(self) -> None:
        """Virtual replicas are one again, at the parameters as they are."""
        if self._virtual is not None:
            count = self._virtual.count
            first = self.replicas.rank * count
            self._virtual.restart([self.multipliers(g)[first : first + count] for g in range(len(self._group_names))])

    def _record(self, step: int) -> None:
        """Remember the base learning rates of the update after ``step`` others."""
        base = self._fan_out.base
        self._recorder.add(step, [float(lr) * gain for lr, gain in zip(base, self.gains, strict=True)])

    def _begin_from(self, prior: Prior) -> None:
        prior.check(self._group_names, [h.name for h in self._hyperparameters], per_group=self.config.per_group)
        centres = self._centres
        gains = [prior.gains[name] for name in self._group_names]
        centres.learning_rates = [
            state._replace(gain=gain) for state, gain in zip(centres.learning_rates, gains, strict=False)
        ]
        centres.hyperparameters = [
            place._replace(position=h.position_of(prior.hyperparameters[h.name]))
            for h, place in zip(self._hyperparameters, centres.hyperparameters, strict=True)
        ]

    def _refuse(self) -> NoReturn:
        """Say why this ensemble cannot step any more."""
        if not self._fan_out.is_current:
            raise RuntimeError("Another hdet scheduler was built on this optimizer since; step that one.")
        raise ValueError(
            f"The optimizer has {len(self.optimizer.param_groups)} parameter groups and had "
            f"{len(self._fan_out.base)} when hdet was built. Build the scheduler after the last add_param_group()."
        )

    def _start(self) -> None:
        check_caller()
        self._agree(converges=False)
        self._started = True
        if self._recovery is not None:
            self._recovery.begin()
        for monitor in self._monitors:
            monitor.start(self._settings(), writer=self.replicas.writer, step=self._steps)

    def _settings(self) -> dict[str, Any]:
        """The run's settings as plain values, for error messages and for TensorBoard's hparams."""
        settings = self._constant_settings | {"optimizer_state": self._optimizer_state.policy}
        for name, lr in zip(self._group_names, self._fan_out.base, strict=True):
            settings[f"schedule_lr.{name}"] = float(lr)
        return settings

    @cached_property
    def _constant_settings(self) -> dict[str, Any]:
        settings = asdict(self.config)
        for section in ("controller", "hyperparameter_controller"):
            for name, value in settings.pop(section).items():
                if section == "controller" or self._hyperparameters:
                    settings[f"{section}.{name}"] = str(value) if isinstance(value, tuple) else value
        settings["hyperparameters"] = "; ".join(settings["hyperparameters"])
        settings["replicas"] = self.size
        settings["members"] = self.replicas.members
        settings["schedule"] = type(self.schedule).__name__
        return settings

    def _agree(self, *, converges: bool = True) -> list[_Gathered]:
        """Make sure that all replicas are at the same point, and gather what each has to tell."""
        centres = self._centres
        facts = self._settings() | {
            "controller state": [tuple(state) for state in (*centres.learning_rates, *centres.hyperparameters)],
            "hyperparameters at the start": [tuple(h.starts) for h in self._hyperparameters],
            "replicas=": self.replicas.kind,
        }
        layout, *seen = self._averager.inspect()
        payload = (
            *(number for signal in self._signals for number in signal.total()),
            bool(self._monitors),
            self._prober is not None and self._prober.batches.ready,
            self._averager.version() != self._written,
            self._mark_gradients(),
            *seen,
            *(self._optimizer_state.inspect() if converges else NOT_INSPECTED),
        )
        own = 2 * len(self._signals)
        merge = (*[sum] * own, *_MERGE)
        rows = gather_agreed(self.replicas, self._steps, layout, facts, payload, merge, self._averager.gather)
        gathered = [
            _Gathered(
                tuple((row[i], int(row[i + 1])) for i in range(0, own, 2)),
                bool(row[own]),
                bool(row[own + 1]),
                bool(row[own + 2]),
                row[own + 3],
                Inspection(layout, bool(row[own + 4]), int(row[own + 5])),
                StateInspection(int(row[own + 6]), bool(row[own + 7]), int(row[own + 8]), bool(row[own + 9])),
            )
            for row in rows
        ]
        if self._steps and not self._told_gradients:
            self._told_gradients = True
            warn_of_gradients(self.config.gradients, [now.gradients for now in gathered], self.replicas)
        return gathered

    @property
    def _shard(self) -> tuple[int, int]:
        """Which shard of the model this rank holds, of how many."""
        return (0, 1) if self._weights.whole else (self.replicas.member, self.replicas.members)

    def _mark_gradients(self) -> float:
        """At the first converge, by what the replicas see whether gradients are shared; -1 for no mark."""
        if self._told_gradients or not self._steps or not self._models or self.replicas.size == 1:
            return -1.0
        return fingerprint_gradients(p for group in self.optimizer.param_groups for p in group["params"])

    def _converge(self, gathered: list[_Gathered], complete: bool) -> Report:
        """Average, or send what will be averaged, and let the controller see the round if it is complete."""
        started = time.perf_counter()
        if complete and another_averages(self._models, self) and not self._told_rival:
            self._told_rival = True
            if self.replicas.writer:
                logger.warning(
                    "Two hdet schedulers average the same model in turn: the first to converge takes the replicas' "
                    "differences away before the second sees them. Give each the submodule that its optimizer trains."
                )
        for signal in self._signals:
            signal.reset()
        since = [totals for now in gathered for totals in now.totals]
        self._totals = [
            (total + more, count + number) for (total, count), (more, number) in zip(self._totals, since, strict=True)
        ]
        # A monitor passed on one rank only must not leave the others out of the gather.
        watched = any(now.monitored for now in gathered)
        seen = [now.seen for now in gathered]
        with torch.profiler.record_function("hdet::converge"):
            if complete and self._has_blown_up(gathered):
                return self._roll_back(watched, started)
            if complete and self.config.overlap_steps:
                pending = self._averager.start(seen)
                self._optimizer_state.converge([now.state for now in gathered], (), complete=True)
                self.last_report = report = self._control(complete)
                self._flight = _Flight(pending, report, watched, time.perf_counter() - started)
                return report
            slow = self._slow if complete and self._wants_probe() else None
            can_probe = slow is not None and all(now.can_probe for now in gathered)
            averaged = self._averager.average(seen, slow, return_points=can_probe)
            states = [now.state for now in gathered]
            excluded, sent = self._optimizer_state.converge(states, averaged.excluded, complete=complete)
            averaged = averaged._replace(excluded=excluded, bytes=averaged.bytes + sent)
        self._converged_at = self._steps
        losses = None
        if self._prober is not None and averaged.points:
            losses = self._prober.evaluate(
                averaged.points,
                self._centres.directions(self._ended_round),
                self.config.controller.reach(self._height()),
                [
                    h.neutral(centre.position)
                    for h, centre in zip(self._hyperparameters, self._centres.hyperparameters, strict=True)
                ],
            )
        if complete and self._outer is not None:
            self._outer.step(self._averager.buckets())
            self._weights.written()
            self._averager.set_reference()
        if not complete:
            self._restart_virtual()
        report = self._control(complete, losses)
        if complete and self._recovery is not None:
            self._recovery.keep(report.mean_loss)
        return self._tell(report, averaged, watched, time.perf_counter() - started)

    @property
    def _progress(self) -> float:
        return self._steps / self.config.total_steps if self.config.total_steps else math.nan

    @property
    def _share(self) -> float:
        """A round's length as a share of the run's; without ``total_steps`` there may be any number of rounds, and a
        hundred are assumed."""
        total = self.config.total_steps
        return self.config.converge_every / total if total else 0.01

    def _height(self) -> float:
        """Of the schedule, as a share of its peak."""
        peak = self._forecast.peak if self._forecast else 0.0
        return min(1.0, float(self._fan_out.base[0]) / peak) if peak else 1.0

    def _wants_probe(self) -> bool:
        if self._slow is None or self.size == 1:
            return False
        wanted = self.config.auto_lr and self.config.controller.wants_probe(self._progress, self._until)
        return wanted or any(h.move for h in self._hyperparameters)

    def _may_move(self) -> bool:
        """Whether the controller may still move the gain: while it may, it can also take it back."""
        return not isinstance(self.config.controller, TwoSlope) or self._wants_probe()

    @property
    def _ended_round(self) -> int:
        """Index of the round in which the last step was taken."""
        return (self._steps - 1) // self.config.converge_every

    def _has_blown_up(self, gathered: Sequence[_Gathered]) -> bool:
        """Whether the round that just ended is to be undone."""
        if self._recovery is None:
            return False
        losses = mean_losses(self._totals) if any(count for _, count in self._totals) else ()
        finite = [now.seen.finite for now in gathered]
        return self._recovery.is_needed(finite, losses, watches_losses=self._may_move())

    def _roll_back(self, watched: bool, started: float) -> Report:
        """Undo the round: the model and the optimizer as they last converged well, under a smaller gain."""
        assert self._recovery is not None
        self._recovery.go_back()
        self._averager.restart()
        self._converged_at = self._steps
        report = self._control(False)
        self._totals = [(0.0, 0)] * self.size
        self._centres.cut(CUT)
        if self._slow is not None:
            self._slow.restart()
        if self._outer is not None:
            self._outer.restart()
        if self.replicas.writer:
            self._recovery.tell(self._steps, report.mean_loss)
        averaged = Averaged(math.nan, (), 0)
        report = replace(report, next_gain=self.gains, rolled_back=True)
        return self._tell(report, averaged, watched, time.perf_counter() - started)

    def _land(self) -> None:
        """Apply the average that has been under way, if one is."""
        if self._flight:
            started = time.perf_counter()
            with torch.profiler.record_function("hdet::converge"):
                averaged = self._flight.pending.finish()
                self._optimizer_state.heal(averaged.excluded)
            seconds = self._flight.seconds + time.perf_counter() - started
            self._tell(self._flight.report, averaged, self._flight.watched, seconds)
            self._flight = None

    def _tell(self, report: Report, averaged: Averaged, watched: bool, seconds: float) -> Report:
        squares = self.replicas.all_gather([averaged.squared_distance]) if watched else []
        copies = self.replicas.members if self._weights.whole else 1  # shards add up, copies say the same
        self._written = self._averager.version()
        if averaged.excluded and self.replicas.writer:
            logger.warning(
                f"Step {self._steps}: not finite on replica {', '.join(map(str, averaged.excluded))}: left out of the "
                "average, and healed from the others, parameters and optimizer state."
            )
        self.last_report = report = replace(
            report,
            distance=tuple(
                math.sqrt(sum(row[0] for row in rows) / copies) for rows in self.replicas.by_replica(squares)
            )
            or report.distance,
            excluded=averaged.excluded,
            converge_ms=seconds * 1e3,
            converge_bytes=averaged.bytes,
        )
        for monitor in self._monitors:
            monitor.report(report)
        return report

    def _control(self, complete: bool, probe: ProbeLosses | None = None) -> Report:
        """The report of a converge but for the average itself; if it ends the round, the controllers move."""
        round = self._ended_round
        losses = mean_losses(self._totals)
        finite = [loss for loss in losses if math.isfinite(loss)]
        schedule = [float(lr) for lr in self._fan_out.base]
        gains, centres = self.gains, self._centres
        rates = [self._rate_of(g) for g in range(len(schedule))]
        multipliers = [centres.multipliers(i, round) for i in rates]
        held, places = centres.held(round), list(centres.hyperparameters)  # observe() moves the latter
        told = RoundSignal((math.nan,) * len(centres.learning_rates), (Effect(math.nan, math.nan),) * len(places), None)
        lag = self._slow.lag if self._slow else 1.0
        if complete:
            final = self._forecast.final if self._forecast else 0.0
            seen = RoundObservation(
                losses=losses,
                schedule=tuple(schedule),
                progress=self._progress,
                share=self._share,
                height=self._height(),
                until=self._until,
                final=final,
                lag=lag,
                probe=probe,
            )
            spreads = [
                (h.spread_at(place.position), h.move) for h, place in zip(self._hyperparameters, places, strict=True)
            ]
            told = centres.observe(round, seen, spreads)
            centres.hyperparameters = [
                place._replace(position=h.clamped(place.position))
                for h, place in zip(self._hyperparameters, centres.hyperparameters, strict=True)
            ]
            self._totals = [(0.0, 0)] * self.size
            if self._recovery is not None:
                self._recovery.observe(losses)
        base = tuple(lr * gain for lr, gain in zip(schedule, gains, strict=True))
        return Report(
            step=self._steps,
            round=round,
            complete=complete,
            replicas=self.size,
            groups=self._group_names,
            schedule_lr=tuple(schedule),
            gain=gains,
            base_lr=base,
            replica_lr=tuple(tuple(lr * rho for rho in rhos) for lr, rhos in zip(base, multipliers, strict=True)),
            losses=losses,
            mean_loss=math.fsum(finite) / len(finite) if finite else math.nan,
            hypergradient=tuple(told.hypergradient[i] for i in rates),
            velocity=tuple(centres.learning_rates[i].velocity for i in rates),
            next_gain=self.gains,
            hyperparameters=tuple(
                HyperparameterReport(
                    name=h.name,
                    centre=h.value(place.position),
                    values=tuple(h.value(place.position, level) for level in levels),
                    effect=effect.value,
                    error=effect.error,
                    next_centre=h.value(after.position),
                )
                for h, place, levels, effect, after in zip(
                    self._hyperparameters, places, held, told.effects, centres.hyperparameters, strict=True
                )
            ),
            distance=(math.nan,) * self.replicas.size,
            excluded=(),
            probe=Slopes(*(math.nan,) * 4) if told.slopes is None else told.slopes,
            rolled_back=False,
            converge_ms=0.0,
            converge_bytes=0,
            writer=self.replicas.writer,
        )
