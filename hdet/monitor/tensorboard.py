"""The TensorBoard monitor: the curves of a run, and the charts that show several of them."""

from __future__ import annotations

import atexit
import importlib
import math
import os
import re
import secrets
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hdet.errors import HdetError, check_list, check_number, check_path, check_text, check_whole, shown
from hdet.monitor.base import Settings, WriterMonitor, check_settings
from hdet.monitor.report import Report

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(WriterMonitor):
    r"""Writes every report to TensorBoard; ``pip install "hdet[tensorboard]"``.

    The step axis counts scheduler steps. ``<g>`` is the parameter group's name; with one group, "/<g>" is left out.

    ================================  =================================================================================
    ``hdet/schedule_lr/<g>``          the base schedule
    ``hdet/base_lr/<g>``              schedule x gain, the centre of the spread
    ``hdet/replica_lr/<g>/replica0``  schedule x gain x multiplier, of each replica
    ``hdet/gain/<g>``                 the gain from this converge on (``report.next_gain``)
    ``hdet/loss``                     mean training loss of the round
    ``hdet/replica_loss/replica0``    the same of each replica
    ``hdet/hypergradient/<g>``        > 0 where a larger learning rate did better
    ``hdet/velocity/<g>``             the controller's momentum
    ``hdet/movement/<g>``             how far the round took the weight matrices, relative to their size
    ``hdet/hyperparameter/<h>``       the centre of another hyperparameter from this converge on
    ``hdet/hyperparameter/…/effect``  the probe's loss one spread above its centre, less that at the centre
    ``hdet/probe/raw``                with a probe, its raw slope; likewise ``debiased`` and ``noise``
    ``hdet/rolled_back``              with rollback, 1 where the round was undone, else 0
    ``hdet/distance/replica0``        each replica's distance from their mean before averaging; ``hdet/distance``: mean
    ``hdet/excluded``                 number of replicas left out of the average; if any, the Text tab says which
    ``hdet/converge_ms``              time of the converge on the writer rank, in milliseconds
    ``hdet/converge_bytes``           bytes the writer rank sent in it
    ================================  =================================================================================

    Losses, hypergradient and velocity belong to a whole round: a converge inside a round does not write them. Unknown
    (NaN) values are not written. The Custom Scalars tab shows all replicas in one chart, the HParams tab compares runs.

    Give every run a directory of its own: a run that starts at step ``s`` hides what the directory has beyond ``s``,
    so that a resumed run continues its own curves.

    Args:
        log_dir: directory of the run, made when the run starts.
        hparams: further settings for the HParams tab, beside the run's own (``hdet/spread`` and so on).
        metrics: further tags to compare runs by in the HParams tab, such as ``"val/loss"``, beside loss and gain.
        max_replicas: the largest number of per-replica curves of one quantity (of ``replica_lr``: of all groups in
            all). With more, ``/min``, ``/median`` and ``/max`` over the replicas are written in their place.

    Raises:
        ImportError: if TensorBoard is not installed.
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        hparams: Settings | None = None,
        *,
        metrics: Sequence[str] = (),
        max_replicas: int = 64,
    ) -> None:
        self.log_dir = check_path("log_dir", log_dir)
        if os.path.isfile(self.log_dir):
            raise ValueError(f"Invalid log_dir={self.log_dir!r}. This is a file: name a directory.")
        check_settings("hparams", {} if hparams is None else hparams)
        rule = 'a sequence of tags, for example ("val/loss",)'
        tags = tuple(check_list("metrics", metrics, rule))
        if not all(isinstance(tag, str) for tag in tags):
            raise TypeError(f"Invalid metrics={shown(metrics)}. Must be {rule}.")
        max_replicas = check_whole("max_replicas", max_replicas, ">= 1", lambda replicas: replicas >= 1)
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ImportError(
                'hdet.TensorBoard needs the tensorboard package: pip install "hdet[tensorboard]".'
            ) from error
        self._hparams_given, self._metrics, self._max_replicas = dict(hparams or {}), tags, max_replicas
        self._settings: dict[str, bool | int | float | str] = {}
        self._pending: list[tuple[str, float, int]] = []
        self._events: SummaryWriter | None = None
        self._described = False

    def add_scalar(self, tag: str, value: float | Tensor, step: int) -> None:
        """Add a point to a curve of your own. On ranks other than the writer's ``value`` is not read.

        It is on disk after the next report or :meth:`close`. Points added before the run starts, at the first scheduler
        step, are kept until then.

        Raises:
            TypeError, ValueError: for a tag under ``hdet/``, a value that is no number, or a step that is no whole
                number >= 0.
            HdetError: after :meth:`close`.
        """
        check_text("tag", tag)
        step = check_whole("step", step, ">= 0", lambda step: step >= 0)
        if self._writer is not False:
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
                value = value.item()
            number = float(check_number("value", value, "or a tensor of one", finite=False))
        if tag.startswith("hdet/"):
            raise ValueError(f"Invalid {tag=}. Tags under hdet/ are hdet's own: choose another prefix.")
        if self._closed:
            raise HdetError(f"Cannot write {tag!r}: this TensorBoard was closed. Write before close().")
        if self._writer is not False:
            if self._events is None:  # before the start it is not known which rank writes, and which steps are void
                self._pending.append((tag, number, step))
            else:
                self._events.add_scalar(tag, number, step)

    def start(self, config: Settings, *, step: int, writer: bool) -> None:
        super().start(config, step=step, writer=writer)
        self._pending.clear()

    def _open(self, config: Settings, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._settings = {**{f"hdet/{name}": value for name, value in config.items()}, **self._hparams_given}
        # The file is opened through whatever stands under its name, which must not be predictable.
        suffix = f".{secrets.token_hex(8)}"
        self._events = SummaryWriter(self.log_dir, purge_step=step + 1, filename_suffix=suffix)
        self._described = False
        self._add_summary(self._hparams()[1])
        for tag, number, at in self._pending:
            self._events.add_scalar(tag, number, at)
        self._events.flush()
        # Without a close(), points added after the last report would be lost.
        atexit.register(self._events.flush)

    def _write(self, report: Report) -> None:
        assert self._events is not None
        if not self._described:
            self._described = True
            probe = bool(self._settings.get("hdet/probe"))
            self._events.add_custom_scalars(_layout(report, self._max_replicas, probe=probe))
            self._add_summary(self._hparams(report.groups)[0])
        for tag, value in _scalars(report, self._max_replicas):
            if not math.isnan(value):
                self._events.add_scalar(tag, value, report.step)
        if self._settings.get("hdet/rollback"):
            self._events.add_scalar("hdet/rolled_back", int(report.rolled_back), report.step)
        if report.excluded:
            names = ", ".join(map(str, report.excluded))
            when = f"Round {report.round}, step {report.step}"
            text = f"{when}: left out of the average (non-finite values): replica {names}."
            self._events.add_text("hdet/excluded", text, report.step)
        self._events.flush()

    def _close(self) -> None:
        assert self._events is not None
        # TensorBoard keeps the first end of a session that it reads: one written while an exception ends this process
        # would hide how the resumed run ends.
        if sys.exc_info()[0] is None:
            self._add_summary(self._hparams()[2])
        atexit.unregister(self._events.flush)
        self._events.close()
        self._events = None

    def _add_summary(self, summary: Any) -> None:
        # SummaryWriter.add_hparams would make another run, in a directory below this one.
        assert self._events is not None
        self._events._get_file_writer().add_summary(summary)

    def _hparams(self, groups: Sequence[str] = ("",)) -> tuple[Any, Any, Any]:
        """The HParams plugin's summaries: of the experiment (names and metrics), of the session's start and its end."""
        from torch.utils.tensorboard.summary import hparams

        # torch would write a bool as the number 0 or 1.
        settings = {name: str(value) if isinstance(value, bool) else value for name, value in self._settings.items()}
        tags = [*self._metrics, "hdet/loss", *(f"hdet/gain{end}" for end in _endings(groups))]
        return hparams(settings, dict.fromkeys(tags))


def _scalars(report: Report, limit: int) -> Iterator[tuple[str, float]]:
    """The curves of a report, NaN included."""
    summarised, summarised_lr = _is_summarised(report, limit)
    for g, end in enumerate(_endings(report.groups)):
        yield f"hdet/schedule_lr{end}", report.schedule_lr[g]
        yield f"hdet/base_lr{end}", report.base_lr[g]
        yield from _per_replica(f"hdet/replica_lr{end}", report.replica_lr[g], summarised_lr)
        yield f"hdet/gain{end}", report.next_gain[g]
        if report.complete:
            yield f"hdet/hypergradient{end}", report.hypergradient[g]
            yield f"hdet/velocity{end}", report.velocity[g]
            yield f"hdet/movement{end}", report.movement[g]
    if report.complete:
        yield "hdet/loss", report.mean_loss
        yield from _per_replica("hdet/replica_loss", report.losses, summarised)
    for h in report.hyperparameters:
        yield f"hdet/hyperparameter/{h.name}", h.next_centre
        yield f"hdet/hyperparameter/{h.name}/effect", h.effect
        yield from _per_replica(f"hdet/hyperparameter/{h.name}", h.values, summarised)
    for name, value in report.probe._asdict().items():
        yield f"hdet/probe/{name}", value
    finite = [distance for distance in report.distance if math.isfinite(distance)]
    yield "hdet/distance", statistics.fmean(finite) if finite else math.nan
    yield from _per_replica("hdet/distance", report.distance, summarised)
    yield "hdet/excluded", len(report.excluded)
    yield "hdet/converge_ms", report.converge_ms
    yield "hdet/converge_bytes", report.converge_bytes


def _per_replica(tag: str, values: Sequence[float], summarised: bool) -> Iterator[tuple[str, float]]:
    """The curves of [replica] ``values``."""
    if not summarised:
        for r, value in enumerate(values):
            yield f"{tag}/replica{r}", value
    elif known := [value for value in values if not math.isnan(value)]:
        yield f"{tag}/min", min(known)
        yield f"{tag}/median", statistics.median(known)
        yield f"{tag}/max", max(known)


def _is_summarised(report: Report, limit: int) -> tuple[bool, bool]:
    """Whether min, median and max are written instead of replicas: of losses and distances, and of learning rates."""
    return report.replicas > limit, report.replicas * len(report.groups) > limit


def _endings(groups: Sequence[str]) -> list[str]:
    """[g] ends of tags."""
    return [f"/{name}" for name in groups] if len(groups) > 1 else [""]


def _layout(report: Report, limit: int, *, probe: bool) -> dict[str, dict[str, list[Any]]]:
    """The Custom Scalars tab, in the form that ``SummaryWriter.add_custom_scalars`` takes."""

    def replicas(tag: str, summarised: bool) -> list[Any]:
        if summarised:
            return ["Margin", [f"{tag}/median", f"{tag}/min", f"{tag}/max"]]
        return ["Multiline", [f"^{re.escape(tag)}/replica\\d+$"]]

    def groups(*quantities: str) -> list[Any]:
        tags = (f"hdet/{quantity}{end}" for end in _endings(report.groups) for quantity in quantities)
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]

    summarised, summarised_lr = _is_summarised(report, limit)
    rates = {
        f"learning rate{end.replace('/', ': ', 1)}": replicas(f"hdet/replica_lr{end}", summarised_lr)
        for end in _endings(report.groups)
    }
    probed = {
        "probe: slopes": ["Multiline", ["^hdet/probe/raw$", "^hdet/probe/debiased$"]],
        "probe: noise": ["Multiline", ["^hdet/probe/noise$"]],
    }
    return {
        "hdet: replicas": {
            "training loss": replicas("hdet/replica_loss", summarised),
            **rates,
            "distance from the mean": replicas("hdet/distance", summarised),
        },
        "hdet: controller": {
            "gain": groups("gain"),
            "hypergradient": groups("hypergradient"),
            "velocity": groups("velocity"),
            "movement": groups("movement"),
            "base schedule with and without gain": groups("base_lr", "schedule_lr"),
            **(probed if probe else {}),
        },
    }
