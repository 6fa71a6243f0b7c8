"""The training program's strategies and gradient modes: 4 processes, 2 replicas of 2."""

import json

import pytest
import torch
from conftest import launch_forked

from hdet.monitor.base import read_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
RUN = ["--model.n_layer=1", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1", "--train.batch_size=4",
       "--train.total_steps=12", "--train.eval_every=6", "--train.eval_batches=5", "--train.log_every=2",
       "--hdet.converge_every=2", "--hdet.spread=0.3", "--train.replicas=2", "--train.accumulate=2"]  # fmt: skip
FSDP = [*RUN, "--train.strategy=fsdp", "--hdet.probe=true"]
LOCAL = [*RUN, "--train.strategy=fsdp", "--hdet.gradients=local", "--hdet.outer.momentum=0.5", "--hdet.auto_lr=false"]
BF16 = [*RUN, "--train.strategy=fsdp", "--train.dtype=bfloat16", "--optimizer.max_lr=auto"]
DDP = [*RUN, "--hdet.gradients=grouped", "--hdet.probe=held_out", "--optimizer.label_smoothing=0.1",
       "--hdet.hyperparameters={weight_decay: 0.5, dropout: 0.05, label_smoothing: 0.05}"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of the runs, and what they printed."""
    folder = tmp_path_factory.mktemp("strategies")
    wanted = {"whole": FSDP, "parts": [*FSDP, "--train.stop_at=6"], "again": [*FSDP, "--resume"]}
    wanted |= {"local": LOCAL, "bf16": BF16, "ddp": DDP}
    arguments = [
        json.dumps([*run, f"--train.log_dir={folder / ('parts' if name == 'again' else name)}"])
        for name, run in wanted.items()
    ]
    done = launch_forked(4, "train_runs.py", *arguments)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def load(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def test_a_sharded_run_resumes_bit_for_bit(runs):
    folder, output = runs
    assert output.count("2 replicas of 2 processes each on cpu") == 6
    assert output.count("Resumed after step 6") == 1
    assert "Warning" not in output
    ours, theirs = load(folder / "parts"), load(folder / "whole")
    assert ours["step"] == theirs["step"] == 12
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
    for mine, other in zip(ours["scheduler"], theirs["scheduler"], strict=True):
        torch.testing.assert_close(mine["hdet"]["slow_average"], other["hdet"]["slow_average"], rtol=0, atol=0)
        assert mine["hdet"]["controller"] == other["hdet"]["controller"]
    rounds, again = (read_jsonl(folder / name / "rounds.jsonl") for name in ("whole", "parts"))
    assert [r["step"] for r in rounds] == [2, 4, 6, 8, 10, 12]
    for name in ("losses", "probe", "next_gain", "distance"):
        assert [r[name] for r in rounds] == [r[name] for r in again]


def test_a_sharded_runs_checkpoint_holds_whole_tensors_and_every_shards_averages(runs):
    saved = load(runs[0] / "whole")
    assert saved["model"]["tokens.weight"].shape == (256, 16)
    assert saved["optimizer"]["state"]["tokens.weight"]["exp_avg"].shape == (256, 16)
    shards = [state["hdet"] for state in saved["scheduler"]]
    assert [state["shard"] for state in shards] == [[0, 2], [1, 2]]
    parameters = sum(tensor.numel() for name, tensor in saved["model"].items() if name != "head.weight")
    assert sum(slow.numel() for state in shards for slow, _ in state["slow_average"]) == parameters
    local = [state["hdet"] for state in load(runs[0] / "local")["scheduler"]]
    assert sum(anchor.numel() for state in local for anchor, _ in state["outer"]) == parameters


@pytest.mark.parametrize("name", ["local", "bf16", "ddp"])
def test_other_runs_end(runs, name):
    folder, _ = runs
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["replicas"] == 2
    assert 0 < summary["validation_loss"] < 6
    rounds = read_jsonl(folder / name / "rounds.jsonl")
    assert len(rounds[0]["losses"]) == 2
    assert all(r["distance"][0] > 0 for r in rounds)


def test_a_run_explores_hyperparameters(runs):
    rounds = read_jsonl(runs[0] / "ddp" / "rounds.jsonl")
    names = ["weight_decay", "dropout", "label_smoothing"]
    for r in rounds:
        assert [h["name"] for h in r["hyperparameters"]] == names
    differing = [[h["values"][0] != h["values"][1] for h in r["hyperparameters"]] for r in rounds]
    assert max(map(sum, differing)) == 1  # two replicas tell one thing apart at a time
    for differs, r in zip(differing, rounds, strict=True):
        assert all((h["effect"] is not None) == d for h, d in zip(r["hyperparameters"], differs, strict=True))
    summary = json.loads((runs[0] / "ddp" / "summary.json").read_text())
    assert list(summary["hyperparameters"]) == names
