"""Monitors: what is written is what was reported, on the writer rank only, and TensorBoard itself can read it."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.summary.writer import event_file_writer

from hdet.monitor import story
from hdet.monitor.base import Callback, JsonLines, Monitor, as_monitors, read_jsonl
from hdet.monitor.report import Report, report_of
from hdet.monitor.tensorboard import TensorBoard
from hdet.observe.slopes import Slopes
from hdet.steer.report import HyperparameterReport, Judgement

UNKNOWN = Slopes(*(math.nan,) * 3)
CONFIG = {
    "spread": 0.5, "converge_every": 10, "auto_lr": True, "schedule": "OneCycleLR", "schedule_lr.0": 4e-5,
    "peak_lr": 0.1, "controller.memory": 0.5,
}  # fmt: skip


def make_report(step: int = 10, *, replicas: int = 3, groups: tuple[str, ...] = ("0",), **changes: object) -> Report:
    """A report in which no two numbers are equal, so that a mix-up shows."""
    each_group, each_replica = range(len(groups)), range(replicas)
    fields = {
        "step": step,
        "round": step // 10 - 1,
        "complete": True,
        "replicas": replicas,
        "groups": groups,
        "schedule_lr": tuple(1e-3 * (step + g) for g in each_group),
        "gain": tuple(0.7 + g for g in each_group),
        "base_lr": tuple(2e-3 * (step + g) for g in each_group),
        "replica_lr": tuple(tuple(3e-3 * (step + g) + 1e-5 * r for r in each_replica) for g in each_group),
        "losses": tuple(2.1 + r / 7 + step / 1000 for r in each_replica),
        "mean_loss": 2.3 + step / 1000,
        "hypergradient": tuple(0.01 + g / 3 for g in each_group),
        "movement": tuple(0.12 + g / 3 for g in each_group),
        "velocity": tuple(-0.02 - g / 3 for g in each_group),
        "next_gain": tuple(0.8 + g for g in each_group),
        "distance": tuple(5.0 + r / 3 for r in each_replica),
        "excluded": (),
        "probe": UNKNOWN,
        "rolled_back": False,
        "judgements": tuple(
            Judgement(0.13 + g, 1.7 + g, 1.8 + g if "probe" in changes else math.nan, 1.9 + g, 0.2 + g / 9, False)
            for g in each_group
        ),
        "peak_lr": 0.1,
        "converge_ms": 12.3,
        "converge_bytes": 4096,
        "writer": True,
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(directory)
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def layout(directory: Path) -> dict[str, dict[str, object]]:
    (event,) = read(directory).Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {category.title: {chart.title: chart for chart in category.chart} for category in parsed.category}


def write_in(directory: Path, *reports: Report) -> Path:
    write(directory, *reports)
    return directory


def write(
    directory: Path,
    *reports: Report,
    step: int = 0,
    writer: bool = True,
    config: dict[str, bool | int | float | str] | None = None,
    **arguments: object,
) -> TensorBoard:
    board = TensorBoard(directory, **arguments)  # type: ignore[arg-type]
    board.start(config or CONFIG, step=step, writer=writer)
    for report in reports:
        board.report(report)
    board.close()
    return board


@pytest.fixture(autouse=True)
def few_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one process and second are told apart by a counter, and "10" sorts before "9"."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


class TestAsMonitors:
    def test_accepts_none_a_monitor_a_function_and_iterables_of_these(self) -> None:
        monitor = Monitor()
        assert as_monitors(None) == ()
        assert as_monitors(monitor) == (monitor,)
        (callback,) = as_monitors(print)
        assert isinstance(callback, Callback)
        first, second = as_monitors(item for item in [monitor, None, print])
        assert first is monitor
        assert isinstance(second, Callback)
        assert as_monitors([]) == ()

    @pytest.mark.parametrize("value", [3, "runs/x", {"a": print}, [print, 3], b"runs"])
    def test_names_what_it_cannot_use(self, value: object) -> None:
        named = 3 if isinstance(value, list) else value
        with pytest.raises(
            TypeError, match=re.escape(f"Invalid monitor={named!r}. Must be None, an hdet.monitor.Monitor")
        ):
            as_monitors(value)

    def test_a_class_in_place_of_an_instance(self) -> None:
        with pytest.raises(TypeError, match=r"pass an instance, TensorBoard\(\.\.\.\)"):
            as_monitors(TensorBoard)


class TestCallback:
    def test_sees_every_report_whether_or_not_this_rank_writes(self) -> None:
        seen: list[Report] = []
        (callback,) = as_monitors(seen.append)
        callback.start(CONFIG, step=0, writer=False)
        reports = [make_report(10), make_report(20, writer=False)]
        for report in reports:
            callback.report(report)
        callback.close()
        assert seen == reports

    def test_raises_what_the_function_raises(self) -> None:
        def stop(report: Report) -> None:
            raise KeyError(report.step)

        with pytest.raises(KeyError):
            Callback(stop).report(make_report())

    def test_needs_a_function(self) -> None:
        with pytest.raises(TypeError, match="Invalid function=3"):
            Callback(3)  # type: ignore[arg-type]


def test_the_base_class_does_nothing() -> None:
    monitor = Monitor()
    monitor.start(CONFIG, step=0, writer=True)
    monitor.report(make_report())
    monitor.close()


class TestLifeCycle:
    """What the monitors that write files have in common."""

    @pytest.fixture(params=["tensorboard", "jsonl"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        return tmp_path / "runs" / ("x" if request.param == "tensorboard" else "x.jsonl")

    @staticmethod
    def make(path: Path) -> TensorBoard | JsonLines:
        return JsonLines(path) if path.suffix else TensorBoard(path)

    def test_no_file_before_the_start(self, path: Path) -> None:
        self.make(path)
        assert not path.parent.exists()

    def test_nothing_is_written_off_the_writer_rank(self, path: Path) -> None:
        monitor = self.make(path)
        monitor.start(CONFIG, step=0, writer=False)
        monitor.report(make_report(writer=False))
        monitor.close()
        assert not path.parent.exists()

    @pytest.mark.parametrize("writer", [True, False])
    def test_misuse_raises_on_every_rank(self, path: Path, writer: bool) -> None:
        monitor = self.make(path)
        with pytest.raises(RuntimeError, match=r"before start\(\)"):
            monitor.report(make_report(writer=writer))
        with pytest.raises(TypeError, match=re.escape("Invalid config['bounds']=(1, 2)")):
            monitor.start({"bounds": (1, 2)}, step=0, writer=writer)  # type: ignore[dict-item]
        monitor.start(CONFIG, step=0, writer=writer)
        with pytest.raises(RuntimeError, match="a monitor of its own"):
            monitor.start(CONFIG, step=0, writer=writer)
        monitor.close()
        monitor.close()
        with pytest.raises(RuntimeError, match=r"after close\(\)"):
            monitor.report(make_report(writer=writer))

    def test_can_start_again_after_close(self, path: Path) -> None:
        monitor = self.make(path)
        for step in (0, 10):
            monitor.start(CONFIG, step=step, writer=True)
            monitor.report(make_report(step + 10))
            monitor.close()
        steps = [r["step"] for r in read_jsonl(path)] if path.suffix else [s for s, _ in curves(path)["hdet/loss"]]
        assert steps == [10, 20]

    def test_a_report_is_on_disk_before_close(self, path: Path) -> None:
        monitor = self.make(path)
        monitor.start(CONFIG, step=0, writer=True)
        monitor.report(make_report())
        found = len(read_jsonl(path)) if path.suffix else len(curves(path)["hdet_speed/converge_bytes"])
        monitor.close()
        assert found == 1

    @pytest.mark.parametrize("bad", [3, None, ""])
    def test_bad_paths(self, path: Path, bad: object) -> None:
        with pytest.raises((TypeError, ValueError), match=f"={bad!r}"):
            (JsonLines if path.suffix else TensorBoard)(bad)  # type: ignore[arg-type]

    def test_a_path_that_is_taken(self, path: Path) -> None:
        if path.suffix:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir()
            path.touch()
        with pytest.raises(ValueError, match=re.escape(str(path))):
            self.make(path)


class TestJsonLines:
    def test_lines_are_strict_json_and_equal_the_reports(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "rounds.jsonl"
        monitor = JsonLines(path)
        monitor.start(CONFIG, step=0, writer=True)
        reports = [
            make_report(10, groups=("body", "head")),
            make_report(20, losses=(math.nan, math.inf, 2.0), mean_loss=2.0, excluded=(0, 1)),
        ]
        for report in reports:
            monitor.report(report)
        monitor.close()

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
        assert lines[0] == {"config": CONFIG, "step": 0}
        unknown = {"probe": {"raw": None, "debiased": None, "noise": None}}
        no_evidence = {"evidence": None}
        judged = [
            {"judgements": [judged._asdict() | no_evidence for judged in report.judgements]} for report in reports
        ]
        assert lines[1] == json.loads(json.dumps(dataclasses.asdict(reports[0]) | unknown | judged[0]))
        expected = dataclasses.asdict(reports[1]) | {"losses": (None, None, 2.0)} | unknown | judged[1]
        assert lines[2] == json.loads(json.dumps(expected))
        assert lines[1:] == read_jsonl(path)

    def test_probe_and_rollback(self, tmp_path: Path) -> None:
        path = tmp_path / "rounds.jsonl"
        monitor = JsonLines(path)
        monitor.start(CONFIG, step=0, writer=True)
        monitor.report(make_report(10, probe=Slopes(0.25, math.nan, math.inf)))
        monitor.report(make_report(20, rolled_back=True, hypergradient=(-math.inf,)))
        first, second = read_jsonl(path)
        assert first["probe"] == {"raw": 0.25, "debiased": None, "noise": None}
        assert first["rolled_back"] is False
        assert (second["probe"]["raw"], second["rolled_back"], second["hypergradient"]) == (None, True, [None])
        assert set(first) == {field.name for field in dataclasses.fields(Report)}

    def test_a_line_is_read_back_as_the_report(self, tmp_path: Path) -> None:
        path = tmp_path / "rounds.jsonl"
        decay = HyperparameterReport(
            name="decay", centre=0.1, values=(0.1, 0.2, 0.3), effect=1.0, error=0.5, next_centre=0.2
        )
        reports = [
            make_report(10, groups=("body", "head"), probe=Slopes(0.1, 0.2, 0.3), hyperparameters=(decay,)),
            make_report(20, rolled_back=True, cause="the loss", excluded=(0, 2), nonfinite=("buffers",)),
        ]
        monitor = JsonLines(path)
        monitor.start(CONFIG, step=0, writer=True)
        for report in reports:
            monitor.report(report)
        first, second = (report_of(record) for record in read_jsonl(path))
        assert first == reports[0]
        assert second == dataclasses.replace(reports[1], probe=second.probe)
        assert all(math.isnan(slope) for slope in second.probe)

    @staticmethod
    def line(directory: Path) -> dict[str, object]:
        monitor = JsonLines(directory / "rounds.jsonl")
        monitor.start(CONFIG, step=0, writer=True)
        monitor.report(make_report())
        (record,) = read_jsonl(directory / "rounds.jsonl")
        return record

    def test_a_line_of_a_version_that_explained_nothing(self, tmp_path: Path) -> None:
        record = self.line(tmp_path)
        for name in ("cause", "judgements", "peak_lr"):
            del record[name]
        found = report_of(record)
        assert (found.cause, found.judgements) == ("", ())
        assert math.isnan(found.peak_lr)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gain": None}, "its gain cannot be None"),
            ({"gain": ["<b>"]}, "its gain cannot be ['<b>']"),
            ({"gain": [1.0, 2.0]}, "its gain has 2 values for 1 parameter groups"),
            ({"rolled_back": 1}, "its rolled_back cannot be 1"),
            ({"round": 1.5}, "its round cannot be 1.5"),
            ({"losses": [1.0]}, "it has 1 parameter groups, and 1 losses of 3 replicas"),
            ({"groups": [3]}, "its groups cannot be [3]"),
            ({"probe": [1]}, "its probe cannot be [1]"),
            ({"judgements": [{"target": 1}]}, "its judgements cannot be [{'target': 1}]"),
            ({"converge_ms": 10**400}, "its converge_ms cannot be 1000"),
        ],
    )
    def test_a_line_that_is_none(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        record = self.line(tmp_path)
        with pytest.raises(ValueError, match=re.escape(message)):
            report_of({**record, **change})
        del record["gain"]
        with pytest.raises(ValueError, match="it has no gain"):
            report_of(record)

    def test_a_resumed_run_appends_and_the_steps_it_repeats_replace_the_old_ones(self, tmp_path: Path) -> None:
        path = tmp_path / "rounds.jsonl"
        for start, steps, loss in ((0, (10, 20, 30), 1.0), (20, (30, 40), 2.0)):
            monitor = JsonLines(path)
            monitor.start(CONFIG, step=start, writer=True)
            for step in steps:
                monitor.report(make_report(step, mean_loss=loss))
        assert len(path.read_text().splitlines()) == 7
        assert [(r["step"], r["mean_loss"]) for r in read_jsonl(path)] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]

    def test_a_line_cut_short_by_a_crash_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "rounds.jsonl"
        for start in (0, 10):
            monitor = JsonLines(path)
            monitor.start(CONFIG, step=start, writer=True)
            monitor.report(make_report(start + 10))
            with path.open("a") as file:
                file.write('{"step": 9')
        assert [report["step"] for report in read_jsonl(path)] == [10, 20]


class TestTensorBoard:
    def test_every_curve_equals_the_reports(self, tmp_path: Path) -> None:
        reports = [make_report(10), make_report(20, excluded=(0, 2))]
        write(tmp_path, *reports)
        expected = {
            "hdet/schedule_lr": [r.schedule_lr[0] for r in reports],
            "hdet/base_lr": [r.base_lr[0] for r in reports],
            "hdet/gain": [r.next_gain[0] for r in reports],
            "hdet/gain_log10": [math.log10(r.next_gain[0]) for r in reports],
            "hdet/loss": [r.mean_loss for r in reports],
            "hdet_evidence/hypergradient": [r.hypergradient[0] for r in reports],
            "hdet_evidence/velocity": [r.velocity[0] for r in reports],
            "hdet_evidence/movement": [r.movement[0] for r in reports],
            "hdet_evidence/target": [0.13, 0.13],
            "hdet_evidence/centre_log10": [math.log10(1.7)] * 2,
            "hdet_evidence/estimate_log10": [math.log10(1.9)] * 2,
            "hdet_evidence/trust": [0.2, 0.2],
            "hdet_replicas/mean_distance": [math.fsum(r.distance) / 3 for r in reports],
            "hdet_replicas/excluded": [0, 2],
            "hdet_speed/converge_ms": [r.converge_ms for r in reports],
            "hdet_speed/converge_bytes": [r.converge_bytes for r in reports],
            **{f"hdet_replicas/lr/replica{i}": [r.replica_lr[0][i] for r in reports] for i in range(3)},
            **{f"hdet_replicas/loss/replica{i}": [r.losses[i] for r in reports] for i in range(3)},
            **{f"hdet_replicas/distance/replica{i}": [r.distance[i] for r in reports] for i in range(3)},
        }
        found = curves(tmp_path)
        assert found.keys() == expected.keys()
        for tag, values in expected.items():
            assert found[tag] == [(10, np.float32(values[0])), (20, np.float32(values[1]))], tag

    def test_tags_name_the_group_where_there_are_several(self, tmp_path: Path) -> None:
        report = make_report(groups=("body", "head/bias"))
        write(tmp_path, report, config={**CONFIG, "per_group": True})
        found = curves(tmp_path)
        for g, group in enumerate(report.groups):
            assert found[f"hdet/schedule_lr/{group}"] == [(10, np.float32(report.schedule_lr[g]))]
            assert found[f"hdet/base_lr/{group}"] == [(10, np.float32(report.base_lr[g]))]
            assert found[f"hdet/gain/{group}"] == [(10, np.float32(report.next_gain[g]))]
            assert found[f"hdet_evidence/hypergradient/{group}"] == [(10, np.float32(report.hypergradient[g]))]
            assert found[f"hdet_evidence/movement/{group}"] == [(10, np.float32(report.movement[g]))]
            assert found[f"hdet_evidence/velocity/{group}"] == [(10, np.float32(report.velocity[g]))]
            assert found[f"hdet_evidence/trust/{group}"] == [(10, np.float32(report.judgements[g].trust))]
            for r in range(3):
                assert found[f"hdet_replicas/lr/{group}/replica{r}"] == [(10, np.float32(report.replica_lr[g][r]))]
        assert len(found) == 2 * (11 + 3) + 1 + 3 + 1 + 3 + 3

    def test_groups_that_share_a_gain_have_one_curve(self, tmp_path: Path) -> None:
        """decay and no_decay of the training program were two equal curves of everything."""
        same = {name: (value, value) for name, value in (("schedule_lr", 1e-3), ("gain", 2.0), ("next_gain", 3.0))}
        one = make_report(groups=("decay", "no_decay"), base_lr=(2e-3, 2e-3), replica_lr=((1e-3,) * 3,) * 2, **same)
        alone = set(curves(write_in(tmp_path / "one", make_report())))
        assert curves(write_in(tmp_path / "two", one)).keys() == alone

    def test_learning_rates_that_differ_have_a_curve_each_and_share_their_gain(self, tmp_path: Path) -> None:
        same = {"gain": (2.0, 2.0), "next_gain": (3.0, 3.0)}
        equal = make_report(groups=("a", "b"), schedule_lr=(0.1, 0.1), **same)
        write(tmp_path, equal, make_report(20, groups=("a", "b"), schedule_lr=(0.1, 0.2), **same))
        found = curves(tmp_path)
        assert [step for step, _ in found["hdet/gain"]] == [10, 20]
        assert [step for step, _ in found["hdet/schedule_lr"]] == [10]
        assert found["hdet/schedule_lr/b"] == [(20, np.float32(0.2))]

    def test_what_matters_comes_first_by_name(self, tmp_path: Path) -> None:
        write(tmp_path, make_report())
        tags = sorted(curves(tmp_path))
        assert tags[:5] == ["hdet/base_lr", "hdet/gain", "hdet/gain_log10", "hdet/loss", "hdet/schedule_lr"]
        sections = list(dict.fromkeys(tag.partition("/")[0] for tag in tags))
        assert sections == ["hdet", "hdet_evidence", "hdet_replicas", "hdet_speed"]

    def test_the_story_is_told_and_updated(self, tmp_path: Path) -> None:
        reports = [make_report(10 * k) for k in range(1, 30)]
        reports[20] = make_report(210, rolled_back=True, complete=False, cause="the loss jumped")
        write(tmp_path, *reports)
        events = read(tmp_path).Tensors("hdet/story/text_summary")
        assert events[-1].step == 290
        texts = [event.tensor_proto.string_val[0].decode() for event in events]
        assert "the loss jumped" in next(t for e, t in zip(events, texts, strict=True) if e.step == 210)
        told = [reports[0], *map(story.slim, reports[1:])]
        assert texts[-1] == "\n".join(f"- {sentence}" for sentence in story.sentences(told))
        assert 3 <= len(texts) < 20  # not for each round

    def test_what_is_unknown_is_not_written(self, tmp_path: Path) -> None:
        nan = math.nan
        report = make_report(
            losses=(nan, 2.0, math.inf), mean_loss=nan, hypergradient=(nan,), distance=(nan, nan, nan), excluded=(0,)
        )
        write(tmp_path, report)
        found = curves(tmp_path)
        assert not {tag for tag in found if "distance" in tag}
        assert not {"hdet/loss", "hdet_evidence/hypergradient", "hdet_replicas/loss/replica0"} & found.keys()
        assert found["hdet_replicas/loss/replica2"] == [(10, math.inf)]

    def test_the_mean_distance_is_over_the_replicas_that_have_one(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(distance=(1.0, math.inf, 3.0), excluded=(1,)))
        assert curves(tmp_path)["hdet_replicas/mean_distance"] == [(10, 2.0)]

    def test_a_converge_inside_a_round_writes_no_figures_of_the_round(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(complete=False))
        found = curves(tmp_path)
        assert (
            not {"hdet/loss", "hdet_replicas/loss/replica0", "hdet_evidence/hypergradient", "hdet_evidence/velocity"}
            & found.keys()
        )
        assert {"hdet/base_lr", "hdet/gain", "hdet_replicas/mean_distance"} <= found.keys()
        assert "hdet_replicas/lr/replica0" in found

    def test_says_which_replicas_were_excluded(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(10), make_report(20, excluded=(0, 2)))
        (event,) = read(tmp_path).Tensors("hdet/excluded/text_summary")
        assert event.step == 20
        text = event.tensor_proto.string_val[0].decode()
        assert text == "Round 1, step 20: left out of the average (non-finite values): replica 0, 2."

    def test_probe_and_rollback(self, tmp_path: Path) -> None:
        reports = [
            make_report(10, probe=Slopes(0.3, -0.2, 0.1)),
            make_report(20, complete=False, rolled_back=True),  # as a rollback reports itself
            make_report(30, probe=Slopes(0.4, 0.5, math.nan)),
        ]
        write(tmp_path, *reports, config={**CONFIG, "probe": True, "rollback": True})
        found = curves(tmp_path)
        assert found["hdet_evidence/probe_log10"] == [
            (10, np.float32(math.log10(1.8))),
            (30, np.float32(math.log10(1.8))),
        ]
        assert found["hdet_evidence/probe/raw"] == [(10, np.float32(0.3)), (30, np.float32(0.4))]
        assert found["hdet_evidence/probe/debiased"] == [(10, np.float32(-0.2)), (30, np.float32(0.5))]
        assert found["hdet_evidence/probe/noise"] == [(10, np.float32(0.1))]
        assert found["hdet/rolled_back"] == [(10, 0), (20, 1), (30, 0)]
        assert found["hdet/rolled_back_lr"] == [(20, np.float32(reports[1].base_lr[0]))]

    @pytest.mark.parametrize("unused", [{}, {"probe": False, "rollback": False}])
    def test_no_curves_of_a_probe_or_rollback_that_is_not_in_use(
        self, tmp_path: Path, unused: dict[str, bool | int | float | str]
    ) -> None:
        write(tmp_path, make_report(), config={**CONFIG, **unused})
        assert not [tag for tag in curves(tmp_path) if "probe" in tag or "rolled" in tag]
        assert not [name for name in layout(tmp_path)["hdet: details"] if "probe" in name]

    def test_many_replicas_are_summed_up(self, tmp_path: Path) -> None:
        report = make_report(replicas=5, losses=(3.0, math.nan, 1.0, 2.0, 7.0))
        write(tmp_path / "all", report, max_replicas=5)
        write(tmp_path / "few", report, max_replicas=4)
        assert "hdet_replicas/loss/replica4" in curves(tmp_path / "all")
        found = curves(tmp_path / "few")
        assert not [tag for tag in found if re.search(r"replica\d", tag)]
        for name, value in (("min", 1.0), ("median", 2.5), ("max", 7.0)):
            assert found[f"hdet_replicas/loss/{name}"] == [(10, value)]
        for tag, values in (("hdet_replicas/distance", report.distance), ("hdet_replicas/lr", report.replica_lr[0])):
            summary = [found[f"{tag}/{name}"][0][1] for name in ("min", "median", "max")]
            assert summary == [np.float32(values[0]), np.float32(values[2]), np.float32(values[4])]
        chart = layout(tmp_path / "few")["hdet"]["replicas: training loss"]
        (series,) = chart.margin.series  # type: ignore[attr-defined]
        tags = ["hdet_replicas/loss/min", "hdet_replicas/loss/median", "hdet_replicas/loss/max"]
        assert [series.lower, series.value, series.upper] == tags

    def test_the_limit_counts_learning_rates_of_all_groups_together(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(replicas=3, groups=("a", "b")), max_replicas=5)  # whose learning rates differ
        found = curves(tmp_path)
        assert {"hdet_replicas/lr/a/min", "hdet_replicas/lr/b/max", "hdet_replicas/loss/replica2"} <= found.keys()
        assert "hdet_replicas/lr/a/replica0" not in found

    def test_a_resumed_run_hides_what_was_reported_after_its_checkpoint(self, tmp_path: Path) -> None:
        write(tmp_path, *(make_report(step, mean_loss=1.0) for step in (10, 20, 30)))
        write(tmp_path, *(make_report(step, mean_loss=2.0) for step in (30, 40)), step=20)
        assert curves(tmp_path)["hdet/loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]

    def test_a_new_run_in_an_old_directory_hides_the_old_one(self, tmp_path: Path) -> None:
        write(tmp_path, *(make_report(step, mean_loss=1.0) for step in (10, 20, 30)))
        write(tmp_path, make_report(10, mean_loss=2.0))
        assert curves(tmp_path)["hdet/loss"] == [(10, 2.0)]

    def test_own_curves(self, tmp_path: Path) -> None:
        board = TensorBoard(tmp_path)
        board.add_scalar("val/loss", 3.5, 0)
        board.add_scalar("train/loss", torch.tensor(2.5, requires_grad=True), 1)
        assert not list(tmp_path.iterdir())
        board.start(CONFIG, step=0, writer=True)
        board.add_scalar("val/loss", 1.5, 7)
        board.close()
        assert curves(tmp_path) == {"val/loss": [(0, 3.5), (7, 1.5)], "train/loss": [(1, 2.5)]}
        with pytest.raises(RuntimeError, match="was closed"):
            board.add_scalar("val/loss", 1.0, 8)
        with pytest.raises(ValueError, match=r"Tags under hdet/"):
            board.add_scalar("hdet/loss", 1.0, 8)
        with pytest.raises(ValueError, match="choose another prefix"):
            board.add_scalar("hdet_speed/loss", 1.0, 8)

    def test_own_curves_held_before_a_resume_survive_its_purge(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(10), make_report(20))
        board = TensorBoard(tmp_path)
        board.add_scalar("train/loss", 2.0, 11)
        board.start(CONFIG, step=10, writer=True)
        board.close()
        found = curves(tmp_path)
        assert found["train/loss"] == [(11, 2.0)]
        assert [step for step, _ in found["hdet/loss"]] == [10]

    def test_own_curves_are_no_more_than_ignored_off_the_writer_rank(self, tmp_path: Path) -> None:
        board = TensorBoard(tmp_path)
        board.add_scalar("val/loss", 1.0, 0)
        board.start(CONFIG, step=0, writer=False)
        board.add_scalar("val/loss", torch.ones(3), 1)  # a value that could not be read
        board.close()
        assert not list(tmp_path.iterdir())

    def test_own_curves_are_not_lost_when_nobody_closes(self, tmp_path: Path) -> None:
        program = (
            "from hdet import TensorBoard\n"
            f"board = TensorBoard({str(tmp_path)!r})\n"
            "board.start({}, step=0, writer=True)\n"
            "for step in range(1000): board.add_scalar('val/loss', step, step)\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
        assert len(curves(tmp_path)["val/loss"]) == 1000

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"hparams": [1]}, TypeError, "Invalid hparams=[1]"),
            ({"hparams": []}, TypeError, "Invalid hparams=[]"),
            ({"hparams": {"betas": (0.9, 0.99)}}, TypeError, "Invalid hparams['betas']=(0.9, 0.99)"),
            ({"hparams": {3: 4}}, TypeError, "Invalid hparams[3]=4"),
            ({"hparams": {"hdet/spread": 4}}, ValueError, "Invalid hparams['hdet/spread']"),
            ({"metrics": "val/loss"}, TypeError, "Invalid metrics='val/loss'"),
            ({"metrics": [1]}, TypeError, "Invalid metrics=[1]"),
            ({"max_replicas": 0}, ValueError, "Invalid max_replicas=0"),
            ({"max_replicas": 2.0}, TypeError, "Invalid max_replicas=2.0"),
            ({"max_replicas": True}, TypeError, "Invalid max_replicas=True"),
        ],
    )
    def test_bad_arguments(
        self, tmp_path: Path, arguments: dict[str, object], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=re.escape(message)):
            TensorBoard(tmp_path, **arguments)  # type: ignore[arg-type]

    def test_without_the_tensorboard_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(ImportError, match=re.escape('pip install "hdet[tensorboard]"')):
            TensorBoard(tmp_path)

    def test_hdet_monitor_does_not_import_tensorboard(self) -> None:
        program = "import sys, hdet; sys.exit('tensorboard' in sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


class TestTabs:
    """The HParams and Custom Scalars tabs, as TensorBoard's own plugins read them."""

    CONTEXT = RequestContext()

    @staticmethod
    def plugin_context(directory: Path) -> base_plugin.TBContext:
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory)).Reload()
        return base_plugin.TBContext(
            multiplexer=multiplexer,
            data_provider=MultiplexerDataProvider(multiplexer, str(directory)),
            logdir=str(directory),
            plugin_name_to_instance={},
        )

    def test_layout(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(), make_report(20), metrics=("val/loss",), config={**CONFIG, "rollback": True})
        found = {
            title: {name: list(chart.multiline.tag) for name, chart in charts.items()}  # type: ignore[attr-defined]
            for title, charts in layout(tmp_path).items()
        }
        assert found == {
            "hdet": {
                "learning rate": [r"^hdet/base_lr(/.*)?$", r"^hdet/schedule_lr(/.*)?$", r"^hdet/rolled_back_lr(/.*)?$"],
                "loss": ["^hdet/loss$", "^val/loss$"],
                "evidence: log10 of the gain": [
                    r"^hdet/gain_log10(/.*)?$",
                    r"^hdet_evidence/centre_log10(/.*)?$",
                    r"^hdet_evidence/estimate_log10(/.*)?$",
                ],
                "replicas: training loss": [r"^hdet_replicas/loss/replica\d+$"],
                "cost: ms per converge": [r"^hdet_speed/converge_ms(/.*)?$"],
            },
            "hdet: details": {
                "movement": [r"^hdet_evidence/movement(/.*)?$", r"^hdet_evidence/target(/.*)?$"],
                "trust": [r"^hdet_evidence/trust(/.*)?$"],
                "hypergradient": [r"^hdet_evidence/hypergradient(/.*)?$"],
                "replicas: learning rate": [r"^hdet_replicas/lr/replica\d+$"],
                "replicas: distance from the mean": [r"^hdet_replicas/distance/replica\d+$"],
            },
        }

    # TensorBoard's plugin imports a bundled html5lib that warns about itself.
    @pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("max_replicas", [64, 2])
    @pytest.mark.parametrize("probe", [False, True])
    @pytest.mark.parametrize("groups", [("0",), ("body", "head.weights (2)", "head")])
    def test_every_chart_finds_its_curves(
        self, tmp_path: Path, groups: tuple[str, ...], max_replicas: int, probe: bool
    ) -> None:
        from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
        from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

        report = make_report(groups=groups, **({"probe": Slopes(0.3, -0.2, 0.1)} if probe else {}))
        write(tmp_path / "run", report, max_replicas=max_replicas, config={**CONFIG, "probe": probe})
        context = self.plugin_context(tmp_path)
        plugin = CustomScalarsPlugin(context)
        context.plugin_name_to_instance["scalars"] = ScalarsPlugin(context)
        shown = json.loads(plugin.layout_impl(self.CONTEXT, ""))
        assert [category["title"] for category in shown["category"]] == ["hdet", "hdet: details"]
        charted = set()
        for chart in (chart for category in shown["category"] for chart in category["chart"]):
            if "margin" in chart:
                (series,) = chart["margin"]["series"]
                patterns = [f"^{re.escape(series[name])}$" for name in ("value", "lower", "upper")]
            else:
                patterns = chart["multiline"]["tag"]
            for pattern in patterns:
                answer = plugin.scalars_impl(self.CONTEXT, "run", pattern, "")
                assert answer["regex_valid"]
                assert answer["tag_to_events"], pattern
                assert not charted & answer["tag_to_events"].keys()
                charted |= answer["tag_to_events"].keys()
        uncharted = {"hdet_replicas/mean_distance", "hdet_replicas/excluded", "hdet_speed/converge_bytes"}
        uncharted |= {
            tag for tag in curves(tmp_path / "run") if tag.startswith(("hdet/gain/", "hdet_evidence/velocity"))
        }
        assert charted == curves(tmp_path / "run").keys() - uncharted - {"hdet/gain"}

    def test_hparams_compares_runs_by_their_own_curves(self, tmp_path: Path) -> None:
        hparams = {"optimizer": "AdamW", "compile": False, "batch_size": 32, "warmup": 0.3}
        for run, loss in (("a", 1.0), ("b", 2.0)):
            board = TensorBoard(tmp_path / run, hparams, metrics=("val/loss",))
            board.start({**CONFIG, "seed": int(loss)}, step=0, writer=True)
            board.add_scalar("val/loss", loss + 0.5, 10)
            board.report(make_report(mean_loss=loss))
            board.close()
            assert [path.name for path in (tmp_path / run).iterdir() if path.is_dir()] == []
        context = Context(self.plugin_context(tmp_path))
        content = context.hparams_metadata(self.CONTEXT, "")
        assert content.keys() == {"a", "b"}
        experiment = context.experiment_from_metadata(self.CONTEXT, "", True, content, [])
        metrics = [info.name.tag for info in experiment.metric_infos]
        assert metrics == ["val/loss", "hdet/loss", "hdet/gain"]
        ours = {"hdet/auto_lr", "hdet/max_lr", "hdet/schedule", "hdet/spread"}
        assert {info.name for info in experiment.hparam_infos} == ours | hparams.keys()
        start = metadata.parse_session_start_info_plugin_data(content["b"][metadata.SESSION_START_INFO_TAG])
        values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        assert values == {
            "hdet/spread": 0.5,
            "hdet/auto_lr": "True",
            "hdet/max_lr": 0.1,
            "hdet/schedule": "OneCycleLR",
            "optimizer": "AdamW",
            "compile": "False",
            "batch_size": 32,
            "warmup": 0.3,
        }
        end = metadata.parse_session_end_info_plugin_data(content["b"][metadata.SESSION_END_INFO_TAG])
        assert end.status == api_pb2.Status.Value("STATUS_SUCCESS")
        found = curves(tmp_path / "b")
        assert [found[tag][0][1] for tag in metrics] == [2.5, 2.0, np.float32(0.8)]

    def test_metrics_of_several_groups(self, tmp_path: Path) -> None:
        write(tmp_path, make_report(groups=("body", "head")), config={**CONFIG, "per_group": True})
        about = read(tmp_path).SummaryMetadata(metadata.EXPERIMENT_TAG)
        experiment = metadata.parse_experiment_plugin_data(about.plugin_data.content)
        tags = [info.name.tag for info in experiment.metric_infos]
        assert tags == ["hdet/loss", "hdet/gain/body", "hdet/gain/head"]

    def test_a_run_closed_by_an_exception_does_not_pass_for_complete(self, tmp_path: Path) -> None:
        board = TensorBoard(tmp_path)
        board.start(CONFIG, step=0, writer=True)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            try:
                raise KeyboardInterrupt
            finally:
                board.close()
        assert metadata.SESSION_END_INFO_TAG not in read(tmp_path).summary_metadata
        write(tmp_path, make_report(), step=10)
        assert metadata.SESSION_END_INFO_TAG in read(tmp_path).summary_metadata
