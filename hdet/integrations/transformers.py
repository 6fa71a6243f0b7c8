"""Hugging Face Trainer: its optimizer's learning rates become the replicas'.

::

    from hdet.integrations.transformers import attach, loss_of

    trainer = Trainer(model, args, train_dataset=dataset)
    attach(trainer, spread=1 / 9, auto_lr=True, probe=loss_of(trainer))
    trainer.train()

The base schedule is the Trainer's own, by ``lr_scheduler_type``. ``docs/guides/trainer.md`` has the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

try:
    from transformers import Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'hdet.integrations.transformers needs transformers: pip install "transformers[torch]>=5.24", or '
        "hdet[transformers]"
    ) from error
from torch import Tensor

import hdet
from hdet.errors import check_instance
from hdet.integrations.driven import Driven, Scheduler, build, check_given, with_rounds


def attach(
    trainer: Trainer, scheduler: Callable[..., Scheduler] = hdet.Ensemble, *args: Any, **settings: Any
) -> TrainerScheduler:
    """Let a Trainer train replicas. To be called before ``trainer.train()``; not collective.

    The scheduler is built when training starts, and stepped with the loss of each step. The replicas converge before
    the Trainer evaluates, predicts or saves, and at the end of each epoch. Logs have ``hdet/gain`` and
    ``hdet/base_lr``; their ``learning_rate`` is the base learning rate, the same on every rank.

    ``rounds.jsonl`` in ``output_dir`` has a report of every round, and at the end ``report.html`` says what happened
    and why (:mod:`hdet.report`). With an :class:`hdet.JsonLines` among ``monitor=`` both are where it writes.

    Args:
        trainer: a ``Trainer``, also of a class of your own. It becomes an instance of a class derived from its own.
        scheduler: :class:`hdet.Ensemble`, around the Trainer's own schedule; or :class:`hdet.OneCycleLR`.
        args, settings: its arguments after the optimizer. ``model`` is the Trainer's, and so is ``total_steps`` unless
            you pass it.

    Returns:
        The Trainer's ``lr_scheduler``; its ``scheduler`` is hdet's, from the start of training on.

    Raises:
        TypeError, ValueError: for what is no Trainer, a second call, DeepSpeed, or a bad argument.
    """
    check_instance("trainer", trainer, Trainer, "a transformers.Trainer")
    check_given("attach", scheduler, settings, {"model": "the Trainer's"})
    if isinstance(trainer, _Attached):
        raise ValueError("attach() was called on this Trainer before. Call it once.")
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "attach() does not work with the Trainer under DeepSpeed, whose engine it makes without replica groups. "
            "Use DDP or FSDP2, or hdet.integrations.deepspeed in a loop of your own."
        )
    kind = type(trainer)
    own: Any = trainer
    own.__class__ = type(f"HDET{kind.__name__}", (_Attached, kind), {})
    own.hdet = TrainerScheduler(trainer, scheduler, args, settings)
    trainer.add_callback(_Ends(trainer, own.hdet))
    handle: TrainerScheduler = own.hdet
    return handle


def loss_of(trainer: Trainer) -> Callable[[Any, Any], Tensor]:
    """As a probe: the loss that the Trainer computes of a batch. For batches of the probe's own pass
    ``hdet.Probe(loss_fn=loss_of(trainer), batches=...)``; they are moved to the Trainer's device."""
    check_instance("trainer", trainer, Trainer, "a transformers.Trainer")

    def loss_fn(model: Any, batch: Any) -> Tensor:
        inputs = trainer._prepare_inputs(dict(batch))  # compute_loss may take labels out of it
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        return loss[0] if isinstance(loss, tuple) else loss

    return loss_fn


class TrainerScheduler:
    """What stands in the place of the Trainer's ``lr_scheduler``.

    Args:
        trainer: whose model and optimizer it works on.
        kind, args, settings: as :func:`attach` takes them.
    """

    def __init__(
        self, trainer: Trainer, kind: Callable[..., Scheduler], args: tuple[Any, ...], settings: Mapping[str, Any]
    ) -> None:
        self._trainer, self._kind, self._args, self._settings = trainer, kind, args, dict(settings)
        self._base: Any = None
        self._steps = 0
        self._batch: Any = None
        self._gathered: dict[str, Any] | None = None
        self.driven: Driven | None = None
        """The scheduler and its losses; ``None`` before training starts."""

    @property
    def scheduler(self) -> Scheduler:
        """hdet's scheduler; an error before training starts."""
        return self._ready.scheduler

    @property
    def wants_schedule(self) -> bool:
        """Whether the Trainer's own schedule is to be the base."""
        return self._kind is hdet.Ensemble and not self._args and "schedule" not in self._settings

    def prepare(self, base: Any, steps: int) -> None:
        """A training run is about to start, of so many steps, with the Trainer's own schedule."""
        self._base, self._steps, self.driven = base, steps, None

    def begin(self) -> Driven:
        """Build the scheduler, if that has not been done. The Trainer has wrapped its model by then."""
        if self.driven is None:
            if self._trainer.optimizer is None or not self._steps:
                raise RuntimeError("hdet has no scheduler yet: trainer.train() builds it.")
            given = {**self._settings, "model": self._trainer.model_wrapped}
            settings, rounds = with_rounds(given, self._trainer.args.output_dir)
            built = build(
                self._kind,
                self._trainer.optimizer,
                self._args,
                settings,
                total_steps=self._steps,
                schedule=self._base,
            )
            self.driven = Driven(built, sums=True, rounds=rounds)  # the Trainer divides the losses of micro-batches
        return self.driven

    @property
    def _ready(self) -> Driven:
        if self.driven is None:
            raise RuntimeError("hdet has no scheduler yet: trainer.train() builds it.")
        return self.driven

    def take(self, loss: Tensor, batch: Any) -> None:
        """The loss of a micro-batch."""
        self._batch = batch
        self._ready.add(loss)

    def converge(self) -> None:
        """Average, if there are replicas and they have trained apart."""
        if self.driven is not None:
            self.driven.converge()

    def gather(self) -> None:
        """Collect the state on all ranks, for the one that saves it."""
        self._gathered = self._ready.state()

    # What the Trainer asks of a scheduler.

    def step(self) -> None:
        """After each step of the optimizer."""
        batch, self._batch = self._batch, None
        self._ready.step(batch)

    def get_last_lr(self) -> list[float]:
        """Base learning rates, schedule times gain, by parameter group."""
        return self._ready.base_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""
        gathered, self._gathered = self._gathered, None
        return self._ready.state() if gathered is None else gathered

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.begin().load(state_dict)


class _Attached(Trainer):
    """What :func:`attach` puts before a Trainer's own class."""

    hdet: TrainerScheduler
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is self.hdet:  # of an earlier train()
            self.lr_scheduler = None
        given = self.lr_scheduler
        if given is not None and not self.hdet.wants_schedule:
            raise ValueError(
                f"The Trainer was given a {type(given).__name__}, and attach() a schedule, too. Leave one of them out."
            )
        base = super().create_scheduler(num_training_steps, optimizer) if self.hdet.wants_schedule else None
        self.hdet.prepare(base, num_training_steps)
        self.lr_scheduler = self.hdet
        return self.hdet

    def training_step(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Tensor:
        batch = dict(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **keywords)
        self.hdet.take(loss, batch)
        return loss

    def evaluate(self, *args: Any, **keywords: Any) -> Any:
        self.hdet.converge()
        return super().evaluate(*args, **keywords)

    def predict(self, *args: Any, **keywords: Any) -> Any:
        self.hdet.converge()
        return super().predict(*args, **keywords)

    def save_model(self, *args: Any, **keywords: Any) -> None:
        self.hdet.converge()
        super().save_model(*args, **keywords)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.hdet.gather()
        super()._save_optimizer_and_scheduler(output_dir)

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        if self.hdet.driven is not None and "learning_rate" in logs:
            logs |= self.hdet.driven.metrics()
        super().log(logs, *args, **keywords)


class _Ends(TrainerCallback):
    """Builds the scheduler when training starts, and converges at the end of each epoch, the last among them."""

    def __init__(self, trainer: Trainer, scheduler: TrainerScheduler) -> None:
        self._trainer, self._scheduler = trainer, scheduler

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._scheduler.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The Trainer has left out the scheduler's step, perhaps on this rank only.
        if self._trainer.accelerator.optimizer_step_was_skipped:
            self._scheduler.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._scheduler.driven is not None:
            self._scheduler.driven.tell()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._scheduler.converge()
