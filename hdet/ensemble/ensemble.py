"""``hdet.Ensemble``: N replicas under N learning rates, around any learning-rate schedule."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from hdet.ensemble import checkpoint
from hdet.ensemble.build import build
from hdet.ensemble.rounds import Rounds
from hdet.explore import Prior, copied
from hdet.model import RivalWatch, set_gradients, warn_of_batch_norm
from hdet.monitor import Report
from hdet.observe import Loss
from hdet.schedules.base import ScheduleLike
from hdet.schedules.forecast import Forecast
from hdet.schedules.found import FoundSchedule
from hdet.settings import Settings, resolve


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
        total_steps: calls of :meth:`step` in the whole run. ``TwoSlope`` must know, and what is still to come of the
            schedule: a copy of it is run ahead in the constructor.
        settings: those of :class:`hdet.Settings`, which documents each.

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
        schedule: ScheduleLike = None,
        *,
        schedule_every: int = 1,
        total_steps: int | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self.settings = resolved = resolve(optimizer, total_steps, settings)
        """Complete and valid settings."""
        self.optimizer, self.replicas = optimizer, resolved.replicas
        self._group_names = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups))
        self._phases = phases = build(optimizer, schedule, schedule_every, resolved)
        if resolved.prior is not None:
            self._begin_from(resolved.prior)
        set_gradients(resolved.given["gradients"], resolved.modules, self.replicas)
        warn_of_batch_norm(resolved.modules, resolved.given["gradients"], self.replicas)
        rival = RivalWatch(resolved.modules, self, self.replicas)
        self._rounds = Rounds(resolved, phases, self._group_names, rival)
        # For adapters around a scheduler of their own, step() in two parts. Bound once: they are called in every step.
        self.end_step = self._rounds.end_step
        """First part: take the loss, and converge if the round is over."""
        self.fan_out = self._rounds.fan_out
        """Last part: read the schedule's learning rates and write this replica's."""

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
        return self._phases.explore.visit(micro_batches)

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
        rounds, phases = self._rounds, self._phases
        phases.explore.undo()
        report = rounds.last_report if rounds.converged_at == rounds.steps else None
        phases.schedule.step(rounds.steps, math.nan if report is None else report.mean_loss)
        self.fan_out()

    def converge(self) -> Report | None:
        """Average the replicas now: before evaluating, saving, or after the last step.

        Collective. It does not end the round: multipliers, loss sums and the schedule of rounds stay as they are, so
        evaluating more often changes nothing else. At a round's end, and twice in a row, there is nothing to average,
        unless a parameter was written since: by a last ``optimizer.step()`` that no :meth:`step` followed.

        Returns:
            The report, or ``None`` if the replicas had converged already.
        """
        return self._rounds.converge()

    # ------------------------------------------------------------------------------------------------ what it shows

    @property
    def last_report(self) -> Report | None:
        """The report of the latest converge."""
        return self._rounds.last_report

    @property
    def steps(self) -> int:
        """Calls of :meth:`step` so far."""
        return self._rounds.steps

    @property
    def round(self) -> int:
        """Index of the round in progress."""
        return self._rounds.round

    @property
    def schedule(self) -> Any:
        """torch's scheduler of the base schedule; ``None`` for constant rates."""
        return self._phases.schedule.scheduler

    @property
    def size(self) -> int:
        """Number of replicas, real times virtual."""
        return self.settings.size

    @property
    def gains(self) -> tuple[float, ...]:
        """The gain of every parameter group."""
        return self._rounds.gains

    @property
    def centres(self) -> dict[str, float]:
        """The centre of every hyperparameter but the learning rate; where it has several places, at the first."""
        pairs = zip(self._phases.explore.hyperparameters, self._phases.steer.positions, strict=True)
        return {h.name: h.value(position) for h, position in pairs}

    def multipliers(self, group: int = 0) -> tuple[float, ...]:
        """Every replica's multiplier ``rho`` for one parameter group, in the round in progress."""
        return self._rounds.multipliers(group)

    def save_prior(self, path: str | os.PathLike[str]) -> None:
        """Write the gains of the parameter groups, in their order, and the centres of the other hyperparameters as
        they are now into a small YAML file, from which another run can start: ``prior=path``."""
        if self.replicas.writer:
            Prior(dict(zip(self._group_names, self.gains, strict=True)), self.centres).save(path)

    def found_schedule(self) -> FoundSchedule:
        """The base learning rates of the run so far, schedule x gain: to be saved, and replayed without replicas.

        Recorded at the two ends of every round; between them the replay is linear.
        """
        return self._phases.schedule.found()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by group."""
        return [copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_base_lr(self) -> list[float | Tensor]:
        """The schedule's learning rates before gain and multiplier, by group: the same on every rank."""
        return self._phases.explore.base_lr

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
        self._phases.course.forecast = ahead

    def own_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the schedule's."""
        missed = self.steps - self._rounds.converged_at
        if missed and self.replicas.size > 1 and self.settings.given["spread"] > 0:
            warnings.warn(
                f"state_dict() was called {missed} steps after the replicas last converged, "
                "so that each rank saves a different model. Call scheduler.converge() before saving.",
                stacklevel=3,
            )
        return checkpoint.collect(self._rounds.parts, {"steps": self.steps, "base_lr": self.get_base_lr()})

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` cannot be loaded, before anything is changed."""
        checkpoint.check(self._rounds.parts, state)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` saved."""
        self._rounds.resume_at(state["steps"], state["base_lr"], state)

    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor]) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``."""
        self._rounds.resume_at(steps, base_lr)

    def _begin_from(self, prior: Prior) -> None:
        hyperparameters, per_group = self._phases.explore.hyperparameters, self.settings.given["per_group"]
        prior.check(self._group_names, [h.name for h in hyperparameters], per_group=per_group)
        self._phases.steer.begin_at(
            [prior.gains[name] for name in self._group_names],
            [h.position_of(prior.hyperparameters[h.name]) for h in hyperparameters],
        )
