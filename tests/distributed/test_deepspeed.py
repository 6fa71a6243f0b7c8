"""The real DeepSpeed on 4 processes: 2 replicas of 2 shards each. Read from the scenarios of deepspeed_worker.py."""

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import launch_forked

from hdet.monitor.base import read_jsonl

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
RANKS = range(4)
ROOT = Path(__file__).parents[2]
STAGES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
every_stage = pytest.mark.parametrize("kind", [*STAGES, (1, "bf16+fp32")], ids=lambda kind: f"zero{kind[0]}-{kind[1]}")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank returned from a scenario, by rank. All scenarios run in one launch: imports take seconds."""
    out = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        run = launch_forked(4, "deepspeed_worker.py", str(out))

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
        assert "Invalid gradients='shared'" in result["gradients"][0]
        assert "virtual_replicas=" in result["virtual_replicas"][0]
        assert "not supported at ZeRO stage 3" in result["per_group"][0]
        for policy in ("average", "verify", "reset"):
            assert f"Invalid optimizer_state='{policy}'" in result[f"optimizer_state={policy}"][0]
            assert "each replica keeps its own" in result[f"optimizer_state={policy}"][0]
        assert "takes the engine" in result["engine"][0]
        assert "deepspeed.utils.groups.mpu = None" in result["left_over"][0]


def test_zero_0_without_groups_shares_gradients(results):
    for result in results("guards"):
        assert len({rate for (rate,) in result["shared"]["rates"]}) == 4
        assert result["shared"]["moments_equal"]
        assert result["shared"]["parted"] > 1e-3
        assert result["shared"]["equal"]


def test_the_loss_reaches_the_scheduler_through_the_engine(results):
    ranks = results("losses")
    given = [sum(result["given"]) / 3 for result in ranks]
    assert len(set(given)) == 4
    for result in ranks:
        means = [(given[0] + given[1]) / 2, (given[2] + given[3]) / 2]  # of a replica's members
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
        assert result["client_state"] == (4, False)
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


def test_loading_a_checkpoint_runs_nothing_unless_it_is_trusted(results):
    for result in results("resume"):
        refused, has_run, has_run_trusted = result["objects"]
        assert "weights_only=False" in refused
        assert not has_run
        assert has_run_trusted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_probe_sees_its_points_through_the_module(results, precision):
    """ZeRO 1 keeps the whole model on every rank and ZeRO 3 gathers it: the same points give the same losses."""
    for result in results("probe"):
        one, three = result[1, precision], result[3, precision]
        assert one["seen"] == three["seen"]
        probes = [one["seen"][i : i + 5] for i in range(0, len(one["seen"]), 5)]
        assert [len(set(points)) for points in probes] == [5] * 7
        assert one["gain"] == three["gain"]
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


features = pytest.mark.parametrize("kind", [(1, "bf16"), (3, "fp32")], ids=lambda kind: f"zero{kind[0]}-{kind[1]}")


@features
def test_a_round_that_blew_up_is_undone(results, kind):
    """Masters, moments and the module's copies are those of the last converge."""
    ranks = [result[kind] for result in results("rollback")]
    for result in ranks:
        assert result["parted"] > 1e-3
        assert result["rolled_back"]
        assert result["masters"]
        assert result["moments"]
        assert result["equal"] == (True, True)
        before, *now = result["gain"]
        assert now == [before / 3, before / 3]
        assert result["after"] == (False, before / 3, (True, True))
    assert len({result["gain"] for result in ranks}) == 1


@features
def test_overlap_corrects_the_masters_late(results, kind):
    for result in results("overlap"):
        result = result[kind]
        assert result["untouched"]  # at the round's end
        assert result["parted"] > 1e-3
        assert result["error"] <= 1e-7
        assert result["late"] == (False, True)
        assert result["converged"] == result["converged_inside"] == (True, True)


@pytest.mark.parametrize("kind", [(1, "bf16", 0.0), (3, "fp32", 0.3), (3, "fp32", 0.0)], ids=str)
def test_hyperparameters_differ_per_replica_and_not_per_shard(results, kind):
    """As the optimizer inside DeepSpeed's sees them. With a spread, two replicas take turns: every other round tells of
    the learning rate."""
    ranks = [result[kind] for result in results("hyperparameters")]
    explored = []
    for i, values in enumerate(ranks[0]["reported"]):
        assert [result["applied"][i] for result in ranks] == [{values[rank // 2]} for rank in RANKS]
        explored.append(values[0] != values[1])
    assert sum(explored) == (4 if kind[2] else 8)
    for result in ranks:
        assert result["reported"] == ranks[0]["reported"]
        assert result["centres"] == ranks[0]["centres"]
        assert result["effects"] == pytest.approx(ranks[0]["effects"], abs=0, nan_ok=True)
        if not kind[2]:  # then every round tells of it, and 8 are enough
            assert result["centres"][-1] != pytest.approx(0.1, rel=1e-3)
        assert result["equal"] == (True, True)


@features
def test_outer_momentum_moves_the_masters(results, kind):
    for result in results("outer_momentum"):
        result = result[kind]
        assert max(result["errors"]) <= 1e-6
        assert result["equal"] == [(True, True)] * 3
        assert result["from_plain"] > 1e-3


@features
def test_local_gradients_alone_make_replicas(results, kind):
    """With ``spread=0`` and nothing explored they converge all the same: Local SGD."""
    for result in results("outer_momentum"):
        assert result[kind]["local"] == [(False, True), (True, True)]


@features
def test_each_replica_keeps_its_optimizer_state(results, kind):
    assert all(result[kind]["moments_kept"] for result in results("outer_momentum"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of the training program, by ZeRO stage: whole, and in two parts. And what it printed."""
    root = tmp_path_factory.mktemp("program")
    tiny = ["--model.n_layer=1", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1"]
    tiny += ["--train.batch_size=4", "--train.total_steps=8", "--train.eval_every=4", "--train.eval_batches=5"]
    tiny += ["--train.log_every=2", "--hdet.converge_every=2", "--hdet.spread=0.3", "--hdet.auto_lr=false"]
    tiny += ["--train.strategy=deepspeed", "--train.accumulate=2"]
    tiny += ["--hdet.gradients=local"]
    runs = []
    for stage, dtype in [(1, "float32"), (3, "bfloat16")]:
        common = [f"--train.deepspeed_config={ROOT}/configs/deepspeed_zero{stage}.json", f"--train.dtype={dtype}"]
        grouped = [*tiny, *common, "--train.replicas=2"]
        runs += [[*grouped, f"--train.log_dir={root}/whole{stage}"]]
        runs += [
            [*grouped, f"--train.log_dir={root}/parts{stage}", *more] for more in (["--train.stop_at=4"], ["--resume"])
        ]
    zero2 = [*tiny, f"--train.deepspeed_config={ROOT}/configs/deepspeed_zero2.json"]
    runs += [[*zero2, "--hdet.spread=0", f"--train.log_dir={root}/plain"]]
    runs += [
        [*zero2, f"--train.log_dir={root}/refused"],
        [*zero2, f"--train.log_dir={root}/refused", "--train.replicas=3"],
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        run = launch_forked(4, "train_runs.py", *map(json.dumps, runs))
    assert run.returncode == 0, run.stdout[-8000:]
    return root, run.stdout


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.slow
def test_the_training_program_resumes_bit_for_bit(trained, stage):
    root, output = trained
    assert output.count("2 replicas of 2 processes each on cpu, spread 0.3") == 6  # by one process of each run
    ours, theirs = root / f"parts{stage}", root / f"whole{stage}"
    curves = [[r | {"seconds": 0} for r in read_jsonl(run / "metrics.jsonl")] for run in (ours, theirs)]
    assert curves[0] == curves[1]
    assert [r["step"] for r in read_jsonl(theirs / "rounds.jsonl")] == [2, 4, 6, 8]
    assert all(min(r["distance"]) > 0 for r in read_jsonl(theirs / "rounds.jsonl"))
    files = sorted(path.relative_to(theirs) for path in theirs.glob("deepspeed/replica*/step8/*.pt"))
    assert len(files) == {1: 2 * (1 + 2 + 2), 3: 2 * (2 + 2 + 2)}[stage]
    assert not list(ours.glob("deepspeed/replica*/step4"))  # only the newest is kept
    for file in files:
        if "optim_states" in file.name:
            states = [torch.load(run / file, weights_only=False)["optimizer_state_dict"] for run in (ours, theirs)]
            masters = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            for mine, whole in zip(*(state[masters] for state in states), strict=True):
                torch.testing.assert_close(mine, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_the_baseline_and_what_the_training_program_refuses(trained):
    root, output = trained
    assert json.loads((root / "plain" / "summary.json").read_text())["spread"] == 0
    assert output.count("refused: ZeRO stage 2 cuts each replica's model into shards") == 4
    assert output.count("refused: Invalid train.replicas=3") == 4
    assert not (root / "refused").exists()
