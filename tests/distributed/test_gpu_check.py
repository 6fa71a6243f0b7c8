"""launch/gpu_check.sh where there is no GPU: every part that needs none runs to its end, in small sizes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hdet.bench.gpu_check import __main__ as program
from hdet.bench.gpu_check.part import PARTS
from hdet.bench.gpu_check.place import NoTimeLeft, Place
from hdet.ops import _native

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
ON_CPU = [name for name, part in PARTS.items() if not part.needs_gpu]


def check(folder, *arguments, **environment):
    """(exit status, what it printed)"""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--device", "cpu", "--output", str(folder), *arguments],
        env=os.environ | {"HDET_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=380,
    )
    return done.returncode, done.stdout + done.stderr


def parts_in(folder):
    return json.loads((folder / "gpu_check.json").read_text())["parts"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole check, and what it printed."""
    if not shutil.which("g++") or _native._version(torch.__version__) < _native.FIRST_TORCH:
        pytest.skip("needs a C++ compiler and torch 2.10 or newer")
    folder = tmp_path_factory.mktemp("gpu_check")
    status, said = check(folder, "--limit", "1000")
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    assert status == 0, said + logs
    return folder, said


def test_every_part_passes_or_says_that_it_needs_a_gpu(whole):
    folder, said = whole
    parts = parts_in(folder)
    assert list(parts) == list(PARTS)
    assert {name for name, part in parts.items() if part["status"] == "passed"} == set(ON_CPU)
    assert {part["status"] for part in parts.values()} == {"passed", "needs a GPU"}
    for name in ON_CPU:
        assert parts[name]["rows"], name
        assert parts[name]["seconds"] > 0
        assert f"hdet.bench.gpu_check: {name}: passed after " in said


def test_the_table_has_a_line_for_each_result(whole):
    folder, said = whole
    table = (folder / "gpu_check.md").read_text()
    assert table in said + "\n"
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(lines) == sum(max(1, len(part["rows"])) for part in parts_in(folder).values())
    assert all(line.count("|") - line.count("\\|") == 5 for line in lines)
    assert "| tests | needs a GPU" in table


def test_the_gpt_is_trained_from_three_rates_with_and_without_hdet(whole):
    rows = parts_in(whole[0])["training"]["rows"]
    runs = [row["values"] for row in rows if "hdet" in row["values"]]
    (tuned,) = (row["values"]["tuned"] for row in rows if "tuned" in row["values"])
    assert [(run["hdet"], run["lr"] / tuned) for run in runs] == [
        (ours, pytest.approx(factor)) for factor in (1 / 30, 1, 4) for ours in (False, True)
    ]
    assert [run["gain"] is not None for run in runs] == [False, True] * 3
    low, low_with_hdet, at_tuned = (run["loss"] for run in runs[:3])
    assert low_with_hdet < low
    assert at_tuned < low


def test_what_has_passed_is_not_repeated_unless_asked_for(whole):
    folder, _ = whole
    before = parts_in(folder)
    status, said = check(folder, "--parts", *ON_CPU)
    assert status == 0
    assert said.count("passed already") == len(ON_CPU)
    assert parts_in(folder) == before
    status, said = check(folder, "--parts", "two_processes", "captured", "--again", "two_processes")
    assert status == 0
    assert said.count("passed already") == 1
    after = parts_in(folder)
    assert after["two_processes"]["seconds"] != before["two_processes"]["seconds"]
    assert list(after) == list(PARTS)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    """With no compiler the ops cannot be built."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "python3"):
        (tools / name).symlink_to(shutil.which(name))
    status, said = check(tmp_path, "--parts", "build", "two_processes", PATH=str(tools), CXX="")
    parts = parts_in(tmp_path)
    assert status == 1, said
    assert parts["build"]["status"] == "failed"
    assert "The cpu ops cannot be compiled: no C++ compiler" in parts["build"]["error"]
    assert parts["two_processes"]["status"] == "passed"
    assert "| build | failed" in (tmp_path / "gpu_check.md").read_text()


def test_a_part_that_does_not_end_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    """In its stead a process that waits for one of its own."""
    started = tmp_path / "started"
    script = tmp_path / "part"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! >{started}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(program.sys, "executable", str(script))
    monkeypatch.setitem(program.PARTS, "nccl", program.PARTS["nccl"].__class__(PARTS["nccl"].run, 2.0))
    found = program._run("nccl", "cpu", tmp_path, time.monotonic() + 100)
    assert (found["status"], found["error"]) == ("failed", "no end after 2 s")
    stat = Path(f"/proc/{started.read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    while _runs(stat) and time.monotonic() < deadline:  # a process that was killed may still be about to end
        time.sleep(0.01)
    assert not _runs(stat)
    late = program._run("nccl", "cpu", tmp_path, time.monotonic() + 1)
    assert (late["status"], late["seconds"]) == ("no time left", 0.0)


def _runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_is_kept_is_not_made_again_and_what_takes_too_long_is_left(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"loss": 1.5}

    for _ in range(2):  # as in two calls
        place = Place("training", "cpu", tmp_path, 10.0)
        assert place.keep("a run", make, takes=5) == {"loss": 1.5}
    assert len(made) == 1
    with pytest.raises(NoTimeLeft, match="another run takes about 50 s, and 10 s are left"):
        place.keep("another run", make, takes=50)
    assert Place("training", "cpu", tmp_path, 1.0).keep("a run", make, takes=5) == {"loss": 1.5}
    assert len(made) == 1


def test_a_python_without_torch_is_named(tmp_path):
    status, said = check(tmp_path, HDET_PYTHON=shutil.which("false"))
    assert status == 2
    assert "has no torch. Set HDET_PYTHON" in said


def test_prepare_fetches_wheels_for_another_machine(tmp_path):
    """pip is given the other machine's Python and platforms; a stand-in tells with what it was called."""
    told = tmp_path / "told"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{told}\nmkdir -p build/gpu_check/wheels\n')
    stand_in.chmod(0o755)
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "gpu_check.sh", tmp_path / "launch")
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "gpu_check.sh"), "prepare"],
        env=os.environ | {"HDET_PYTHON": str(stand_in), "HDET_TARGET": "3.11"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = told.read_text().split()
    assert words[:3] == ["-m", "pip", "download"]
    assert words[words.index("--python-version") + 1] == "3.11"
    assert words[words.index("-d") + 1] == "build/gpu_check/wheels"
    assert {"numpy", "pyyaml", "pytest", "pytest-timeout", "hypothesis"} <= set(words)
