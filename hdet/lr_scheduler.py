"""``hdet.OneCycleLR``: torch's OneCycleLR whose replicas train under a spread of learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from typing_extensions import Unpack

from hdet.ensemble import Ensemble
from hdet.explore import ParamGroupField, copied
from hdet.monitor import Report
from hdet.observe import Loss, check_loss
from hdet.schedules.forecast import forecast
from hdet.settings import Resolved, Settings, resolve
from hdet.steer import find_lr

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
        settings: those of :class:`hdet.Settings`, which documents each.

    Attributes:
        ensemble: the :class:`hdet.Ensemble`. Where this is torch's OneCycleLR and nothing else there is none, and
            reading it raises AttributeError.

    A checkpoint of torch's OneCycleLR loads into this class, and the other way round.
    """

    _ensemble: Ensemble | None = None

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
        **settings: Unpack[Settings],
    ) -> None:
        length = _length(total_steps, epochs, steps_per_epoch)
        resolved = resolve(optimizer, length, settings)  # before torch's constructor changes the optimizer
        given = resolved.given
        if cycle_momentum and any(isinstance(h, ParamGroupField) and h.is_momentum for h in given["hyperparameters"]):
            raise ValueError("cycle_momentum=True sets the momentum in every step. To explore it, pass False.")
        if max_lr == "auto":
            max_lr = _find(optimizer, resolved)
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
        if _differs(given):
            # Before the learning rates fan out; without a probe nothing asks what is to come.
            ahead = None if resolved.probe is None else forecast(self, optimizer, self.total_steps)
            self._ensemble = Ensemble(optimizer, total_steps=length, **settings)
            if ahead is not None:
                self._ensemble.look_ahead(ahead)
            if self.last_epoch:
                self._ensemble.resume_at(self.last_epoch, self._last_lr)

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble; see the class."""
        if self._ensemble is None:
            raise AttributeError(
                "This OneCycleLR is torch's and nothing else: there is no ensemble. Pass model= and spread=, for "
                "example spread=1/9, to get one."
            )
        return self._ensemble

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
        ensemble = self._ensemble
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
        return iter(micro_batches) if self._ensemble is None else self._ensemble.each(micro_batches)

    def converge(self) -> Report | None:
        """Average the replicas now; see :meth:`hdet.Ensemble.converge`. Without an ensemble there is nothing to do."""
        return None if self._ensemble is None else self._ensemble.converge()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by parameter group."""
        return super().get_last_lr() if self._ensemble is None else self._ensemble.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """torch's state, with the ensemble's under ``"hdet"`` where there is one: the same on every rank if the
        replicas have just converged. Makes no collective call; loads with ``torch.load(weights_only=True)``."""
        state = super().state_dict()
        state.pop("_ensemble", None)
        if self._ensemble is not None:
            state["hdet"] = self._ensemble.own_state()
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
        if self._ensemble is not None and saved is not None:
            self._ensemble.check_state(saved)
        length = length_of(self)
        super().load_state_dict(state)
        if self._ensemble is not None and length != length_of(self):
            if self.last_epoch > length["total_steps"]:
                raise ValueError(
                    f"The saved state is of step {self.last_epoch}, beyond this run's total_steps="
                    f"{length['total_steps']}. Build the scheduler for a longer run."
                )
            vars(self).update(length)
            recompute(self, self.last_epoch)
            if saved is not None:
                saved = {**saved, "base_lr": [copied(group["lr"]) for group in self.optimizer.param_groups]}
        if self._ensemble is not None and saved is not None:
            self._ensemble.load_own_state(saved)
        elif self._ensemble is not None:
            self._ensemble.resume_at(self.last_epoch, self._last_lr)


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


def _differs(given: Settings) -> bool:
    """Whether anything was asked for that torch's OneCycleLR does not do."""
    objects = (given["model"], given["converge_every"], given["probe"], given["controller"], given["prior"])
    asked = given["spread"] > 0 or given["hyperparameters"] or given["gradients"] != "shared"
    return bool(asked) or any(x is not None for x in (*objects, given["replicas"], given["monitor"]))


def _find(optimizer: Optimizer, resolved: Resolved) -> float | list[float]:
    """``max_lr="auto"``: for each group, in the proportions of the optimizer's learning rates."""
    given, probe = resolved.given, resolved.probe
    if given["model"] is None or probe is None or probe.batches is None:
        raise ValueError(
            'max_lr="auto" needs model= and probe=hdet.Probe(loss_fn=..., batches=...): it trains on those batches.'
        )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    goes_on = given["auto_lr"] and resolved.controller.needs_probe
    found = find_lr(
        given["model"], optimizer, probe.loss_fn, probe.batches, auto_lr=goes_on, replicas=given["replicas"]
    )
    return [found.max_lr * rate / max(rates) for rate in rates]


def _length(total_steps: object, epochs: object, steps_per_epoch: object) -> int:
    """Steps of the whole run; anything where torch is about to refuse the arguments."""
    if total_steps is None and isinstance(epochs, int) and isinstance(steps_per_epoch, int):
        total_steps = epochs * steps_per_epoch
    return max(1, total_steps) if isinstance(total_steps, int) else 1
