"""The benchmark's arithmetic: shapes, ratios, verdicts, tables, the command line. Its runs are in tests/distributed."""

import json
import math
import platform
from dataclasses import replace

import pytest
import torch
from torch import nn

from hdet.bench import graph, plot, processes, report
from hdet.bench.__main__ import parser, settings_of
from hdet.bench.kernels import measure as measure_kernels
from hdet.bench.measure import OURS, Comparison, alternate, repeated, spread_of
from hdet.bench.sections import SECTIONS
from hdet.bench.shapes import EQUAL, SHAPES, Shape, gpt2, resnet50, tiny


def comparison(section="converge", case="a case", samples=None, **facts):
    return Comparison(section, case, facts, samples or {OURS: [1.0, 2.0, 3.0], "other": [2.0, 2.0, 12.0]})


def verdicts(*results):
    return {target.name: target for target in report.targets(results)}


# ------------------------------------------------------------------------------------------------------ shapes


def test_resnet50_has_torchvisions_parameters():
    shape = resnet50()
    assert (shape.numel, len(shape.parameters)) == (25_557_032, 161)
    assert sum(math.prod(size) for size in shape.buffers) == 2 * 26_560
    assert len(shape.buffers) == 2 * 53


def test_gpt2_has_openais_parameters():
    shape = gpt2()
    assert (shape.numel, len(shape.parameters)) == (124_439_808, 148)


def test_gpt2_is_the_shape_of_a_transformer_with_a_tied_head():
    width, layers, vocabulary, context = 16, 2, 31, 8
    block = nn.TransformerEncoderLayer(width, 4, 4 * width)
    ours = gpt2(width, layers, vocabulary, context)
    blocks = layers * sum(p.numel() for p in block.parameters())
    assert ours.numel == blocks + (vocabulary + context) * width + 2 * width


def test_tiny_is_5000_tensors_of_64_elements_on_average():
    shape = tiny()
    sizes = [math.prod(size) for size in shape.parameters]
    assert len(sizes) == 5000
    assert (min(sizes), max(sizes)) == (1, 127)
    assert shape.numel / 5000 == pytest.approx(64, abs=0.1)


def test_shapes_go_by_their_names_and_from_1k_to_300m():
    assert all(build().name == name for name, build in SHAPES.items())
    series = [SHAPES[name]() for name in EQUAL]
    assert [len(shape.parameters) for shape in series] == [200] * len(series)
    assert (series[0].numel, series[-1].numel) == (1_000, 300_000_000)


# ------------------------------------------------------------------------------------------------- measurements


def test_ratios_are_taken_within_a_round():
    spread = comparison().ratio("other")
    assert spread.median == 2.0  # of 2, 1 and 4; not the ratio of medians, which is 1
    assert (spread.low, spread.high) == (1.5, 3.0)


def test_a_single_sample_has_no_spread():
    assert spread_of([3.0]) == (3.0, 3.0, 3.0)


def test_contenders_take_turns_in_a_changing_order():
    calls = []

    def contender(name):
        return lambda: calls.append(name) or 1.0

    samples = alternate({name: contender(name) for name in "abc"}, repeat=20, seconds=1e9)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert samples == {name: [1.0] * 20 for name in "abc"}
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(rounds) == 21  # the first warms up
    assert len({tuple(turns) for turns in rounds}) > 1


def test_rounds_fit_into_the_time_and_are_agreed_upon():
    asked = []
    samples = alternate({"a": lambda: 1.0}, repeat=100, seconds=0.0, agree=lambda n: asked.append(n) or 5)
    assert asked == [3]
    assert len(samples["a"]) == 5


def test_a_round_made_already_is_not_made_again():
    calls = []
    alternate({"a": lambda: calls.append(1) or 1.0}, repeat=100, seconds=10.0, cost=2.5)
    assert len(calls) == 4


def test_repeated_work_is_timed_per_call():
    calls = []
    measure = repeated(lambda: calls.append(1), at_least=1e-4)
    before = len(calls)
    seconds = measure()
    assert 0 < seconds < 1e-2
    assert len(calls) - before > 10


def test_kernels_are_checked_and_compared_on_every_dtype(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", lambda: Shape("small", ((3, 5), (7,), (1,), (40, 25))))
    results = list(measure_kernels(["small"], [torch.float32, torch.bfloat16], repeat=3, seconds=0.01, device="cpu"))
    cases = [f"{op} small {dtype}" for dtype in ("float32", "bfloat16") for op in ("pack", "unpack")]
    assert [result.case for result in results] == cases
    for result in results:
        assert set(result.samples) == {OURS, "foreach", "foreach_same", "per_tensor", "memcpy"}
        assert result.facts["backend"] in ("native", "reference")
    # read and written: 4 + 4 bytes per element to pack fp32, 4 + 4 + 4 to unpack (the distance reads the pieces)
    assert [r.facts["bytes"] for r in results] == [1023 * n for n in (8, 12, 6, 8)]


def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", lambda: Shape("small", ((3, 5), (7,))))
    monkeypatch.setattr("hdet.ops.pack", lambda wire, pieces: wire.fill_(1.0))
    with pytest.raises(RuntimeError, match="hdet: wrong result of pack on 2 tensors"):
        next(measure_kernels(["small"], [torch.float32], repeat=3, seconds=0.01, device="cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_are_timed_by_two_clocks(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", lambda: Shape("small", ((3, 5), (7,), (1,), (40, 25))))
    results = list(measure_kernels(["small"], [torch.float32, torch.bfloat16], repeat=3, seconds=0.01, device="cuda"))
    assert [result.facts["clock"] for result in results] == ["device", "wall"] * 4
    assert all(min(result.samples[OURS]) > 0 for result in results)
    assert 1e10 < results[0].facts["copy_bandwidth"] < 1e14  # bytes per second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_graph_holds_a_step_with_its_converge():
    (result,) = processes.run(graph.measure, 1, (3, 0.1), device="cuda", limit=120)
    assert set(result.samples) == {OURS, "eager"}


# ------------------------------------------------------------------------------------------------------ targets


def test_nothing_measured_is_nothing_judged():
    assert {target.verdict for target in report.targets([])} == {"not measured"}
    skipped = Comparison("converge", "300m", {"shape": "300m", "processes": 4}, skipped={OURS: "not enough memory"})
    assert {target.verdict for target in report.targets([skipped])} == {"not measured"}


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [([2.0] * 5, "met"), ([0.5] * 5, "missed"), ([0.9, 0.9, 0.9, 1.1, 1.1], "within noise")],
)
def test_the_worst_alternative_decides(theirs, verdict):
    results = [
        comparison(case="good", samples={OURS: [1.0] * 5, "x": [3.0] * 5}, shape="1k", processes=2),
        comparison(case="bad", samples={OURS: [1.0] * 5, "x": [3.0] * 5, "y": theirs}, shape="10k", processes=2),
    ]
    target = verdicts(*results)["converge: against every alternative"]
    assert target.verdict == verdict
    assert "bad, y" in target.measured


def test_the_per_tensor_loop_is_judged_on_1m_alone():
    slow = comparison(samples={OURS: [1.0] * 3, "per_tensor": [2.0] * 3}, shape="100m", processes=2)
    fast = comparison(samples={OURS: [1.0] * 3, "per_tensor": [60.0] * 3}, shape="1m", processes=2)
    target = verdicts(slow, fast)["converge of 1M elements in 200 tensors: against the per-tensor loop"]
    assert (target.verdict, target.measured) == ("met", "60x (a case)")


def test_a_slow_step_is_missed_from_above():
    result = comparison("step", samples={OURS: [1.6] * 3, "torch": [1.0] * 3}, groups=1)
    target = verdicts(result)["step(loss): time over torch's OneCycleLR.step"]
    assert (target.verdict, target.measured, target.wanted) == ("missed", "1.60x (a case)", "at most 1.50x")


def test_overhead_is_what_the_scheduler_adds_to_a_plain_round():
    facts = {"processes": 2, "converge_every": 50, "probe": False}
    whole = comparison("overhead", samples={OURS: [9.0] * 3, "plain_ddp": [10.0] * 3}, part="round", **facts)
    inside = comparison("overhead", samples={OURS: [0.5] * 3, "plain_ddp": [0.2] * 3}, part="scheduler", **facts)
    target = verdicts(whole, inside)["a training run, T=50: time added to plain DDP"]
    assert (target.verdict, target.measured) == ("missed", "3.00% (a case)")


def test_a_whole_run_is_probed_in_a_share_of_its_rounds():
    results = []
    for probe, seconds in ((True, 0.5), (False, 0.1)):
        facts = {"processes": 2, "converge_every": 100, "probe": probe, "probed_share": 0.6 * probe}
        for part, ours, plain in (("round", 9.0, 10.0), ("scheduler", 0.1 + seconds, 0.1)):
            result = comparison("overhead", samples={OURS: [ours] * 3, "plain_ddp": [plain] * 3}, part=part, **facts)
            results.append(replace(result, case=f"2 processes, T=100{', probe' * probe}, scheduler.step"))
    name = "a training run of 100 rounds with a probe, T=100: time added to plain DDP"
    target = verdicts(*results)[name]
    assert (target.verdict, target.measured.split(" ")[0]) == ("missed", "3.40%")  # 0.6 * 5% + 0.4 * 1%
    assert verdicts(*results[:2])[name].verdict == "not measured"
    probe = verdicts(*results)["the probe in a training run of 100 rounds, T=100: time added to hdet without one"]
    assert (probe.verdict, probe.measured.split(" ")[0]) == ("missed", "2.40%")  # 0.6 * (5% - 1%)


def kernel(op, ratio, **facts):
    facts = {"op": op, "shape": "gpt2", "parameters": 124_439_808, "bytes": 8, "copy_bandwidth": 1.0, **facts}
    return comparison("kernels", samples={OURS: [10.0] * 3, "memcpy": [10 * ratio] * 3, "foreach": [40.0] * 3}, **facts)


def test_cpu_and_gpu_kernels_have_targets_of_their_own():
    cpu = [kernel("pack", 0.9, device="cpu", clock="wall"), kernel("unpack", 0.7, device="cpu", clock="wall")]
    small = kernel("pack", 0.1, device="cpu", clock="wall", shape="tiny", parameters=320_000)
    found = verdicts(*cpu, small)
    assert found["CPU pack of 25M elements and more: speed against a memory copy"].verdict == "met"
    assert found["CPU unpack of 25M elements and more: speed against a memory copy"].verdict == "missed"
    assert found["GPU pack and unpack of GPT-2: share of the card's copy bandwidth"].verdict == "not measured"

    gpu = [
        kernel("pack", 1.0, device="cuda", clock=clock, shape=s)
        for clock in ("device", "wall")
        for s in ("gpt2", "tiny")
    ]
    found = verdicts(*gpu)
    share = found["GPU pack and unpack of GPT-2: share of the card's copy bandwidth"]
    assert (share.verdict, share.measured) == ("missed", "0.80x (a case)")  # 8 bytes in 10 s, of 1 byte per second
    assert found["GPU pack and unpack of 5,000 tiny tensors: against foreach"].measured == "4.00x (a case)"
    assert found["CPU pack of 25M elements and more: speed against a memory copy"].verdict == "not measured"


# ------------------------------------------------------------------------------------------------------- output


def test_tables_show_ratios_and_why_something_was_skipped():
    skipped = comparison(case="1k, 2 processes")
    skipped.skipped["accelerate"] = "accelerate is not installed"
    text = report.tables([skipped, comparison(case="10k, 2 processes"), comparison("step", case="1 parameter group")])
    headers = [line.split() for line in text.splitlines() if line.startswith("    ") and "other" in line]
    assert headers == [["rounds", OURS, "other"], ["rounds", OURS, "other", "accelerate"]]  # step, converge
    row = next(line for line in text.splitlines() if line.startswith("1k"))
    assert row.split("  ")[-1].strip() == "-"
    assert "2 s (1.5-2.5)" in row
    assert "2.00 (1.50-3.00)" in row
    assert "skipped 1 times: accelerate: accelerate is not installed" in text
    assert "torch " + torch.__version__ in text


def test_a_case_that_was_skipped_altogether_has_a_row():
    text = report.tables([Comparison("converge", "300m, 4 processes", {}, {}, {OURS: "not enough memory"})])
    assert "300m, 4 processes  0       -" in text
    assert "not enough memory" in text


def test_json_holds_samples_targets_and_no_host_name():
    found = report.as_json([comparison(shape="1k", processes=2)], {"repeat": 3})
    text = json.dumps(found)
    assert found["schema"] == report.SCHEMA
    assert found["results"][0]["samples"][OURS] == [1.0, 2.0, 3.0]
    assert found["machine"]["torch"] == torch.__version__
    assert len(found["targets"]) == 10
    assert platform.node() not in text or len(platform.node()) < 4


def test_plot_draws_whatever_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        comparison(samples={OURS: [n * 1e-6] * 3, "per_tensor": [n * 1e-5] * 3}, shape=name, parameters=n, processes=p)
        for name, n in (("1k", 1000), ("1m", 10**6), ("gpt2", 124_439_808))
        for p in (2, 4)
    ]
    for i, chosen in enumerate((results, results[:1], [])):
        plot.draw(chosen, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------- command line


def test_defaults_measure_everything_on_2_and_4_processes():
    settings = settings_of(parser().parse_args([]))
    assert (settings.sections, settings.processes, settings.shapes) == (SECTIONS, (2, 4), tuple(SHAPES))


def test_quick_is_small_but_complete():
    settings = settings_of(parser().parse_args(["--quick", "--processes", "2"]))
    assert settings.sections == SECTIONS
    assert all(SHAPES[name]().numel <= 100_000 for name in (*settings.shapes, *settings.kernel_shapes))
    assert settings.repeat == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "must be at least 2, got 1"),
        (["--repeat", "1"], "must be at least 3, got 1"),
        (["--shapes", "gpt3"], "invalid choice: 'gpt3'"),
        (["--sections", "all"], "invalid choice: 'all'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(arguments)
    assert message in capsys.readouterr().err


def test_cpu_is_used_where_gpus_are_asked_for_and_missing(capsys):
    settings = settings_of(parser().parse_args(["--device", "cuda"]))
    if torch.cuda.device_count() < 1000:
        assert settings.device_for(1000) == "cpu"
        assert "1000 GPUs are needed" in capsys.readouterr().err
