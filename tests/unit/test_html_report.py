"""``hdet report``: what the page says, what it refuses, and that nothing in a file can become markup."""

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from test_monitor import make_report
from test_train import run as train

import hdet
from hdet import report
from hdet.monitor import story
from hdet.monitor.base import JsonLines
from hdet.report import __main__ as program
from hdet.report.charts import Chart, Line, Mark, draw, nice, thinned
from hdet.settings import DECLARED

CONFIG = {"spread": 0.5, "converge_every": 10, "auto_lr": True, "total_steps": 100, "controller.memory": 0.5}


def write(folder, *reports, config=CONFIG):
    monitor = JsonLines(folder / "rounds.jsonl")
    monitor.start(config, step=0, writer=True)
    for one in reports:
        monitor.report(one)
    return folder


class Elements(HTMLParser):
    """All elements, attributes and text; fails where tags are not closed in their order."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(*folders):
    return report.page([report.read(folder) for folder in folders])


# ------------------------------------------------------------------------------------------------------- the page


def test_first_the_words_then_the_charts_then_the_settings(tmp_path):
    reports = [make_report(10 * k) for k in range(1, 6)]
    reports[3] = make_report(40, rolled_back=True, complete=False, cause="the loss jumped", excluded=(1,))
    text = page_of(write(tmp_path / "one", *reports))
    said = [html.escape(sentence) for sentence in story.sentences(reports)]
    places = [text.index(sentence) for sentence in said]
    assert places == sorted(places)
    assert places[-1] < text.index("<figure") < text.index("Settings that differ")
    found = Elements(text)
    titles = re.findall("<figcaption><b>(.*?)</b>", text)
    assert titles == [
        "Learning rate", "Loss", "Gain: prior and evidence", "Movement", "Trust", "Replicas: training loss",
        "Replicas: distance from their mean", "Cost of a converge",
    ]  # fmt: skip
    assert {"step 40: round undone: the loss jumped", "step 40: left out: replica 1"} <= set(found.texts)
    assert ("class", "undone") in found.attributes
    assert ("class", "excluded") in found.attributes
    assert "As of step 50 of 100: the run goes on, or was stopped." in found.texts


def test_it_needs_no_network_and_no_script(tmp_path):
    found = Elements(page_of(write(tmp_path, make_report())))
    assert not {"script", "img", "iframe", "object", "form", "use"} & set(found.tags)
    links = [value for name, value in found.attributes if name in ("src", "href", "action", "xlink:href")]
    assert links == ["data:,"]
    style = found.texts[next(i for i, text in enumerate(found.texts) if ":root" in text)]
    assert "url(" not in style
    assert "@import" not in style


def test_nothing_in_a_file_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    folder = tmp_path / "<b>run</b>"
    config = {**CONFIG, "schedule": evil, "gradients": evil}
    write(
        folder, make_report(groups=(evil, "b"), rolled_back=True, cause=evil), make_report(20, groups=(evil, "b")),
        config=config,
    )  # fmt: skip
    (folder / "metrics.jsonl").write_text(
        json.dumps({"config": {evil: evil}, "defaults": {evil: evil}, "step": 0}) + "\n"
    )
    text = page_of(folder)
    found = Elements(text)
    assert not {"script", "b>"} & set(found.tags)
    assert found.tags.count("b") == text.count("<figcaption>")
    assert any(evil in one for one in found.texts)
    assert not any(name.startswith("on") for name, _ in found.attributes)


def test_several_runs_side_by_side(tmp_path):
    folders = [write(tmp_path / name / "run", make_report(), make_report(20)) for name in ("a", "b")]
    text = page_of(*folders)
    assert "hdet report: run (1), run (2)" in text
    assert text.count("<figcaption><b>Learning rate</b>") == 1
    assert text.count("<figcaption><b>Movement</b>") == 2
    assert re.search("<tr><th></th><th>run \\(1\\)</th><th>run \\(2\\)</th></tr>", text)


def test_parameter_groups_with_gains_of_their_own(tmp_path):
    text = page_of(write(tmp_path, make_report(groups=("body", "head")), make_report(20, groups=("body", "head"))))
    assert "<b>Movement of body</b>" in text
    assert "<b>Movement of head</b>" in text


def test_while_the_run_goes_on(tmp_path):
    folder = write(tmp_path)
    assert "No round is over yet." in page_of(folder)
    monitor = JsonLines(folder / "rounds.jsonl")
    monitor.start(CONFIG, step=0, writer=True)
    monitor.report(make_report(10))
    whole = page_of(folder)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"step": 20, "round": 1, "compl')
    assert page_of(folder) == whole


def test_settings_that_differ_from_the_defaults(tmp_path):
    """The first line of a real run, all of whose other settings are left out."""
    model = torch.nn.Linear(2, 1)
    path = tmp_path / "rounds.jsonl"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = hdet.controller.Posterior(evidence_error=0.4)
    settings = {"spread": 0.25, "auto_lr": True, "virtual_replicas": 2, "controller": controller, "seed": 7}
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 20, model=model, monitor=hdet.JsonLines(path), **settings)
    for _ in range(4):
        losses = [model(part).square().mean() for part in scheduler.each(torch.ones(2, 1, 2))]
        sum(losses).backward()
        optimizer.step()
        scheduler.step(losses)
    run = report.read(tmp_path)
    assert run.changed == {
        "spread": (0.25, 0.0), "auto_lr": (True, False), "virtual_replicas": (2, 1), "seed": (7, 0),
        "controller.evidence_error": (0.4, 0.5),
    }  # fmt: skip
    assert run.about == {
        "replicas": 2, "total_steps": 20, "converge_every": 1, "schedule": "OneCycleLR", "peak_lr": 0.1,
    }  # fmt: skip
    assert set(run.changed) - {"controller.evidence_error"} <= set(DECLARED)
    assert run.rounds[-1].peak_lr == 0.1


def test_a_run_of_the_training_program(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--task.name=digits", "--train.total_steps=20", "--train.eval_every=10", "--train.log_every=5"]
    assert train(monkeypatch, folder, *arguments) == 0
    said = capsys.readouterr().out
    text = (folder / "report.html").read_text()
    assert f"report: {folder}/report.html" in said
    run = report.read(folder)
    assert story.in_one_sentence(run.rounds) in said
    assert text == report.page([run])
    assert [step for step, _ in run.validation] == [10, 20]
    assert [step for step, _ in run.training] == [5, 10, 15, 20]
    assert run.changed["task.name"] == ("digits", "char_lm")
    assert run.about["schedule"] == "one_cycle"
    assert "train.log_dir" not in run.changed
    assert "All 20 steps." in text
    assert "The validation loss was" in text
    # The same folder, used anew for the plain schedule: nothing is left of the other run.
    assert train(monkeypatch, folder, *arguments, "--hdet.spread=0") == 0
    text = (folder / "report.html").read_text()
    assert "The run has no rounds" in text
    assert "<b>Movement</b>" not in text
    assert "<b>Learning rate</b>" in text


# --------------------------------------------------------------------------------------------------------- errors


def refused(capsys, *arguments):
    assert program.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("python -m hdet.report: error: ")
    return said.err


def test_what_is_missing(tmp_path, capsys):
    assert f"{tmp_path}/none is missing. Name the folder of a run" in refused(capsys, tmp_path / "none")
    wanted = f"{tmp_path} has no rounds.jsonl and no metrics.jsonl. Name the folder of a run"
    assert wanted in refused(capsys, tmp_path)
    write(tmp_path / "good", make_report())
    assert str(tmp_path / "bad") in refused(capsys, tmp_path / "good", tmp_path / "bad")


@pytest.mark.parametrize("content", [b"\x00\xff\xfe" * 40, b"hello\n", b"[1]\n", b'{"a": 1}\n', b'{"step": "x"}\n'])
def test_a_foreign_file(tmp_path, capsys, content):
    (tmp_path / "rounds.jsonl").write_bytes(content)
    error = refused(capsys, tmp_path)
    assert f"{tmp_path}/rounds.jsonl has no line with a step. Must be as hdet.JsonLines writes it. Name" in error


def test_a_line_of_something_else(tmp_path, capsys):
    (tmp_path / "rounds.jsonl").write_text('{"step": 10, "loss": 2}\n')
    error = refused(capsys, tmp_path)
    assert f"{tmp_path}/rounds.jsonl: the line of step 10 is no report of a round: it has no " in error
    (tmp_path / "rounds.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train_loss": "2"}\n')
    assert "metrics.jsonl: train_loss of step 10 is '2'. Must be a number." in refused(capsys, tmp_path)


def test_what_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "rounds.jsonl")
    assert "rounds.jsonl" in refused(capsys, tmp_path)
    (tmp_path / "rounds.jsonl").unlink()
    write(tmp_path, make_report())
    (tmp_path / "out").mkdir()
    assert f"{tmp_path}/out" in refused(capsys, tmp_path, "--output", tmp_path / "out")


def test_where_it_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", make_report())
    write(tmp_path / "b", make_report())
    shutil.copy(tmp_path / "a" / "rounds.jsonl", tmp_path / "a" / "other.jsonl")
    for arguments, place in (
        (["a"], "a/report.html"),
        (["a/rounds.jsonl"], "a/report.html"),
        (["a/other.jsonl"], "a/other.html"),
        (["a", "b"], "report.html"),
        (["a", "--output", "new/x.html"], "new/x.html"),
    ):
        assert program.main(arguments) == 0
        assert capsys.readouterr().out == f"report: {place}\n"
        assert (tmp_path / place).read_text().startswith("<!DOCTYPE html>")
    assert "<h1>hdet report: a</h1>" in (tmp_path / "a" / "report.html").read_text()
    assert "<h1>hdet report: other</h1>" in (tmp_path / "a" / "other.html").read_text()


def test_the_command(tmp_path):
    """In a process of its own, without the packages of hdet[train]."""
    write(tmp_path, make_report())
    done = subprocess.run([sys.executable, "-m", "hdet", "report", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"report: {tmp_path}/report.html\n")


# --------------------------------------------------------------------------------------------------------- charts


def test_a_chart_without_points_is_left_out():
    assert draw(Chart("x", "", [Line("a", [])])) == ""
    assert draw(Chart("x", "", [Line("a", [(1, float("nan"))])])) == ""
    assert draw(Chart("x", "", [Line("a", [(1, -1.0), (2, 0.0)])], log=True)) == ""


def test_points_lie_where_they_should():
    """At the right edge, and as far up as their share of the range, in a square of 1000."""
    text = draw(Chart("x", "", [Line("a", [(0, 0.0), (50, 5.0), (100, 10.0)])]))
    (path,) = re.findall(r'class="line solid c0" d="([^"]*)"', text)
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
    assert [x for x, _ in points] == pytest.approx([0, 494.1, 988.1], abs=0.1)
    assert [y for _, y in points] == pytest.approx([946.4, 500, 53.6], abs=0.1)
    text = draw(Chart("x", "", [Line("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], log=True))
    (path,) = re.findall(r'class="line solid c0" d="([^"]*)"', text)
    ys = [float(point.split()[1]) for point in re.split("[ML]", path)[1:]]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_what_is_unknown_leaves_a_gap():
    text = draw(Chart("x", "", [Line("a", [(0, 1.0), (1, float("nan")), (2, 2.0), (3, 3.0)])]))
    (path,) = re.findall(r'class="line solid c0" d="([^"]*)"', text)
    assert re.sub(r"[\d. ]", "", path) == "MML"


def test_a_mark_without_a_value_stands_at_the_edge():
    text = draw(Chart("x", "", [Line("a", [(0, 1.0), (10, 2.0)])], marks=[Mark(5, float("nan"), "undone", "why <")]))
    assert '<svg class="mark" x="49.41%" y="96.00%">' in text
    assert "<title>why &lt;</title>" in text


def test_a_curve_that_falls_to_nothing_does_not_squeeze_the_others():
    lines = [Line("a", [(0, 1.0), (1, 2.0), (2, 1e-12)])]
    labels = re.findall(r'<text class="y"[^>]*>([^<]*)<', draw(Chart("x", "", lines, log=True)))
    assert "1e-12" not in labels
    assert "1" in labels


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0, 1e-9), (1e6, 1e6 + 1), (0, 12345)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_many_points_are_thinned_and_keep_their_peaks():
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[777] = (777.0, -9.0)
    kept = thinned(points)
    assert len(kept) < 700
    assert {(54_321.0, 9.0), (777.0, -9.0)} <= set(kept)
    assert list(kept) == sorted(kept)


def test_all_fields_of_a_report_are_read(tmp_path):
    """A field that is added to the report must be read back, too."""
    from hdet.monitor.report import _READ

    assert set(_READ) | {"writer"} == {field.name for field in dataclasses.fields(hdet.Report)}
