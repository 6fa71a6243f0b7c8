"""``hdet.Ensemble``: N replicas under N learning rates, around any learning-rate schedule."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self, Unpack

from hdet.ensemble import checkpoint
from hdet.ensemble.build import build
from hdet.ensemble.rounds import Rounds
from hdet.errors import check_file, check_instance, check_item, check_text, check_whole
from hdet.explore import Prior, hand_over, keep_fan_out
from hdet.model import (
    MidRoundWatch,
    RivalWatch,
    check_unsharded,
    outside_inference,
    set_gradients,
    warn_of_batch_norm,
    warn_of_outside,
)
from hdet.monitor import Report, story
from hdet.observe import Loss
from hdet.schedules.base import ScheduleLike
from hdet.schedules.forecast import Forecast
from hdet.schedules.found import FoundSchedule
from hdet.schedules.saved import check_scheduler_state, parts_of
from hdet.settings import Settings, resolve
from hdet.transaction import AllOrNothing

logger = logging.getLogger("hdet")


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
        optimizer: whose ``param_groups[g]["lr"]`` are fanned out; float and tensor learning rates alike, a tensor that
            groups share once. Of a wrapper, such as accelerate's, the optimizer inside. Until :meth:`close` they are
            this replica's; what you write there by hand becomes the base, see below.
        schedule: the base schedule: a torch ``LRScheduler`` built on ``optimizer``, a function ``step -> factor`` such
            as those of :mod:`hdet.schedules` (wrapped in ``LambdaLR``), or ``None`` for the optimizer's constant rates.
            :meth:`step` steps it; do not step it yourself. ``ReduceLROnPlateau`` is stepped once per round, with the
            replicas' mean loss.
        schedule_every: calls of :meth:`step` to one step of ``schedule``, for schedules that count epochs.
        total_steps: calls of :meth:`step` in the whole run. ``Posterior`` must know, and what is still to come of the
            schedule: a copy of it is run ahead in the constructor.
        settings: those of :class:`hdet.Settings`, which documents each.

    **Learning rates written by hand** between two steps are taken over at the next :meth:`step` as they are by torch's
    schedulers: one that goes on from the last rate (StepLR, ExponentialLR, ..., or none) goes on from them, and the
    replicas spread around them; one that computes it from the step alone (LambdaLR, OneCycleLR, ...) overwrites them
    at its next step, which is logged once. ``group["lr"] = x`` is the base for all replicas, gain included, and
    ``group["lr"] *= y`` multiplies it; tensors likewise in place. Write the same on every rank: the replicas compare at
    their next converge (:mod:`hdet.explore.by_hand`).

    **Handing the optimizer back.** :meth:`converge` puts the base learning rates into the optimizer. Before
    ``total_steps`` this replica's come back with the optimizer's next step, unless another scheduler has written there
    by then; afterwards they stay, and so they do after :meth:`close`, for whatever comes next: SWALR, another ensemble,
    a loop without a scheduler. To go on with another scheduler before ``total_steps``, call :meth:`close`.
    The base learning rate is the schedule's, without the gain, and is what ``optimizer.state_dict()`` holds at any
    time; a learning rate that somebody else has written stands there as it is.

    Raises:
        TypeError, ValueError: for a bad argument. Optimizer, model, hyperparameters and an earlier scheduler are then
            as they were. No argument causes communication: ranks that disagree are found at the first :meth:`step`. An
            optimizer of which every rank updates a part (``ZeroRedundancyOptimizer``) is refused.

    Examples:
        >>> import torch, hdet
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> cosine = hdet.schedules.cosine(total_steps=1000)
        >>> ensemble = hdet.Ensemble(optimizer, cosine, model=model, spread=0.1, total_steps=1000, auto_lr=True)
        >>> loss = model(torch.ones(1, 4)).square().mean()
        >>> loss.backward(); optimizer.step(); ensemble.step(loss)
    """

    @outside_inference
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
        check_unsharded(optimizer)
        self.optimizer, self.replicas = resolved.optimizer, resolved.replicas
        self._is_closed = self._has_told_of_saving = False
        self._group_names = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(self.optimizer.param_groups))
        with AllOrNothing() as transaction:
            # What is kept first is put back last.
            transaction.on_failure(keep_fan_out(self.optimizer))
            for h in resolved.given["hyperparameters"]:
                transaction.on_failure(h.keep())
            transaction.keep(optimizer, *resolved.modules)
            hand_over(self.optimizer)
            self._phases = phases = build(optimizer, schedule, schedule_every, resolved)
            if resolved.prior is not None:
                self._begin_from(resolved.prior)
            warn_of_batch_norm(resolved.modules, resolved.given["gradients"], self.replicas)
            given_out = resolved.exclusion.ids()
            warn_of_outside([p for p in resolved.outside if id(p) not in given_out], self.replicas)
            rival = RivalWatch(resolved.modules, self, self.replicas)
            self._rounds = Rounds(resolved, phases, self._group_names, rival)
            self._restore_gradients = set_gradients(resolved.given["gradients"], resolved.modules, self.replicas)
            self._mid_round = MidRoundWatch(resolved.modules, self._apart)
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
            TypeError, ValueError: if there are not exactly K.
        """
        self._check_open()
        return self._phases.explore.visit(micro_batches)

    def step(self, loss: Loss = None, *, batch: Any = None) -> None:
        """Call after every ``optimizer.step()``.

        Collective at the end of each round, on the very first call and on the first after a load; between them it
        neither communicates nor waits for the device. These first calls compare what replicas must have in common:
        names, order, shapes, dtypes, flags and bits of what is averaged, settings of parameter groups, and gradients
        (docs/agreement.md). Bits are those before the optimizer's first step with gradients.

        Args:
            loss: this replica's training loss of the step: a float or a scalar tensor, detached here. With virtual
                replicas it may be a list of theirs. Without it the replicas still fan out and converge, and the
                published controller rests. A non-finite loss is ignored.
            batch: the batch of the step, for a probe without ``batches`` of its own; see :class:`hdet.Probe`.

        Raises:
            TypeError, ValueError: for an int, an integer tensor, or a tensor of more than one element.
            ReplicaMismatchError: on every replica, if they disagree about step, call, settings, learning rates, model
                or start; it names what differs and the ranks.
            HdetError: if the process group was initialised after this was built, or another rank's message did not
                come.
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

        The optimizer then holds base learning rates: see the class.

        Returns:
            The report, or ``None`` if the replicas had converged already.

        Raises:
            RuntimeError: after :meth:`close`, if a parameter was written since.
        """
        if self._is_closed:
            if self._phases.converge.was_written:
                self._check_open()
            return None
        report = self._rounds.converge()
        self._phases.explore.park(finally_=self._rounds.is_over)
        return report

    def close(self) -> None:
        """Converge, if the replicas have not, and hand model and optimizer back: the optimizer has base learning rates
        and other hyperparameters are at their centres, hdet's hooks are gone, and gradients are synchronised again.

        Collective; a second call does nothing. :meth:`state_dict` still works, :meth:`step` is an error. The same
        happens at the end of a ``with`` block::

            with hdet.Ensemble(optimizer, model=model, spread=0.1, converge_every=100) as ensemble:
                ...

        but if an exception ends the block, nothing is sent, since other ranks may not come: everything is handed back,
        and each replica keeps its own parameters.
        """
        self._close(converges=True)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close(converges=kind is None)

    def _close(self, *, converges: bool) -> None:
        if self._is_closed:
            return
        try:
            if converges and self._rounds.has_begun and self._phases.explore.is_current:
                self._rounds.converge()
        finally:
            self._is_closed = True
            self._rounds.close()
            self._mid_round.close()
            self._restore_gradients()
            self.end_step = self.fan_out = self._check_open  # type: ignore[assignment]

    def _check_open(self, *_: Any) -> None:
        if self._is_closed:
            raise RuntimeError(
                "This hdet scheduler is closed: it has handed the optimizer back. Build another one to go on."
            )

    # ------------------------------------------------------------------------------------------------ what it shows

    def __repr__(self) -> str:
        return self.summary("hdet.Ensemble")

    def summary(self, kind: str) -> str:
        """For adapters around a scheduler of their own: the state in one line, under the name of their class."""
        return story.summary(
            check_text("kind", kind),
            self.last_report,
            replicas=self.size,
            spread=self.settings.given["spread"],
            step=self.steps,
            total_steps=self.settings.total_steps,
        )

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
        """Every replica's multiplier ``rho`` for one parameter group, in the round in progress.

        Raises:
            TypeError, ValueError: unless ``group`` is the index of one.
        """
        last = len(self._group_names) - 1
        group = check_whole("group", group, f"in [0, {last}]", lambda g: 0 <= g <= last)
        return self._rounds.multipliers(group)

    def save_prior(self, path: str | os.PathLike[str]) -> None:
        """Write the gains of the parameter groups, in their order, and the centres of the other hyperparameters as
        they are now into a small YAML file, from which another run can start: ``prior=path``.

        Raises:
            TypeError, ValueError: if ``path`` cannot be a file.
        """
        path = check_file("path", path)
        if self.replicas.writer:
            Prior(dict(zip(self._group_names, self.gains, strict=True)), self.centres).save(path)

    def found_schedule(self) -> FoundSchedule:
        """The base learning rates of the run so far, schedule x gain: to be saved, and replayed without replicas.

        Recorded at the two ends of every round; between them the replay is linear.
        """
        return self._phases.schedule.found()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by group."""
        return self._phases.explore.own_lr

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

        Raises:
            TypeError, ValueError: if it is no such state, or holds what no run can have: a gain that is not above 0, a
                number that is not finite, lists and tensors of another length. Nothing has changed then.
        """
        self.check_state(state_dict)
        saved = check_item("The saved state", state_dict, "schedule")
        if self.schedule is None or saved is None:
            self.load_own_state(state_dict)
            return
        check_scheduler_state("schedule", saved, self.schedule)
        with AllOrNothing(self.optimizer, *parts_of(self.schedule)):
            self.schedule.load_state_dict(saved)
            self.load_own_state(state_dict)

    def recomputed_by(self, name: str) -> None:
        """For adapters around a scheduler of their own: its name, if it computes learning rates from the step alone."""
        self._phases.explore.overwritten_by = check_text("name", name)

    def look_ahead(self, ahead: Forecast) -> None:
        """For adapters around a scheduler of their own: tell what is to come of it.

        Raises:
            TypeError: for what is no forecast.
        """
        check_instance("ahead", ahead, Forecast, "an hdet.schedules.forecast.Forecast")
        self._phases.course.forecast = ahead

    def rate_was_found(self) -> None:
        """For adapters around a scheduler of their own: tell that the user did not choose the learning rate, which was
        found or left out. A controller then has no reason to stay near it."""
        self._phases.steer.has_given_rate = False

    @outside_inference
    def own_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the schedule's."""
        missed = self.steps - self._rounds.converged_at
        if missed and self.replicas.size > 1 and (causes := self._differences()):
            message = (
                f"state_dict() was called {missed} steps after the replicas last converged. They differ by "
                f"{', '.join(causes)}, so that each rank saves a different model. Call scheduler.converge() before "
                "saving."
            )
            if self.replicas.writer and not self._has_told_of_saving:
                self._has_told_of_saving = True
                logger.warning(message)
            warnings.warn(message, stacklevel=4)
        return checkpoint.collect(self._rounds.parts, {"steps": self.steps, "base_lr": self.get_base_lr()})

    def _apart(self) -> int:
        """Steps since the replicas converged, if they differ since; 0 on all ranks but the writer."""
        if not self.replicas.writer or self.replicas.size == 1 or not self._differences():
            return 0
        return self.steps - self._rounds.converged_at

    def _differences(self) -> list[str]:
        """What lets the replicas' parameters drift apart between converges."""
        given = self.settings.given
        causes = [f"their learning rates (spread={given['spread']:g})"] if given["spread"] > 0 else []
        causes += [h.name for h in given["hyperparameters"]]
        return causes + ([f"their own gradients ({given['gradients']})"] if given["gradients"] != "shared" else [])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``TypeError`` or ``ValueError`` if ``state`` cannot be loaded, before anything is changed."""
        checkpoint.check(self._rounds.parts, state, len(self._group_names))

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`own_state` saved.

        Raises:
            TypeError, ValueError: as :meth:`load_state_dict`.
        """
        self._check_open()
        self.check_state(state)
        steps, base_lr = checkpoint.check_place(state["steps"], state["base_lr"], len(self._group_names))
        self._rounds.resume_at(steps, base_lr, state)

    def resume_at(self, steps: int, base_lr: Sequence[float | Tensor]) -> None:
        """Continue from a converged model after ``steps`` steps, with the schedule at ``base_lr``.

        Raises:
            TypeError, ValueError: for a number of steps below 0, or learning rates that are not finite and >= 0.
        """
        self._rounds.resume_at(*checkpoint.check_place(steps, base_lr, len(self._group_names)))

    def _begin_from(self, prior: Prior) -> None:
        hyperparameters, per_group = self._phases.explore.hyperparameters, self.settings.given["per_group"]
        prior.check(self._group_names, [h.name for h in hyperparameters], per_group=per_group)
        self._phases.steer.begin_at(
            [prior.gains[name] for name in self._group_names],
            [h.position_of(prior.hyperparameters[h.name]) for h in hyperparameters],
        )
