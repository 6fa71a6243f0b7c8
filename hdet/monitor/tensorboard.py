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
from hdet.monitor import story
from hdet.monitor.base import Settings, WriterMonitor, check_settings
from hdet.monitor.report import Report

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(WriterMonitor):
    r"""Writes every report to TensorBoard; ``pip install "hdet[tensorboard]"``.

    The step axis counts scheduler steps. Where parameter groups differ in a quantity, each has a curve of its own,
    whose tag ends in "/<group>"; where they share it, there is one.

    =================================== ==============================================================================
    ``hdet/base_lr``                    schedule x gain, the centre of the spread
    ``hdet/gain``                       the gain from this converge on (``report.next_gain``); ``gain_log10``: its log
    ``hdet/loss``                       mean training loss of the round
    ``hdet/rolled_back``                with rollback, 1 where the round was undone, else 0
    ``hdet/rolled_back_lr``             the base learning rate of a round that was undone; no other points
    ``hdet/schedule_lr``                the base schedule
    ``hdet_evidence/centre_log10``      the gain at which the weights would move as they should, as a log
    ``hdet_evidence/estimate_log10``    the estimate of the right gain, as a log
    ``hdet_evidence/movement``          how far the round took the weight matrices, relative to their size
    ``hdet_evidence/target``            how far it should have taken them
    ``hdet_evidence/probe_log10``       the gain that the probe argues for, as a log
    ``hdet_evidence/trust``             probability that the user's learning rate is right
    ``hdet_evidence/hypergradient``     > 0 where a larger learning rate did better
    ``hdet_evidence/velocity``          the published controller's momentum
    ``hdet_evidence/probe/raw``         with a probe, its raw slope; likewise ``debiased`` and ``noise``
    ``hdet_hyperparameter/<h>``         the centre of another hyperparameter from this converge on
    ``hdet_hyperparameter/<h>/effect``  the probe's loss one spread above its centre, less that at the centre
    ``hdet_replicas/loss/replica0``     mean training loss of each replica
    ``hdet_replicas/lr/replica0``       schedule x gain x multiplier, of each replica
    ``hdet_replicas/distance/replica0`` each replica's distance from their mean before averaging
    ``hdet_replicas/mean_distance``     its mean
    ``hdet_replicas/excluded``          number of replicas left out of the average; if any, the Text tab says which
    ``hdet_speed/converge_ms``           time of the converge on the writer rank, in milliseconds
    ``hdet_speed/converge_bytes``        bytes the writer rank sent in it
    =================================== ==============================================================================

    Losses and evidence belong to a whole round: a converge inside a round does not write them. Unknown (NaN) values are
    not written. The Text tab says in words what happened (:mod:`hdet.monitor.story`). The Custom Scalars tab begins
    with five charts: learning rate, loss, evidence, replicas, cost. The HParams tab compares runs by what users vary.

    Give every run a directory of its own: a run that starts at step ``s`` hides what the directory has beyond ``s``,
    so that a resumed run continues its own curves.

    Args:
        log_dir: directory of the run, made when the run starts.
        hparams: further settings for the HParams tab, beside the run's own (``hdet/spread`` and so on).
        metrics: further tags to compare runs by in the HParams tab, such as ``"val/loss"``, beside loss and gain. The
            chart of the loss has them, too.
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
        self._config: dict[str, bool | int | float | str] = {}
        self._pending: list[tuple[str, float, int]] = []
        self._events: SummaryWriter | None = None
        self._described = False
        self._ends = _Ends(per_group=False)
        self._told: list[Report] = []
        self._tell_at = 1

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
        if tag.startswith(("hdet/", "hdet_")):
            raise ValueError(f"Invalid {tag=}. Tags under hdet/ and hdet_ are hdet's own: choose another prefix.")
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

        self._config = dict(config)
        varied = {f"hdet/{name}": config[key] for name, key in _VARIED.items() if _is_known(config.get(key, math.nan))}
        self._settings = {**varied, **self._hparams_given}
        self._ends = _Ends(per_group=bool(config.get("per_group")))
        self._told, self._tell_at = [], 1
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
        self._ends.look(report)
        if not self._described:
            self._described = True
            self._events.add_custom_scalars(self._layout(report))
            self._add_summary(self._hparams(self._ends.of_gains(report))[0])
        for tag, value in _scalars(report, self._max_replicas, self._ends):
            if not math.isnan(value):
                self._events.add_scalar(tag, value, report.step)
        if self._config.get("rollback"):
            self._events.add_scalar("hdet/rolled_back", int(report.rolled_back), report.step)
        if report.excluded:
            names = ", ".join(map(str, report.excluded))
            when = f"Round {report.round}, step {report.step}"
            text = f"{when}: left out of the average (non-finite values): replica {names}."
            self._events.add_text("hdet/excluded", text, report.step)
        self._tell(report)
        self._events.flush()

    def _tell(self, report: Report) -> None:
        """Write the story so far at events, and whenever there are a quarter more rounds than in the last one."""
        is_event = report.rolled_back or bool(report.excluded)
        if report.complete or is_event:
            self._told.append(report if not self._told else story.slim(report))
        if is_event or len(self._told) >= self._tell_at:
            self._tell_at = len(self._told) + 1 + len(self._told) // 4
            self._add_story()

    def _add_story(self) -> None:
        assert self._events is not None
        if self._told:
            text = "\n".join(f"- {sentence}" for sentence in story.sentences(self._told))
            self._events.add_text("hdet/story", text, self._told[-1].step)

    def _close(self) -> None:
        assert self._events is not None
        # TensorBoard keeps the first end of a session that it reads: one written while an exception ends this process
        # would hide how the resumed run ends.
        if sys.exc_info()[0] is None:
            self._add_summary(self._hparams()[2])
        self._add_story()
        atexit.unregister(self._events.flush)
        self._events.close()
        self._events = None

    def _add_summary(self, summary: Any) -> None:
        # SummaryWriter.add_hparams would make another run, in a directory below this one.
        assert self._events is not None
        self._events._get_file_writer().add_summary(summary)

    def _hparams(self, ends: Sequence[str] = ("",)) -> tuple[Any, Any, Any]:
        """The HParams plugin's summaries: of the experiment (names and metrics), of the session's start and its end."""
        from torch.utils.tensorboard.summary import hparams

        # torch would write a bool as the number 0 or 1.
        settings = {name: str(value) if isinstance(value, bool) else value for name, value in self._settings.items()}
        tags = [*self._metrics, "hdet/loss", *(f"hdet/gain{end}" for end in ends)]
        return hparams(settings, dict.fromkeys(tags))

    def _layout(self, report: Report) -> dict[str, dict[str, list[Any]]]:
        """The Custom Scalars tab, in the form that ``SummaryWriter.add_custom_scalars`` takes."""

        def lines(*tags: str) -> list[Any]:
            return ["Multiline", [f"^{re.escape(tag)}(/.*)?$" for tag in tags]]

        def replicas(tag: str, summarised: bool) -> list[Any]:
            if summarised:
                return ["Margin", [f"{tag}/median", f"{tag}/min", f"{tag}/max"]]
            return ["Multiline", [f"^{re.escape(tag)}/replica\\d+$"]]

        summarised, summarised_lr = _is_summarised(report, self._max_replicas)
        judges = self._config.get("auto_lr") and "controller.memory" in self._config  # it is Posterior
        probed = ["hdet_evidence/probe_log10"] if self._config.get("probe") else []
        judged = ["hdet_evidence/centre_log10", *probed, "hdet_evidence/estimate_log10"] if judges else []
        metrics = [f"^{re.escape(tag)}$" for tag in self._metrics]
        undone = ("hdet/rolled_back_lr",) if self._config.get("rollback") else ()
        glance = {
            "learning rate": lines("hdet/base_lr", "hdet/schedule_lr", *undone),
            "loss": ["Multiline", ["^hdet/loss$", *metrics]],
            "evidence: log10 of the gain": lines("hdet/gain_log10", *judged),
            "replicas: training loss": replicas("hdet_replicas/loss", summarised),
            "cost: ms per converge": lines("hdet_speed/converge_ms"),
        }
        details = {
            "movement": lines("hdet_evidence/movement", *(("hdet_evidence/target",) if judges else ())),
            **({"trust": lines("hdet_evidence/trust")} if judges else {}),
            "hypergradient": lines("hdet_evidence/hypergradient"),
            **({} if judges else {"velocity": lines("hdet_evidence/velocity")}),
            **{
                f"replicas: learning rate{end.replace('/', ': ', 1)}": replicas(f"hdet_replicas/lr{end}", summarised_lr)
                for end in self._ends.of_rates(report)
            },
            "replicas: distance from the mean": replicas("hdet_replicas/distance", summarised),
        }
        if self._config.get("probe"):
            details["probe: slopes"] = lines("hdet_evidence/probe/raw", "hdet_evidence/probe/debiased")
            details["probe: noise"] = lines("hdet_evidence/probe/noise")
        return {"hdet": glance, "hdet: details": details}


_VARIED = {"auto_lr": "auto_lr", "max_lr": "peak_lr", "probe": "probe", "schedule": "schedule", "spread": "spread"}
"""What users vary from run to run, under its name in the HParams tab, which shows the first five names at once."""


def _is_known(value: bool | int | float | str) -> bool:
    return not (isinstance(value, float) and math.isnan(value))


class _Ends:
    """Ends of tags: one curve where parameter groups share a quantity.

    Args:
        per_group: whether each has a gain of its own.
    """

    def __init__(self, *, per_group: bool) -> None:
        self._per_group, self._differ = per_group, False

    def look(self, report: Report) -> None:
        """Groups whose learning rates have differed once are told apart from then on."""
        self._differ = self._differ or len({*report.schedule_lr}) > 1 or len({*report.gain}) > 1

    def of_gains(self, report: Report) -> list[str]:
        """[g] of quantities of the controller; one, empty, where groups share them."""
        return self._of(report, self._per_group)

    def of_rates(self, report: Report) -> list[str]:
        """[g] of learning rates."""
        return self._of(report, self._differ or self._per_group)

    @staticmethod
    def _of(report: Report, differ: bool) -> list[str]:
        return [f"/{name}" for name in report.groups] if differ and len(report.groups) > 1 else [""]


def _scalars(report: Report, limit: int, ends: _Ends) -> Iterator[tuple[str, float]]:
    """The curves of a report, NaN included."""
    summarised, summarised_lr = _is_summarised(report, limit)
    for g, end in enumerate(ends.of_rates(report)):
        yield f"hdet/base_lr{end}", report.base_lr[g]
        yield f"hdet/schedule_lr{end}", report.schedule_lr[g]
        yield f"hdet/rolled_back_lr{end}", report.base_lr[g] if report.rolled_back else math.nan
        yield from _per_replica(f"hdet_replicas/lr{end}", report.replica_lr[g], summarised_lr)
    for g, end in enumerate(ends.of_gains(report)):
        yield f"hdet/gain{end}", report.next_gain[g]
        yield f"hdet/gain_log10{end}", _log10(report.next_gain[g])
        if report.complete:
            yield f"hdet_evidence/hypergradient{end}", report.hypergradient[g]
            yield f"hdet_evidence/velocity{end}", report.velocity[g]
            yield f"hdet_evidence/movement{end}", report.movement[g]
            for judged in report.judgements[g : g + 1]:
                yield f"hdet_evidence/target{end}", judged.target
                yield f"hdet_evidence/trust{end}", judged.trust
                yield f"hdet_evidence/centre_log10{end}", _log10(judged.centre)
                yield f"hdet_evidence/probe_log10{end}", _log10(judged.evidence)
                yield f"hdet_evidence/estimate_log10{end}", _log10(judged.estimate)
    if report.complete:
        yield "hdet/loss", report.mean_loss
        yield from _per_replica("hdet_replicas/loss", report.losses, summarised)
    for h in report.hyperparameters:
        yield f"hdet_hyperparameter/{h.name}", h.next_centre
        yield f"hdet_hyperparameter/{h.name}/effect", h.effect
        yield from _per_replica(f"hdet_hyperparameter/{h.name}", h.values, summarised)
    for name, value in report.probe._asdict().items():
        yield f"hdet_evidence/probe/{name}", value
    finite = [distance for distance in report.distance if math.isfinite(distance)]
    yield "hdet_replicas/mean_distance", statistics.fmean(finite) if finite else math.nan
    yield from _per_replica("hdet_replicas/distance", report.distance, summarised)
    yield "hdet_replicas/excluded", len(report.excluded)
    yield "hdet_speed/converge_ms", report.converge_ms
    yield "hdet_speed/converge_bytes", report.converge_bytes


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


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
