"""``hdet.OneCycleLR``: torch's OneCycleLR whose replicas train under a spread of learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from typing_extensions import Self, Unpack

from hdet.ensemble import Ensemble
from hdet.errors import check_batches, check_mapping, check_number, check_whole
from hdet.explore import ParamGroupField, copied, hand_over, keep_fan_out, like
from hdet.model import check_unsharded
from hdet.monitor import Report
from hdet.observe import Loss, check_loss
from hdet.schedules.advance import advance, is_plain
from hdet.schedules.forecast import forecast
from hdet.schedules.saved import check_scheduler_state
from hdet.settings import Resolved, Settings, resolve
from hdet.steer import Published, find_lr, learning_rates
from hdet.transaction import AllOrNothing

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
        optimizer, max_lr, ..., last_epoch: as in torch. With ``auto_lr=True`` ``max_lr`` is where the controller
            begins, and what it keeps if it cannot tell it from the right one. It may be left out: then the controller
            begins at the optimizer's own learning rates. ``max_lr="auto"`` asks :func:`hdet.find_lr`, with the probe's
            ``loss_fn`` and ``batches``; the constructor is then collective.
        settings: those of :class:`hdet.Settings`, which documents each.

    Attributes:
        ensemble: the :class:`hdet.Ensemble`. Where this is torch's OneCycleLR and nothing else there is none, and
            reading it raises AttributeError.

    A checkpoint of torch's OneCycleLR loads into this class, and the other way round. What is said of learning rates
    written by hand, and of handing the optimizer back, in :class:`hdet.Ensemble` holds here: the schedule overwrites
    the former at every step, as torch's does. With replicas it is no part of a SequentialLR or ChainedScheduler: give
    these to :class:`hdet.Ensemble`.
    """

    _ensemble: Ensemble | None = None
    _is_closed = False
    _is_plain = True

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._is_plain = is_plain(cls)

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float] | Literal["auto"] | None = None,
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
        differs = _differs(given)
        if differs:
            _check_numbers(
                pct_start=pct_start, div_factor=div_factor, final_div_factor=final_div_factor, last_epoch=last_epoch
            )
        if cycle_momentum and any(isinstance(h, ParamGroupField) and h.is_momentum for h in given["hyperparameters"]):
            raise ValueError("cycle_momentum=True sets the momentum in every step. To explore it, pass False.")
        if isinstance(max_lr, str) and max_lr != "auto":
            raise ValueError(f"Invalid {max_lr=}. Must be a learning rate, a list of them by group, or 'auto'.")
        is_given = max_lr is not None and not isinstance(max_lr, str)
        if max_lr is None:
            max_lr = _own_rates(optimizer, given)
        with AllOrNothing() as transaction:
            transaction.on_failure(keep_fan_out(resolved.optimizer))
            transaction.keep(optimizer, *resolved.modules)
            if differs:
                check_unsharded(optimizer)
                hand_over(resolved.optimizer)
            if isinstance(max_lr, str):
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
            if differs:
                # Before the learning rates fan out.
                asks = resolved.probe is not None or resolved.controller.needs_length
                ahead = forecast(self, optimizer, self.total_steps) if asks else None
                # What could be read only once has been.
                again = {name: value for name, value in given.items() if name in settings}
                self._ensemble = Ensemble(optimizer, total_steps=length, **again)  # type: ignore[arg-type]
                self._ensemble.recomputed_by("OneCycleLR")
                if not is_given:
                    self._ensemble.rate_was_found()
                if ahead is not None:
                    self._ensemble.look_ahead(ahead)
                if self.last_epoch:
                    self._ensemble.resume_at(self.last_epoch, self._last_lr)

    def __repr__(self) -> str:
        return super().__repr__() if self._ensemble is None else self._ensemble.summary("hdet.OneCycleLR")

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble; see the class."""
        if self._ensemble is None:
            raise AttributeError(
                "This OneCycleLR is torch's and nothing else: there is no ensemble. Pass model= and spread=, for "
                "example spread=1/9, to get one."
            )
        return self._ensemble

    def _initial_step(self) -> None:
        if self._ensemble is not None:  # the constructor of a SequentialLR or ChainedScheduler
            raise TypeError(
                "A hdet.OneCycleLR with replicas cannot be a part of another scheduler, which would step it without "
                "the loss, and others on its learning rates. Make that the base schedule of the replicas: "
                "hdet.Ensemble(optimizer, SequentialLR(...), model=...), of torch's own schedulers."
            )
        super()._initial_step()

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
        if epoch is not None:
            epoch = check_whole("epoch", epoch, "in [0, total_steps]", lambda n: 0 <= n <= self.total_steps)
        if ensemble is None:
            if loss is not None:  # a script with virtual replicas may run with one
                check_loss(loss[0] if isinstance(loss, (list, tuple)) and len(loss) == 1 else loss)
            self._check_open()
            _step_schedule(self, epoch)
        else:
            ensemble.end_step(loss, batch)
            rates = advance(self) if epoch is None and self._is_plain else _step_schedule(self, epoch)
            ensemble.fan_out(rates)

    def each(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of a step, one for each virtual replica; see :meth:`hdet.Ensemble.each`."""
        check_batches("micro_batches", micro_batches, text=True)
        return iter(micro_batches) if self._ensemble is None else self._ensemble.each(micro_batches)

    def converge(self) -> Report | None:
        """Average the replicas now; see :meth:`hdet.Ensemble.converge`. Without an ensemble there is nothing to do."""
        return None if self._ensemble is None else self._ensemble.converge()

    def close(self) -> None:
        """Converge, and hand model and optimizer back; see :meth:`hdet.Ensemble.close`. Also at the end of a ``with``
        block::

            with hdet.OneCycleLR(optimizer, max_lr, total_steps, model=model, spread=1 / 9) as scheduler:
                ...
        """
        self._is_closed = True
        if self._ensemble is not None:
            self._ensemble.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._is_closed = True
        if self._ensemble is not None:
            self._ensemble.__exit__(kind, error, trace)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("This hdet scheduler is closed. Build another one to go on.")

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by parameter group."""
        return super().get_last_lr() if self._ensemble is None else self._ensemble.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """torch's state, with the ensemble's under ``"hdet"`` where there is one: the same on every rank if the
        replicas have just converged. Makes no collective call; loads with ``torch.load(weights_only=True)``."""
        state = super().state_dict()
        state.pop("_ensemble", None)
        state.pop("_is_closed", None)
        if self._ensemble is not None:
            groups = self.optimizer.param_groups
            state["_last_lr"] = [like(group["lr"], lr) for group, lr in zip(groups, self._last_lr, strict=False)]
            state["hdet"] = self._ensemble.own_state()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, or a checkpoint of torch's OneCycleLR.

        With an ensemble, the optimizer's learning rates are set to this replica's; its settings stay those of the
        constructor, ``total_steps`` among them: a state of a run of another length continues at its step with the
        schedule of this length, and keeps its gains. Without one, all is as in torch: the saved length is loaded, and a
        saved ensemble's gains are left aside.

        Raises:
            TypeError, ValueError: if it is no such state, or holds what no run can have; see
                :meth:`hdet.Ensemble.load_state_dict`. Nothing has changed then.
        """
        state = dict(check_mapping("state_dict", state_dict, "what state_dict() returned"))
        saved = state.pop("hdet", None)
        check_scheduler_state("state_dict", state, self, {k: v for k, v in vars(self).items() if k != "optimizer"})
        if self._ensemble is None:
            super().load_state_dict(state)
            return
        if saved is not None:
            self._ensemble.check_state(saved)
        length = length_of(self)
        if state["last_epoch"] > length["total_steps"]:
            raise ValueError(
                f"The saved state is of step {state['last_epoch']}, beyond this run's total_steps="
                f"{length['total_steps']}. Build the scheduler for a longer run."
            )
        with AllOrNothing(self, self.optimizer):
            super().load_state_dict(state)
            if length != length_of(self):
                vars(self).update(length)
                recompute(self, self.last_epoch)
                if saved is not None:
                    saved = {**saved, "base_lr": [copied(group["lr"]) for group in self.optimizer.param_groups]}
            if saved is not None:
                self._ensemble.load_own_state(saved)
            else:
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


def _check_numbers(*, pct_start: Any, div_factor: Any, final_div_factor: Any, last_epoch: Any) -> None:
    """What torch does not ask of its arguments, and a schedule to be scaled must have."""
    check_number("pct_start", pct_start, "a float in [0, 1]", lambda share: 0 <= share <= 1)
    check_number("div_factor", div_factor, "finite and > 0", lambda factor: factor > 0)
    check_number("final_div_factor", final_div_factor, "finite and > 0", lambda factor: factor > 0)
    check_whole("last_epoch", last_epoch, ">= -1", lambda epoch: epoch >= -1)


def _differs(given: Settings) -> bool:
    """Whether anything was asked for that torch's OneCycleLR does not do."""
    objects = (given["model"], given["converge_every"], given["probe"], given["controller"], given["prior"])
    asked = given["spread"] > 0 or given["hyperparameters"] or given["gradients"] != "shared"
    return bool(asked) or any(x is not None for x in (*objects, given["replicas"], given["monitor"]))


def _own_rates(optimizer: Optimizer, given: Settings) -> list[float]:
    """Where ``max_lr`` is left out: the optimizer's learning rates, by group.

    Raises:
        TypeError: without ``auto_lr``.
        ValueError: if they are not positive.
    """
    if not given["auto_lr"]:
        raise TypeError(
            "OneCycleLR() needs max_lr, the peak of the schedule. With auto_lr=True and model= it may be left out: the "
            "controller then begins at the optimizer's own learning rates."
        )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if not all(rate > 0 for rate in rates):
        raise ValueError(
            f"The optimizer's learning rates are {rates}: auto_lr=True has no place to begin. Pass max_lr, or an "
            "optimizer whose learning rates are > 0."
        )
    return rates


def _find(optimizer: Optimizer, resolved: Resolved) -> float | list[float]:
    """``max_lr="auto"``: for each group, in the proportions of the optimizer's learning rates."""
    given, probe = resolved.given, resolved.probe
    if given["model"] is None or probe is None or probe.batches is None:
        raise ValueError(
            'max_lr="auto" needs model= and probe=hdet.Probe(loss_fn=..., batches=...): it trains on those batches.'
        )
    rates = learning_rates(optimizer)
    goes_on = given["auto_lr"] and not isinstance(resolved.controller, Published)
    found = find_lr(
        given["model"], optimizer, probe.loss_fn, probe.batches, auto_lr=goes_on, replicas=given["replicas"]
    )
    return [found.max_lr * rate / max(rates) for rate in rates]


def _length(total_steps: object, epochs: object, steps_per_epoch: object) -> int:
    """Steps of the whole run; anything where torch is about to refuse the arguments."""
    if total_steps is None and isinstance(epochs, int) and isinstance(steps_per_epoch, int):
        total_steps = epochs * steps_per_epoch
    if not isinstance(total_steps, int) or isinstance(total_steps, bool):
        return 1
    return min(max(1, total_steps), 2**62)
