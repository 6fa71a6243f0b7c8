"""Every strategy in real processes over gloo, and the training program: bit for bit.

``HDET_REGENERATE=1`` pins the results anew. ``HDET_REGENERATE=states`` also writes the saved states in states/ anew:
only where the format of a state has changed on purpose, since an old state must go on loading.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import golden_cases
import golden_programs
import pytest
import torch
from golden_machine import HERE, ROOT, TOLERANCE, Golden, digest, merged

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]
LIMIT = 420
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
DEEPSPEED = ["4:golden_deepspeed:zero1"] if HAS_DEEPSPEED else []
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LEFT_OUT = {
    "movement", "cause", "judgements", "peak_lr",
    "seconds", "converge_ms", "converge_seconds", "converge_overhead", "wall_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The results of all cases, which share one start: imports take seconds. A folder."""
    out = tmp_path_factory.mktemp("golden")
    jobs = [*golden_cases.JOBS, *golden_programs.JOBS, *DEEPSPEED]
    with (out / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "golden_launch.py"), str(out), *jobs],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return out


def results(out, name):
    """What the ranks returned from a case."""
    files = sorted(out.glob(f"{name}.*.json"))
    assert files, f"{name} did not end:\n{(out / 'output.txt').read_text()[-6000:]}"
    return merged([json.loads(file.read_text()) for file in files])


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_processes(launched, name):
    tolerance = 0.01 if "bf16" in name else TOLERANCE  # what is rounded so coarsely may fall on the other side
    Golden("processes").check(name, **results(launched, name), tolerance=tolerance)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
def test_deepspeed(launched):
    Golden("deepspeed").check("zero1", **results(launched, "zero1"))


# ---------------------------------------------------------------------------------------------------------- programs


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in LEFT_OUT}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def lines(file):
    return [without_times(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("name", golden_programs.RUNS)
def test_train(launched, name):
    """What a run leaves, but for the time it took."""
    directory = launched / golden_programs.RUNS[name][1]
    assert (directory / "checkpoint.pt").exists(), (launched / "output.txt").read_text()[-6000:]
    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)
    config = checkpoint.pop("config")
    metrics = [line for line in lines(directory / "metrics.jsonl") if "config" not in line]
    rounds = [line for line in lines(directory / "rounds.jsonl") if "next_gain" in line]
    summary = directory / "summary.json"
    ended = without_times(json.loads(summary.read_text())) if summary.exists() else None
    Golden("programs").check(
        name,
        exact={key: digest(value) for key, value in checkpoint.items()}
        | {"metrics": digest(metrics), "rounds": digest(rounds), "summary": digest(ended)},
        plain={
            "config": digest({**config, "train": {**config["train"], "log_dir": ""}}),
            "keys": sorted(checkpoint),
            "steps": [line["step"] for line in metrics],
            "rounds": [line["step"] for line in rounds],
            "files": sorted(path.name for path in directory.iterdir() if not path.name.startswith("events.")),
        },
        summary={
            "losses": [line[key] for line in metrics for key in ("train_loss", "val_loss") if key in line],
            "gains": [line["next_gain"] for line in rounds][-4:],
        },
    )


def test_regret(tmp_path):
    command = ["--workloads", "digits_mlp", "--contenders", "hdet", "posterior", "published", "--starts", "0.1"]
    command += ["--seeds", "1", "--length", "0.1", "--workers", "1", "--output", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "hdet.bench.regret", *command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = lines(tmp_path / "runs.jsonl")
    runs.sort(key=lambda run: (run["contender"], run["start"]))
    Golden("programs").check(
        "regret",
        exact={"runs": digest(runs)},
        plain={"runs": [[run["contender"], run["start"], run["steps"], run["version"]] for run in runs]},
        summary={"losses": [run["loss"] for run in runs], "gains": [run["gain"] for run in runs]},
        tolerance=0.3,  # digits_mlp starts on a plateau, where slopes are hardly more than rounding errors
    )
