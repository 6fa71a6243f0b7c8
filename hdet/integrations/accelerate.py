"""accelerate: a prepared optimizer's learning rates become the replicas'.

::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = attach(accelerator, hdet.OneCycleLR, optimizer, max_lr=9e-4, total_steps=S, model=model, spread=1 / 9)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            optimizer.step(); scheduler.step(loss); optimizer.zero_grad()
    scheduler.converge()                                    # before evaluating

``docs/guides/accelerate.md`` has the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

try:
    from accelerate import Accelerator
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'hdet.integrations.accelerate needs accelerate: pip install "accelerate>=1.15", or hdet[accelerate]'
    ) from error
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

import hdet
from hdet.errors import check_instance
from hdet.integrations.driven import Driven, Scheduler, build, check_given
from hdet.monitor import Report


def attach(
    accelerator: Accelerator, scheduler: Callable[..., Scheduler], optimizer: Any, *args: Any, **settings: Any
) -> AcceleratorScheduler:
    """Build an hdet scheduler on what ``accelerator.prepare`` has returned. Not collective.

    It is registered for checkpointing: ``accelerator.save_state`` and ``save_model`` converge first, ``load_state``
    loads it. Call it before ``load_state``.

    Args:
        accelerator: whose processes are the replicas.
        scheduler: :class:`hdet.OneCycleLR` or :class:`hdet.Ensemble`. The ``schedule=`` of an Ensemble may be a
            prepared one, which accelerate would step once for each process: it is stepped as often.
        optimizer: as prepared.
        args, settings: the scheduler's arguments after the optimizer; ``model=`` as prepared. ``total_steps`` counts
            steps of the optimizer.

    Raises:
        TypeError, ValueError: for a bad argument, something that was not prepared, or DeepSpeed.
    """
    check_instance("accelerator", accelerator, Accelerator, "an accelerate.Accelerator")
    check_given("attach", scheduler, settings, {})
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "attach() does not work with accelerate under DeepSpeed, whose engine it makes without replica groups. Use "
            "DDP or FSDP2, or hdet.integrations.deepspeed with deepspeed.initialize()."
        )
    if not any(optimizer is one for one in accelerator._optimizers):
        raise ValueError(
            f"attach() got a {type(optimizer).__name__} that accelerator.prepare() has not returned. Prepare model and "
            "optimizer first, and pass what comes back."
        )
    schedule = settings.get("schedule")
    if isinstance(schedule, AcceleratedScheduler):
        inner, each = schedule.scheduler, 1
        if schedule.step_with_optimizer and not schedule.split_batches:
            each = accelerator.num_processes
        settings["schedule"] = inner if each == 1 else _SeveralSteps(inner, each)
    made = AcceleratorScheduler(accelerator, build(scheduler, optimizer, args, settings, total_steps=None))
    accelerator.register_for_checkpointing(made)
    for name in ("save_state", "save_model"):
        setattr(accelerator, name, _after_converging(getattr(accelerator, name), made))
    return made


class AcceleratorScheduler:
    """An hdet scheduler in a loop that accelerate drives.

    Args:
        accelerator: says which steps of the loop are steps of the optimizer.
        scheduler: hdet's.
    """

    def __init__(self, accelerator: Accelerator, scheduler: Scheduler) -> None:
        self._accelerator, self._driven = accelerator, Driven(scheduler)

    @property
    def scheduler(self) -> Scheduler:
        """hdet's scheduler."""
        return self._driven.scheduler

    @property
    def ensemble(self) -> hdet.Ensemble:
        """The ensemble; as :attr:`hdet.OneCycleLR.ensemble`."""
        return self.scheduler if isinstance(self.scheduler, hdet.Ensemble) else self.scheduler.ensemble

    def step(self, loss: Tensor | float | None = None, *, batch: Any = None) -> None:
        """Call after every ``optimizer.step()``, with the loss that was passed to ``accelerator.backward``. While
        gradients accumulate (``accelerator.sync_gradients`` is false) the loss is kept, and nothing else is done."""
        self._driven.add(loss)
        if self._accelerator.sync_gradients:
            self._driven.step(batch)

    def converge(self) -> Report | None:
        """Average now, before evaluating; see :meth:`hdet.Ensemble.converge`. Collective."""
        return self.scheduler.converge()

    def close(self) -> None:
        """Converge, and hand model and optimizer back; see :meth:`hdet.Ensemble.close`. Collective."""
        self.scheduler.close()

    def get_last_lr(self) -> list[float | Tensor]:
        """This replica's learning rates, by parameter group."""
        return self.scheduler.get_last_lr()

    def metrics(self) -> dict[str, float]:
        """``hdet/gain`` and ``hdet/base_lr``, for ``accelerator.log``: the same on every rank."""
        return self._driven.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state. Collective if the model is sharded."""
        return self._driven.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._driven.load(state_dict)


class _SeveralSteps(LRScheduler):
    """A schedule that accelerate steps once for each process: so many of its steps at every step.

    Args:
        schedule: torch's.
        each: its steps to one of the optimizer.
    """

    def __init__(self, schedule: Any, each: int) -> None:
        self.optimizer = schedule.optimizer
        self._schedulers = [schedule]
        self._each = each

    @property
    def _inner(self) -> Any:
        return self._schedulers[0]

    def step(self, epoch: int | None = None) -> None:
        """As accelerate does, not beyond the end of a schedule that has one."""
        inner = self._inner
        for _ in range(self._each):
            if inner._step_count <= getattr(inner, "total_steps", inner._step_count):
                inner.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """The inner one's."""
        rates: list[float | Tensor] = self._inner.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """The inner one's, where a SequentialLR has those of its parts."""
        return {"_schedulers": [self._inner.state_dict()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner one."""
        self._inner.load_state_dict(state_dict["_schedulers"][0])


def _after_converging(save: Callable[..., Any], scheduler: AcceleratorScheduler) -> Callable[..., Any]:
    def saved(*args: Any, **keywords: Any) -> Any:
        scheduler._driven.converge()
        return save(*args, **keywords)

    return saved
