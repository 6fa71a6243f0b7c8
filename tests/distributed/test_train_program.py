"""The training program under torchrun: processes that agree, stop together and go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import launch_forked

from hdet.monitor.base import read_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
LIMIT = 60
TINY = [
    "--model.n_layer=1",
    "--model.n_embd=16",
    "--model.block_size=16",
    "--model.dropout=0.1",
    "--train.batch_size=4",
]
RUN = [*TINY, "--train.total_steps=8", "--train.eval_every=4", "--train.eval_batches=5", "--train.log_every=2"]
RUN += ["--hdet.converge_every=2", "--hdet.spread=0.3"]


def start(processes, log_dir, *arguments):
    """torchrun in a session of its own, its output in a file: a pipe nobody reads could block it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with open(f"{log_dir}.txt", "a") as output:
        return subprocess.Popen(
            [*command, "-m", "hdet.train", f"--train.log_dir={log_dir}", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )


def finish(process, log_dir):
    """(exit status, output). Kills everything that still runs after the limit."""
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        for worker in workers(process):
            os.kill(worker, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"no end after {LIMIT} s:\n{Path(f'{log_dir}.txt').read_text()}") from None
    return process.returncode, Path(f"{log_dir}.txt").read_text()


def workers(process):
    """Process ids of torchrun's workers."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def launch(processes, log_dir, *arguments):
    return finish(start(processes, log_dir, *arguments), log_dir)


def load(log_dir):
    return torch.load(log_dir / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 3 replicas from start to end: its log_dir and output."""
    log_dir = tmp_path_factory.mktemp("whole") / "run"
    status, output = launch(3, log_dir, *RUN)
    assert status == 0, output
    return log_dir, output


def test_a_run_of_three_replicas_from_start_to_end(whole):
    log_dir, output = whole
    assert "Warning" not in output
    for said in ("3 replicas on cpu, spread 0.3, converging every 2 steps", "Done in"):
        assert output.count(said) == 1  # by one rank
    records = read_jsonl(log_dir / "metrics.jsonl")
    assert [r["step"] for r in records if "train_loss" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8]
    rounds = read_jsonl(log_dir / "rounds.jsonl")
    assert [r["step"] for r in rounds] == [2, 4, 6, 8]
    assert all(min(r["distance"]) < max(r["distance"]) for r in rounds)  # the replicas did part
    summary = json.loads((log_dir / "summary.json").read_text())
    assert (summary["replicas"], summary["spread"], summary["converge_every"]) == (3, 0.3, 2)
    assert 0 < summary["converge_overhead"] < 1
    assert set(summary["gain"].values()) != {1.0}
    assert summary["gain"] == dict(zip(rounds[-1]["groups"], rounds[-1]["next_gain"], strict=True))


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(whole, tmp_path):
    """With three replicas the order of summation shows: without a warm-up backward pass, DistributedDataParallel's
    first step after a resume adds the replicas' gradients in another order than the same step of the whole run did."""
    log_dir = tmp_path / "run"
    parts = [[*RUN, f"--train.log_dir={log_dir}", *more] for more in (["--train.stop_at=4"], ["--resume"])]
    done = launch_forked(3, "train_runs.py", *map(json.dumps, parts))
    assert done.returncode == 0, done.stdout
    assert "Stopped after step 4 of 8" in done.stdout
    assert "Resumed after step 4" in done.stdout
    ours, theirs = load(log_dir), load(whole[0])
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert ours["scheduler"] == theirs["scheduler"]
    curves = [read_jsonl(directory / "metrics.jsonl") for directory in (log_dir, whole[0])]
    assert [{**r, "seconds": 0} for r in curves[0]] == [{**r, "seconds": 0} for r in curves[1]]


def test_a_run_with_a_probe_from_a_learning_rate_that_was_found(tmp_path):
    """Resumed, it takes the learning rate from the checkpoint, and each round's probe the batch it would have taken."""
    auto = [*RUN, "--train.total_steps=24", "--optimizer.max_lr=auto", "--hdet.probe=true", "--hdet.rollback=cpu"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs = ([f"--train.log_dir={whole}"], [f"--train.log_dir={parts}", "--train.stop_at=8"])
    runs += ([f"--train.log_dir={parts}", "--resume"],)
    done = launch_forked(2, "train_runs.py", *(json.dumps([*auto, *run]) for run in runs))
    output = done.stdout
    assert done.returncode == 0, output
    assert "Warning" not in output
    assert output.count("found by trying") == 2  # not when resumed
    assert output.count("Resumed after step 8") == 1
    assert (whole / "find_lr.png").exists()
    rounds, again = (read_jsonl(directory / "rounds.jsonl") for directory in (whole, parts))
    probed = [r["step"] for r in rounds if r["probe"]["raw"] is not None]
    assert probed == list(range(4, probed[-1] + 2, 2))  # from a tenth of the run on
    assert 8 < probed[-1] < 24  # and on after the resume, until the schedule anneals
    assert rounds[-1]["next_gain"][0] != 1
    for name in ("probe", "next_gain", "losses"):
        assert [r[name] for r in again] == [r[name] for r in rounds]
    ours, theirs = load(parts), load(whole)
    assert ours["max_lr"] == theirs["max_lr"] != 1e-3
    assert output.count(f"max_lr {ours['max_lr']:.2e} found by trying 8 learning rates") == 2
    assert any(ours["max_lr"] == pytest.approx(2 * 10.0**k) for k in range(-6, 2))  # twice the best one: two replicas
    assert ours["scheduler"]["hdet"]["controller"] == theirs["scheduler"]["hdet"]["controller"]
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("to", ["torchrun", "one worker"])
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path, to):
    """Ctrl-C reaches torchrun, which hands it on to every worker at another moment; a scheduler's SIGTERM may reach one
    worker only. The ranks that got nothing must neither hang nor go on."""
    log_dir = tmp_path / "run"
    long = [*TINY, "--train.total_steps=1000000", "--train.log_every=1", "--train.eval_every=0", "--hdet.spread=0.3"]
    long += ["--hdet.converge_every=7"]
    process = start(2, log_dir, *long)
    metrics, deadline = log_dir / "metrics.jsonl", time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count("train_loss") < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(finish(process, log_dir)[1])
        time.sleep(0.05)
    if to == "torchrun":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(workers(process)[-1], signal.SIGTERM)
    status, output = finish(process, log_dir)
    assert status != 0
    assert "--resume" in output
    state = load(log_dir)
    assert state["step"] >= 3
    assert read_jsonl(metrics)[-1]["step"] == state["step"]
    if to == "one worker":
        assert f"exitcode  : {128 + signal.SIGTERM}" in output  # of its own accord, not killed


def test_an_unknown_key_ends_every_rank_with_one_message(tmp_path):
    status, output = launch(2, tmp_path / "run", "--train.total_stepz=3")
    assert status != 0
    assert output.count("unrecognized arguments: --train.total_stepz") == 1
    assert "exitcode  : 2 " in output  # of the first rank to end; torchrun may end the others before they do
    assert not (tmp_path / "run").exists()
