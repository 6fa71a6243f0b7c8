"""The benchmark with real processes: one quick run of everything, and what happens when a process does not end well."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from hdet.bench import converge, processes
from hdet.bench.contenders import CONTENDERS, Contender, PerTensor
from hdet.bench.measure import OURS
from hdet.bench.report import targets
from hdet.bench.scaling import fit
from hdet.bench.scaling.network import Link
from hdet.bench.shapes import Shape

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parent.parent.parent


def run(task, *arguments, size=2, limit=100.0):
    return list(processes.run(task, size, arguments, device="cpu", limit=limit))


# ------------------------------------------------------------------------------------------------ the whole thing


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Output folder, and what ``python -m hdet.bench --quick`` said."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "hdet.bench", "--quick", "--processes", "2", "--limit", "120"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=170,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_quick_run_measures_every_contender_or_says_why_not(quick):
    folder, _ = quick
    found = json.loads((folder / "bench.json").read_text())
    assert set(found) == {"schema", "machine", "settings", "results", "targets"}
    cases = [result for result in found["results"] if result["section"] == "converge"]
    assert [(case["facts"]["shape"], case["facts"]["processes"]) for case in cases] == [("1k", 2), ("100k", 2)]
    for case in cases:
        assert set(case["samples"]) | set(case["skipped"]) == set(CONTENDERS)
        assert not set(case["samples"]) & set(case["skipped"])
        assert set(case["skipped"]) <= {"accelerate"}
        assert all(reason for reason in case["skipped"].values())


def test_a_quick_run_has_all_sections_and_as_many_samples_of_each_contender(quick):
    folder, _ = quick
    found = json.loads((folder / "bench.json").read_text())
    counts = {}
    for result in found["results"]:
        counts[result["section"]] = counts.get(result["section"], 0) + 1
        assert OURS in result["samples"] or result["section"] == "traffic"
        assert all(len(seconds) == 3 for seconds in result["samples"].values())
        assert all(0 < second < 100 for seconds in result["samples"].values() for second in seconds)
    # 2 shapes x 2 dtypes x pack and unpack; 1, 8, 64 groups; 2 models; 2 shapes; 3 kinds of round, each with its step
    assert counts == {"kernels": 8, "step": 3, "virtual": 2, "converge": 2, "overhead": 6, "traffic": 3}
    traffic = {r["facts"]["mode"]: r["facts"] for r in found["results"] if r["section"] == "traffic"}
    model = 4 * traffic["local"]["parameters"]
    assert traffic["plain_ddp"]["across"] == model  # every gradient, every step
    assert model < traffic["shared"]["across"] < 1.2 * model  # and the model once in 10 steps
    # Once in 10 steps parameters and both of Adam's moments.
    assert traffic["local"]["reported"] == pytest.approx(3 * model / 10, rel=1e-3)
    assert 0.3 * model <= traffic["local"]["across"] < 0.4 * model
    verdicts = {target["name"]: target["verdict"] for target in found["targets"]}
    assert set(verdicts) == {target.name for target in targets([])}
    assert verdicts["converge: against every alternative"] != "not measured"
    assert verdicts["step(loss): time over torch's OneCycleLR.step"] != "not measured"


def test_a_quick_run_prints_its_tables_and_what_the_contenders_are(quick):
    _, output = quick
    for title in ("Pack and unpack", "scheduler.step(loss)", "Converge", "A training run", "target"):
        assert any(line.startswith(title) for line in output.splitlines()), title
    assert all(f"\n{name}: " in output for name in CONTENDERS)


def test_a_quick_run_draws_a_plot_where_there_is_matplotlib(quick):
    pytest.importorskip("matplotlib")
    folder, _ = quick
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------- correctness


class _FirstOnly(Contender):
    def average(self):
        tensor = self.tensors()[0]
        dist.all_reduce(tensor)
        tensor /= self.size


class _BuffersToo(PerTensor):
    averages_buffers = True  # it does not


def _measure(name, contender):
    shape = Shape("small", ((3, 4), (5,)), ((5,),))
    try:
        converge.measure(shape, repeat=3, seconds=0.1, contenders={name: contender})
    except RuntimeError as error:
        return str(error)
    return None


def _divergences():
    """In three turns: whether the processes differ again before the next, and hold the mean already."""
    model = converge.Model(Shape("small", ((300,), (7, 3)), ((4,),)), torch.device("cpu"))
    contender = CONTENDERS[OURS](model)
    seen = []
    for _ in range(3):
        converge._turn(model, contender)
        model.diverge()
        mine = model.weights[0].detach().clone()
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, mine)
        seen.append((not torch.equal(*theirs), model.holds_mean(buffers=True)))
    return seen


def _check_contenders():
    liars = {"first_only": _FirstOnly, "buffers_too": _BuffersToo, "honest": PerTensor}
    yield {name: _measure(name, contender) for name, contender in liars.items()}
    yield _divergences()


@pytest.fixture(scope="module")
def checked():
    return run(_check_contenders)


def test_a_contender_that_does_not_compute_the_mean_is_found(checked):
    assert checked[0] == {
        "first_only": "first_only does not compute the mean of small over 2 processes.",
        "buffers_too": "buffers_too does not compute the mean of small over 2 processes.",
        "honest": None,
    }


def test_every_turn_has_something_to_average(checked):
    assert checked[1] == [(True, False)] * 3


# ---------------------------------------------------------------------------------------------------- processes


def _raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is unwell")
    time.sleep(1000)  # deaf: nothing but a signal ends it


def _die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    time.sleep(1000)


def _hang():
    yield "this much"
    time.sleep(1000)


def test_a_process_that_raises_ends_the_others_and_says_why():
    with pytest.raises(ProcessRaisedException, match="rank 0 is unwell"):
        run(_raise_on, 0)


def test_a_process_that_dies_ends_the_others():
    with pytest.raises(ProcessExitedException, match="exit code 7"):
        run(_die_on, 1)


def test_processes_that_hang_are_killed_at_the_limit():
    with pytest.raises(TimeoutError, match="2 processes of the benchmark did not end within 1 s"):
        run(_hang, limit=1.0)
    assert multiprocessing.active_children() == []


def test_results_come_one_by_one_and_whoever_stops_reading_ends_the_processes():
    results = processes.run(_hang, 2, (), device="cpu", limit=100.0)
    assert next(results) == "this much"
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []


# ------------------------------------------------------------------------------------------- the model of the network


def test_all_reduces_are_measured_and_fitted():
    sizes = (2**10, 2**18, 2**24)
    timed = fit.measure(sizes, limit=100.0)
    assert [(one.ranks, one.nbytes) for one in timed] == [(n, size) for n in (2, 3, 4) for size in sizes]
    assert all(one.seconds > 0 for one in timed)
    found = fit.fit(timed)
    assert found.link.alpha >= 0
    assert found.link.bandwidth > 0
    assert found.held_out_error >= 0


def test_a_converge_is_predicted_and_measured():
    (two, four) = fit.predict(Link(1e-4, 1e9, "a test"), ("1k",), seconds=0.1)
    assert (two.shape, two.ranks, four.shape, four.ranks) == ("1k", 2, "1k", 4)
    assert 2 * 1e-4 < two.model < 3 * 1e-4  # 4 kB are next to nothing
    assert 6 * 1e-4 < four.model < 7 * 1e-4
    assert min(two.measured, four.measured) > 0
