"""``hdet.OneCycleLR``: torch's OneCycleLR whose replicas train under a spread of learning rates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from hdet.arguments import check_arguments
from hdet.converge.optimizer_policy import policy_of
from hdet.ensemble import Ensemble, Loss
from hdet.explore.design import Design
from hdet.explore.fan_out import copied
from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField
from hdet.monitor.base import MonitorLike
from hdet.monitor.report import Report
from hdet.observe.probe import LossFunction, Probe
from hdet.observe.training_loss import check_loss
from hdet.replicas.topology import ReplicasLike
from hdet.schedules.forecast import forecast
from hdet.steer.controllers import Controller
from hdet.steer.lr_finder import find_lr
from hdet.steer.one_slope import OneSlope
from hdet.steer.published import Published

_step_schedule = lr_scheduler.OneCycleLR.step  # looked up once: super() would cost every step 5% more


class OneCycleLR(lr_scheduler.OneCycleLR):
    r"""A drop-in for :class:`torch.optim.lr_scheduler.OneCycleLR`.

    Up to ``last_epoch`` the arguments are torch's: same order, same defaults, same errors. With none of the
    keyword-only ones given it *is* torch's class, bit for bit. With them the schedule becomes the base of an
    :class:`hdet.Ensemble`, which documents each::

        scheduler = hdet.OneCycleLR(optimizer, max_lr=9e-4, total_steps=S, model=model, spread=1 / 9, auto_lr=True)
        loss.backward(); optimizer.step(); scheduler.step(loss)
        scheduler.converge()                    # before evaluating or saving

    Args:
        optimizer, max_lr, ..., last_epoch: as in torch. ``max_lr="auto"`` asks :func:`hdet.find_lr`, with the probe's
            ``loss_fn`` and ``batches``; the constructor is then collective.
        model: the module or modules to average. Required when ``spread > 0``.
        spread: ``alpha``, in [0, 1): replicas train under ``[1 - alpha, 1 + alpha]`` times the base.
        converge_every: ``T``, the round's length in steps; by default a hundred rounds, and in a run of more than
            10,000 steps rounds of 100 steps, up to 400 rounds.
        auto_lr: whether the controller moves the gain.
        probe: ``loss_fn(model, batch)``: makes ``auto_lr`` worth trusting; pass the batch to :meth:`step` then.
        controller: default ``TwoSlope()`` with a probe, ``Published()`` without; both in ``hdet.controller``.
        per_group: whether each parameter group has a gain of its own.
        hyperparameters: what else the replicas differ in: :func:`hdet.param_group`, :func:`hdet.module_attribute`,
            :func:`hdet.scalar`.
        hyperparameter_controller: how their centres move; default ``hdet.controller.OneSlope()``.
        design: ``"orthogonal"`` or ``"independent"``: how several factors' levels are assigned to replicas.
        virtual_replicas: replicas per process, one for each micro-batch of a step; see :meth:`each`.
        prior: a file of :meth:`hdet.Ensemble.save_prior` to start from.
        rollback: with ``auto_lr``, whether a round that blew up is undone.
        replicas: a number of replicas, a ``ProcessGroup``, or a dimension of a ``DeviceMesh``; default: the world.
        seed: of the permutations.
        bucket_mib: size of a communication bucket in MiB.
        overlap_steps: steps behind which the all-reduce is hidden; 0 waits for it.
        monitor: where the reports go.
        gradients: ``"shared"``, ``"grouped"`` or ``"local"``: over whom they are averaged.
        outer_momentum: with local gradients, momentum on what a whole round has done.
        outer_lr: with local gradients, the share of the way to the mean that is gone.
        optimizer_state: what a converge does with the optimizer's state: ``"auto"``, ``"verify"``, ``"average"``,
            ``"keep"`` or ``"reset"``; see docs/optimizer_state.md.
        wire_dtype: ``torch.bfloat16`` averages parameters in half the traffic, and less exactly.

    Attributes:
        ensemble: the :class:`hdet.Ensemble`, or ``None`` where this is torch's OneCycleLR and nothing else.

    A checkpoint of torch's OneCycleLR loads into this class, and the other way round.
    """

    ensemble: Ensemble | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float] | Literal["auto"],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
        *,
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
        settings: dict[str, Any] = {
            "model": model,
            "spread": spread,
            "auto_lr": auto_lr,
            "probe": probe,
            "controller": controller,
            "per_group": per_group,
            "hyperparameters": hyperparameters,
            "hyperparameter_controller": hyperparameter_controller,
            "design": design,
            "virtual_replicas": virtual_replicas,
            "prior": prior,
            "rollback": rollback,
            "replicas": replicas,
            "seed": seed,
            "bucket_mib": bucket_mib,
            "overlap_steps": overlap_steps,
            "monitor": monitor,
            "gradients": gradients,
            "outer_momentum": outer_momentum,
            "outer_lr": outer_lr,
            "optimizer_state": optimizer_state,
            "wire_dtype": wire_dtype,
        }
        length = _length(total_steps, epochs, steps_per_epoch)
        settings["total_steps"] = length
        # Before torch's constructor changes the optimizer.
        check_arguments(converge_every=converge_every, **settings)
        policy_of(optimizer_state, optimizer, hyperparameters, gradients=gradients, overlap_steps=overlap_steps)
        if cycle_momentum and any(isinstance(h, ParamGroupField) and h.is_momentum for h in hyperparameters):
            raise ValueError("cycle_momentum=True sets the momentum in every step. To explore it, pass False.")
        if max_lr == "auto":
            max_lr = _find(optimizer, model, probe, replicas, auto=auto_lr and not isinstance(controller, Published))
        super().__init__(
            optimizer,
            max_lr,
            total_steps,
            epochs,
            steps_per_epoch,
            pct_start,
            anneal_strategy,
            cycle_momentum,
            base_momentum,
            max_momentum,
            div_factor,
            final_div_factor,
            three_phase,
            last_epoch,
        )
        given = (model, converge_every, probe, controller, prior, replicas, monitor)
        if spread > 0 or hyperparameters or gradients != "shared" or any(x is not None for x in given):
            # Before the learning rates fan out; without a probe nobody asks what is to come.
            ahead = None if probe is None else forecast(self, optimizer, self.total_steps)
            self.ensemble = Ensemble(optimizer, converge_every=converge_every, **settings)
            if ahead is not None:
                self.ensemble.look_ahead(ahead)
            if self.last_epoch:
                self.ensemble.resume_at(self.last_epoch, self._last_lr)

    def step(  # type: ignore[override]
        self, loss: Loss = None, *, batch: Any = None, epoch: int | None = None
    ) -> None:
        """Call after every ``optimizer.step()``; see :meth:`hdet.Ensemble.step`.

        Args:
            loss: this replica's training loss of the step, a float or a scalar tensor; with virtual replicas it may be
                a list of theirs.
            batch: with a probe, the batch of the step.
            epoch: torch's deprecated way to set the schedule's step; rounds go on counting calls.
        """
        ensemble = self.ensemble
        if ensemble is None:
            if loss is not None:  # a script with virtual replicas may run with one
                check_loss(loss[0] if isinstance(loss, (list, tuple)) and len(loss) == 1 else loss)
            _step_schedule(self, epoch)
        else:
            ensemble.end_step(loss, batch)
            _step_schedule(self, epoch)
            ensemble.fan_out()

    def each(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of a step, one for each virtual replica; see :meth:`hdet.Ensemble.each`."""
        return iter(micro_batches) if self.ensemble is None else self.ensemble.each(micro_batches)

    def converge(self) -> Report | None:
        """Average the replicas now; see :meth:`hdet.Ensemble.converge`. Without an ensemble there is nothing to do."""
        return None if self.ensemble is None else self.ensemble.converge()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by parameter group."""
        return super().get_last_lr() if self.ensemble is None else self.ensemble.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """torch's state, with the ensemble's under ``"hdet"`` where there is one: the same on every rank if the
        replicas have just converged. Makes no collective call; loads with ``torch.load(weights_only=True)``."""
        state = super().state_dict()
        state.pop("ensemble", None)
        if self.ensemble is not None:
            state["hdet"] = self.ensemble.own_state()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, or a checkpoint of torch's OneCycleLR.

        With an ensemble, the optimizer's learning rates are set to this replica's; its settings stay those of the
        constructor, ``total_steps`` among them: a state of a run of another length continues at its step with the
        schedule of this length, and keeps its gains. Without one, all is as in torch: the saved length is loaded, and a
        saved ensemble's gains are left aside.
        """
        state = dict(state_dict)
        saved = state.pop("hdet", None)
        if self.ensemble is not None and saved is not None:
            self.ensemble.check_state(saved)
        length = length_of(self)
        super().load_state_dict(state)
        if self.ensemble is not None and length != length_of(self):
            if self.last_epoch > length["total_steps"]:
                raise ValueError(
                    f"The saved state is of step {self.last_epoch}, beyond this run's total_steps="
                    f"{length['total_steps']}. Build the scheduler for a longer run."
                )
            vars(self).update(length)
            recompute(self, self.last_epoch)
            if saved is not None:
                saved = {**saved, "base_lr": [copied(group["lr"]) for group in self.optimizer.param_groups]}
        if self.ensemble is not None and saved is not None:
            self.ensemble.load_own_state(saved)
        elif self.ensemble is not None:
            self.ensemble.resume_at(self.last_epoch, self._last_lr)


def length_of(scheduler: object) -> dict[str, Any]:
    """What a OneCycleLR derives from ``total_steps``; of another scheduler nothing."""
    if not isinstance(scheduler, lr_scheduler.OneCycleLR):
        return {}
    return {name: vars(scheduler)[name] for name in ("total_steps", "_schedule_phases")}


def recompute(scheduler: lr_scheduler.LRScheduler, step: int) -> None:
    """Write the learning rates that a scheduler of closed form has after ``step`` steps."""
    count = scheduler._step_count
    scheduler.last_epoch = step - 1
    lr_scheduler.LRScheduler.step(scheduler)
    scheduler._step_count = count


def _find(
    optimizer: Optimizer,
    model: nn.Module | Iterable[nn.Module] | None,
    probe: LossFunction | Probe | None,
    replicas: ReplicasLike,
    *,
    auto: bool,
) -> float | list[float]:
    """``max_lr="auto"``: for each group, in the proportions of the optimizer's learning rates."""
    if model is None or not isinstance(probe, Probe) or probe.batches is None:
        raise ValueError(
            'max_lr="auto" needs model= and probe=hdet.Probe(loss_fn=..., batches=...): it trains on those batches.'
        )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    found = find_lr(model, optimizer, probe.loss_fn, probe.batches, auto_lr=auto, replicas=replicas)
    return [found.max_lr * rate / max(rates) for rate in rates]


def _length(total_steps: object, epochs: object, steps_per_epoch: object) -> int:
    """Steps of the whole run; anything where torch is about to refuse the arguments."""
    if total_steps is None and isinstance(epochs, int) and isinstance(steps_per_epoch, int):
        total_steps = epochs * steps_per_epoch
    return max(1, total_steps) if isinstance(total_steps, int) else 1
