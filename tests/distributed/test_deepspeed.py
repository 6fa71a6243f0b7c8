"""The real DeepSpeed on 4 processes: 2 replicas of 2 shards each. Read from the scenarios of deepspeed_worker.py."""

import importlib.util
import pickle
from pathlib import Path

import pytest
from conftest import torchrun

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
RANKS = range(4)
STAGES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
every_stage = pytest.mark.parametrize("kind", [*STAGES, (1, "bf16+fp32")], ids=lambda kind: f"zero{kind[0]}-{kind[1]}")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank returned from a scenario, by rank. All scenarios run in one launch: imports take seconds."""
    out = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        run = torchrun(4, [str(Path(__file__).parent / "deepspeed_worker.py"), str(out)], limit=240)

    def read(scenario):
        files = [out / f"{scenario}.{rank}.pickle" for rank in RANKS]
        assert all(file.exists() for file in files), f"{scenario} did not end:\n{run.stdout[-8000:]}"
        return [pickle.loads(file.read_bytes()) for file in files]

    return read


@every_stage
def test_replicas_are_equal_at_the_start_although_seeded_differently(results, kind):
    """DeepSpeed's broadcast reaches the ranks of one replica, and leaves out buffers and what is frozen."""
    assert all(result[kind]["equal_at_start"] for result in results("stages"))


@every_stage
def test_the_masters_converge_to_the_replicas_mean(results, kind):
    """By DeepSpeed's own accounting of which element belongs to which parameter, not by hdet's."""
    for result in results("stages"):
        assert result[kind]["parted"] > 1e-3
        assert result[kind]["error"] <= 1e-7
        assert result[kind]["equal_at_round_end"]


@every_stage
def test_the_forward_pass_uses_the_mean(results, kind):
    """Against a plain module that holds the mean of the replicas' masters, rounded to the model's dtype."""
    for result in results("stages"):
        engine, reference, module = result[kind]["losses"]
        assert engine == module == pytest.approx(reference, abs=1e-7)


@every_stage
def test_learning_rates_differ_per_replica_and_not_per_shard(results, kind):
    rates = [result[kind]["rates"] for result in results("stages")]
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]
    for low, high in zip(rates[0], rates[2], strict=True):
        assert max(low, high) / min(low, high) == pytest.approx(1.3 / 0.7)


def test_every_way_of_keeping_masters_was_tested(results):
    names = {kind: result["optimizer"] for kind, result in results("stages")[0].items()}
    assert names[0, "fp32"] == "AdamW"
    assert names[0, "bf16"] == "FP16_UnfusedOptimizer"
    assert names[1, "bf16+fp32"] == "BF16_Optimizer"
    assert {names[stage, precision] for stage in (1, 2) for precision in ("fp32", "bf16")} == {"DeepSpeedZeroOptimizer"}
    assert {names[3, precision] for precision in ("fp32", "bf16")} == {"DeepSpeedZeroOptimizer_Stage3"}


def test_zero_over_the_whole_world_is_refused_with_the_way_out(results):
    for result in results("guards"):
        assert "one per slice of the model" in result["whole_world"][0]
        assert "mpu=ReplicaGroups(replicas)" in result["whole_world"][0]
        assert result["spread_0"][0]  # without a spread it is torch's OneCycleLR, and fine
        assert "Invalid replicas=3" in result["replicas"][0]
        assert "has a scheduler already" in result["twice"][0]
        assert "only the engine may" in result["auto"][0]
        assert "Do not pass model=" in result["model"][0]


def test_zero_0_without_groups_shares_gradients(results):
    for result in results("guards"):
        assert len({rate for (rate,) in result["shared"]["rates"]}) == 4
        assert result["shared"]["moments_equal"]
        assert result["shared"]["parted"] > 1e-3
        assert result["shared"]["equal"]


def test_the_loss_reaches_the_scheduler_through_the_engine(results):
    ranks = results("losses")
    assert ranks[0]["given"] == ranks[1]["given"] != ranks[2]["given"]
    for result in ranks:
        means = [sum(ranks[rank]["given"]) / 3 for rank in (0, 2)]
        assert result["seen"] == pytest.approx(means)
        assert result["without"] == (6, True)  # engine.step() without lr_kwargs fans out and converges all the same


def test_an_error_inside_step_is_not_swallowed_by_the_engine(results):
    """After a TypeError in scheduler.step() the engine calls it again with its batch size, an int."""
    for result in results("losses"):
        error, first = result["int"]
        assert "got the int 16" in error
        assert "got str" in first
        assert result["steps_after_int"] == 6


def test_a_step_that_one_replica_skips_is_counted_on_all(results):
    """On gradients that are not finite the engine skips the update and, on that replica only, the scheduler."""
    for rank, result in enumerate(results("skipped")):
        for kind in [(1, "fp32"), (3, "bf16")]:
            assert result[kind]["applied"] == [True, rank < 2, True, True, True, True]
            assert result[kind]["steps"] == 6
            assert result[kind]["equal"]
            assert result[kind]["excluded"] == ()


@pytest.mark.parametrize("kind", [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")], ids=str)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(results, kind):
    """Two replicas' files have the same names, and their optimizer states differ: each has a directory."""
    for result in results("resume"):
        result = result[kind]
        assert result["nothing"] is None  # nothing to load before the first save
        assert result["client_state"] == 4
        assert result["masters"]
        assert result["full"]
        assert result["rates"]
        assert result["state"]
        assert result["slow_average"]
        assert result["steps"] == (9, 9)
        assert result["latest"] == "global_step4"
        saved = result["saved_rates"]
        assert len({name.split("/")[0] for name in saved}) == 2
        assert len({str(rates) for rates in saved.values()}) == 1  # base learning rates, not a replica's


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_probe_sees_its_points_through_the_module(results, precision):
    """ZeRO 1 keeps the whole model on every rank and ZeRO 3 gathers it: the same points give the same losses."""
    for result in results("probe"):
        one, three = result[1, precision], result[3, precision]
        assert one["seen"] == three["seen"]
        assert all(len(set(one["seen"][i : i + 4])) == 4 for i in range(8, len(one["seen"]), 4))
        assert one["gain"] == three["gain"] != 1
        assert one["probe"] == three["probe"]
        assert one["first_weight"] == three["first_weight"]  # the parameters are back at the mean


def test_the_probe_under_zero_equals_the_probe_without(results):
    for result in results("probe"):
        assert result[0, "fp32"]["seen"] == pytest.approx(result[1, "fp32"]["seen"], abs=1e-5)
        assert result[0, "fp32"]["gain"] == pytest.approx(result[1, "fp32"]["gain"], rel=1e-2)


def test_members_of_a_replica_have_the_same_gain(results):
    ranks = results("probe")
    for kind in ranks[0]:
        assert len({result[kind]["gain"] for result in ranks}) == 1
        assert ranks[0][kind]["rate"] == ranks[1][kind]["rate"] != ranks[2][kind]["rate"]
