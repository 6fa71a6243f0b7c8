"""Lightning: a callback that makes an optimizer's learning rates the replicas'.

::

    from hdet.integrations.lightning import HDET, training_step

    hdet_ = HDET(hdet.OneCycleLR, max_lr=9e-4, spread=1 / 9, auto_lr=True, probe=training_step)
    trainer = L.Trainer(strategy="ddp", devices=4, callbacks=[hdet_])

The module stays as it is. ``docs/guides/lightning.md`` has the whole of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

try:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.trainer.states import TrainerFn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'hdet.integrations.lightning needs Lightning: pip install "lightning>=2.6", or hdet[lightning]'
    ) from error
from torch import Tensor, nn

import hdet
from hdet.errors import check_callable, check_text, check_whole
from hdet.integrations.driven import Driven, Scheduler, build, check_given, with_rounds


class HDET(pl.Callback):
    """Builds an hdet scheduler when ``trainer.fit`` starts, steps it after every step of the optimizer, converges
    before validation, before saving and at the end, and is saved and resumed with the trainer's checkpoints.

    ``gain`` and base learning rate are logged by the module as ``hdet/gain`` and ``hdet/base_lr``. With accumulation
    the loss is the mean of a step's micro-batches; with manual optimization the mean of the losses passed to
    ``manual_backward`` since the last step of any optimizer.

    Where the trainer has a logger, ``rounds.jsonl`` in ``trainer.log_dir`` has a report of every round, and at the end
    ``report.html`` says what happened and why (:mod:`hdet.report`). With an :class:`hdet.JsonLines` among ``monitor=``
    both are where it writes.

    Args:
        scheduler: :class:`hdet.OneCycleLR`, or :class:`hdet.Ensemble`, whose base schedule is the one that
            ``configure_optimizers`` returns, with ``"interval": "step"``, or constant rates.
        args, settings: its arguments after the optimizer. ``model`` is the trainer's, and so is ``total_steps`` with
            automatic optimization, unless you pass it. ``probe=`` takes :func:`training_step`, a method of your class
            (``probe=MyModule.probe_loss``, called with the module and a batch), or a :class:`hdet.Probe` of either; it
            runs under the trainer's precision, and logs nothing. ``replicas=`` may be a function of the module, for a
            mesh that is made when the trainer starts. ``max_lr="auto"`` searches first, as :func:`hdet.find_lr` does.
        optimizer: index of the optimizer, where ``configure_optimizers`` returns several; one callback for each.
        submodule: name of the submodule that this optimizer trains, where several callbacks are used.

    Attributes:
        scheduler: the scheduler, from ``on_fit_start`` on.

    Raises:
        TypeError, ValueError: for a bad argument, here or when the trainer starts.
    """

    def __init__(
        self,
        scheduler: Callable[..., Scheduler] = hdet.Ensemble,
        *args: Any,
        optimizer: int = 0,
        submodule: str | None = None,
        **settings: Any,
    ) -> None:
        check_given("HDET", scheduler, settings, {"model": "the trainer's module; see submodule="})
        self._kind, self._args, self._settings = scheduler, args, settings
        self._index = check_whole("optimizer", optimizer, "the index of an optimizer, >= 0", lambda i: i >= 0)
        self._submodule = None if submodule is None else check_text("submodule", submodule)
        self._driven: Driven | None = None
        self._saved: Mapping[str, Any] | None = None
        self._batch: Any = None
        self._undo: list[Callable[[], object]] = []

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; an error before ``trainer.fit`` has built it."""
        if self._driven is None:
            raise RuntimeError("HDET has no scheduler yet: trainer.fit() builds it.")
        return self._driven.scheduler

    # ------------------------------------------------------------------------------------------- start, step, end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "HDET does not work with Lightning's DeepSpeedStrategy, which makes its engine without replica groups. "
                "Use DDP or ModelParallelStrategy (FSDP2), or hdet.integrations.deepspeed in a loop of your own."
            )
        if self._saved is None and self._driven is not None and trainer.global_step:
            self._saved = self._driven.state()  # this fit() goes on where the last one ended
        found = pl_module.optimizers(use_pl_optimizer=True)
        optimizers: list[Any] = list(found) if isinstance(found, (list, tuple)) else [found]
        if self._index >= len(optimizers):
            raise ValueError(
                f"Invalid optimizer={self._index}. Must be the index of one of the {len(optimizers)} optimizers that "
                "configure_optimizers returns."
            )
        bare = trainer.optimizers[self._index]
        settings = {**self._settings, "model": self._model(trainer, pl_module)}
        if callable(settings.get("replicas")):
            settings["replicas"] = settings["replicas"](pl_module)
        if settings.get("probe") is not None:
            settings["probe"] = _probe(settings["probe"], trainer, pl_module)
        several = f"rounds.{self._index}.jsonl" if len(optimizers) > 1 else "rounds.jsonl"
        settings, rounds = with_rounds(settings, _log_dir(trainer), several)
        steps, schedule = self._length(trainer, pl_module), self._take_schedule(trainer, pl_module, bare)
        built = build(self._kind, bare, self._args, settings, total_steps=steps, schedule=schedule)
        self._driven = Driven(built, rounds=rounds)
        for i, optimizer in enumerate(optimizers):
            self._replace(optimizer, "step", _after(optimizer.step, self._after_step, i == self._index))
        # Lightning collects the model, a sharded one as copies, before it asks callbacks for their state.
        self._replace(trainer, "save_checkpoint", _before(trainer.save_checkpoint, self._converge))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._driven is None:
            return
        if self._saved is not None:  # the optimizer's state has been restored by now
            self._driven.load(self._saved)
            self._saved = None
        elif trainer.global_step:
            raise ValueError(
                f"The checkpoint of step {trainer.global_step} has no state of HDET. Resume from one that was saved "
                "with HDET among the callbacks; or load the weights alone into the module, and pass no ckpt_path."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._driven is None:
            return
        own = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            own = own / scaler.get_scale()
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            own = own * trainer.accumulate_grad_batches  # Lightning has divided it
        self._driven.add(own)

    def _after_step(self, is_own: bool) -> None:
        if self._driven is None:
            return
        if is_own:
            self._driven.step(self._batch)
        else:
            self._driven.drop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        if self._driven is not None and not trainer.barebones:
            end = f"/{self._index}" if len(trainer.optimizers) > 1 else ""
            metrics = {f"{name}{end}": value for name, value in self._driven.metrics().items()}
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._converge()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._converge()
        if self._driven is not None:
            self._driven.tell()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()  # what is saved from here on is not averaged: another rank may not come to a converge

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._put_back()

    # ---------------------------------------------------------------------------------------------------- its state

    @property
    def state_key(self) -> str:
        return self._generate_state_key(optimizer=self._index)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._driven is None else self._driven.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    # --------------------------------------------------------------------------------------------------------- parts

    def _converge(self) -> None:
        if self._driven is not None:
            self._driven.converge()

    def _model(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module:
        if self._submodule is not None:
            try:
                return pl_module.get_submodule(self._submodule)
            except AttributeError as error:
                names = ", ".join(name for name, _ in pl_module.named_children())
                raise ValueError(
                    f"Invalid submodule={self._submodule!r}. Must be the name of a module in "
                    f"{type(pl_module).__name__}, which has {names}."
                ) from error
        assert trainer.strategy.model is not None
        return trainer.strategy.model

    def _length(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
        """Optimizer steps of the run, where the trainer knows."""
        if {"total_steps", "steps_per_epoch"} & set(self._settings) or (
            self._kind is hdet.OneCycleLR and len(self._args) > 1
        ):
            return None
        steps = trainer.estimated_stepping_batches if pl_module.automatic_optimization else None
        if steps is not None and math.isfinite(steps):
            return int(steps)
        if self._kind is hdet.OneCycleLR or self._settings.get("probe") is not None:
            why = "manual optimization takes" if steps is None else "a trainer without max_epochs and max_steps takes"
            raise ValueError(f"HDET cannot tell how many optimizer steps {why}. Pass total_steps= to HDET.")
        return None

    def _take_schedule(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> Any:
        """The scheduler of ``configure_optimizers``, which the trainer no longer steps from here on."""
        own = [c for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
        if not own:
            return None
        (config,) = own
        name = type(config.scheduler).__name__
        if self._kind is not hdet.Ensemble or "schedule" in self._settings or self._args:
            raise ValueError(
                f"configure_optimizers returns a {name}, and HDET was given a schedule, too. Leave one of them out."
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"configure_optimizers returns a {name}, which manual optimization steps by hand. Return the optimizer "
                "alone, and pass HDET(schedule=step -> factor): HDET steps it."
            )
        if config.interval != "step" or config.frequency != 1 or config.reduce_on_plateau:
            raise ValueError(
                f"configure_optimizers returns a {name} that is stepped every {config.frequency} {config.interval}. "
                'As the replicas\' base schedule it must be stepped with the optimizer: "interval": "step".'
            )
        configs = trainer.strategy.lr_scheduler_configs
        configs.remove(config)
        return config.scheduler

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object until the fit ends."""
        setattr(owner, name, value)
        self._undo.append(lambda: vars(owner).pop(name, None))

    def _put_back(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._batch = [], None


def training_step(model: pl.LightningModule, batch: Any) -> Tensor:
    """As a probe: the loss of the module's ``training_step``, without what it logs."""
    if not model.automatic_optimization:
        raise ValueError(
            f"{type(model).__name__}.training_step optimizes manually, so that it cannot be the probe's loss. Pass a "
            f"method that returns a loss: probe={type(model).__name__}.probe_loss."
        )
    given: Any = model.training_step(batch, 0)
    loss: Tensor = given["loss"] if isinstance(given, Mapping) else given
    return loss


def _log_dir(trainer: pl.Trainer) -> str | None:
    """The folder of the trainer's logger, if it has one. Collective."""
    is_trial = bool(getattr(trainer, "fast_dev_run", False))
    return trainer.log_dir if trainer.loggers and not is_trial else None


class _OnDevice:
    """Batches of a probe, moved to the trainer's device."""

    def __init__(self, batches: Iterable[Any], trainer: pl.Trainer) -> None:
        self._batches, self._trainer = batches, trainer

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield self._trainer.strategy.batch_to_device(batch)


def _probe(given: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> hdet.Probe:
    """The probe under the trainer's precision, with its batches on the trainer's device, logging nothing."""
    rule = "a function: loss_fn(module, batch) -> scalar loss"
    probe = given if isinstance(given, hdet.Probe) else hdet.Probe(loss_fn=check_callable("probe", given, rule))
    loss_fn, batches = probe.loss_fn, probe.batches

    def quiet(model: Any, batch: Any) -> Tensor | float:
        with trainer.precision_plugin.forward_context(), _silenced(pl_module):
            return loss_fn(model, batch)

    return replace(probe, loss_fn=quiet, batches=None if batches is None else _OnDevice(batches, trainer))


@contextlib.contextmanager
def _silenced(module: pl.LightningModule) -> Iterator[None]:
    """``self.log`` does nothing."""
    names = ("log", "log_dict")
    for name in names:
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]


def _after(step: Callable[..., Any], then: Callable[[bool], None], is_own: bool) -> Callable[..., Any]:
    def stepped(*args: Any, **keywords: Any) -> Any:
        result = step(*args, **keywords)
        then(is_own)
        return result

    return stepped


def _before(function: Callable[..., Any], first: Callable[[], None]) -> Callable[..., Any]:
    def called(*args: Any, **keywords: Any) -> Any:
        first()
        return function(*args, **keywords)

    return called
