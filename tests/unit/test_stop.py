"""SIGINT and SIGTERM: the run stops where it can be resumed bit for bit; a second Ctrl-C ends it at once."""

import os
import signal
import sys
import threading

import pytest
import torch

from hdet.bench.faults.kills import differences
from hdet.monitor.base import read_jsonl
from hdet.replicas.topology import Replicas
from hdet.train import __main__ as program
from hdet.train import optimization
from hdet.train.stop import StopRequest, _Presses

TINY = ["--task.name=digits", "--model.channels=2", "--train.batch_size=4", "--train.total_steps=14"]
TINY += ["--train.eval_batches=1", "--hdet.spread=0.3", "--hdet.converge_every=5", "--train.log_every=1"]


def run(monkeypatch, log_dir, *arguments):
    monkeypatch.setattr(sys, "argv", ["hdet.train", *TINY, f"--train.log_dir={log_dir}", *arguments])
    return program.main()


def signals(monkeypatch, *at):
    """Raise signals after the scheduler's steps of these numbers."""
    due = list(at)
    step, taken = optimization.Schedule.step, [0]

    def step_then_signal(self, loss):
        step(self, loss)
        taken[0] += 1
        for number in [number for when, number in due if when == taken[0]]:
            signal.raise_signal(number)

    monkeypatch.setattr(optimization.Schedule, "step", step_then_signal)


def state(log_dir):
    return torch.load(log_dir / "checkpoint.pt", weights_only=True)


VIRTUAL = ["--hdet.virtual_replicas=true", "--train.accumulate=3", "--train.eval_every=0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_a_signal_inside_a_round_stops_at_its_end_and_the_resumed_run_is_the_uninterrupted_one(
    monkeypatch, tmp_path, capfd, at, number
):
    assert run(monkeypatch, tmp_path / "whole", *VIRTUAL) == 0
    with monkeypatch.context() as patched:
        signals(patched, (at, number))
        assert run(patched, tmp_path / "parts", *VIRTUAL) == 128 + number
    assert state(tmp_path / "parts")["step"] == -(-at // 5) * 5
    told = capfd.readouterr().out
    assert "bit for bit" not in told
    assert ("Going on to step" in told) == (at != 5)
    assert run(monkeypatch, tmp_path / "parts", *VIRTUAL, "--resume") == 0
    assert differences(state(tmp_path / "whole"), state(tmp_path / "parts")) == []
    losses = [
        [r["train_loss"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "train_loss" in r]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_stop_at_stops_at_a_rounds_end_too(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, *VIRTUAL, "--train.stop_at=6") == 0
    assert state(tmp_path)["step"] == 10


def test_the_baseline_stops_at_once(monkeypatch, tmp_path):
    signals(monkeypatch, (2, signal.SIGTERM))
    assert run(monkeypatch, tmp_path, "--hdet.spread=0") == 128 + signal.SIGTERM
    assert state(tmp_path)["step"] == 2


def test_a_round_that_takes_too_long_is_cut_short_and_that_is_told(monkeypatch, tmp_path, capfd):
    signals(monkeypatch, (2, signal.SIGTERM))
    assert run(monkeypatch, tmp_path, *VIRTUAL, "--train.stop_within=0") == 128 + signal.SIGTERM
    assert state(tmp_path)["step"] == 2
    assert "will not be the uninterrupted one bit for bit" in capfd.readouterr().out.replace("\n", " ")


def test_with_overlap_a_run_stops_where_it_validates(monkeypatch, tmp_path):
    """It waits for the average of a round there; at the round's end an uninterrupted run would not."""
    overlap = [
        "--hdet.averaging.overlap_steps=2",
        "--hdet.probe=false",
        "--train.eval_every=4",
        "--hdet.controller=published",
    ]
    signals(monkeypatch, (2, signal.SIGTERM))
    assert run(monkeypatch, tmp_path, *overlap) == 128 + signal.SIGTERM
    assert state(tmp_path)["step"] == 4


def test_a_second_ctrl_c_ends_the_run_at_once(monkeypatch, tmp_path, capfd):
    signals(monkeypatch, (1, signal.SIGINT), (2, signal.SIGINT))
    assert run(monkeypatch, tmp_path) == 128 + signal.SIGINT
    told = capfd.readouterr().err
    assert "interrupted" in told
    assert "Traceback" not in told
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_second_ctrl_c_ends_a_process_that_is_stuck(capfd):
    """In a call that never returns Python runs no signal handlers. Here: a lock that nobody lets go of."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lock = threading.Lock()
        lock.acquire()

        def stuck(*_):
            os.write(writing, b"stuck\n")
            lock.acquire()

        with StopRequest(Replicas()):
            signal.signal(signal.SIGINT, stuck)
            os.write(writing, b"ready\n")
            lock.acquire()
        os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as told:
        for word in ("ready", "stuck"):
            assert told.readline() == f"{word}\n"
            os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT
    assert "ended at once" in capfd.readouterr().err


def test_one_press_may_be_two_signals(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hdet.train.stop.time.monotonic", lambda: now[0])
    alone = _Presses(forwarded=False)
    assert [alone.again(), alone.again()] == [False, True]
    forwarded = _Presses(forwarded=True)
    assert [forwarded.again(), forwarded.again(), forwarded.again()] == [False, False, True]
    slow = _Presses(forwarded=True)
    assert not slow.again()
    now[0] = 1.5
    assert slow.again()
