"""DeepSpeed's settings in the training program: the run's own go in, contradictions are named. Needs no DeepSpeed."""

import json
from pathlib import Path

import pytest

from hdet.train.config import Config, ConfigError, OptimizerConfig, TrainConfig
from hdet.train.deepspeed_strategy import _read

CONFIGS = Path(__file__).parents[2] / "configs"


def run_with(path, **train):
    return Config(train=TrainConfig(strategy="deepspeed", deepspeed_config=str(path), **train))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configs_take_the_runs_settings(stage):
    config = run_with(CONFIGS / f"deepspeed_zero{stage}.json", batch_size=6, accumulate=2, dtype="bfloat16")
    settings = _read(config)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_micro_batch_size_per_gpu"] == 6
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == OptimizerConfig().grad_clip
    assert settings["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"gradient_clipping": 5.0}, r"gradient_clipping=5.0, and the run 1.0: leave it to optimizer.grad_clip"),
        ({"train_micro_batch_size_per_gpu": 3}, "leave it to train.batch_size"),
        ({"bf16": {"enabled": True}}, "leave it to train.dtype"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer': leave it to the section optimizer"),
        ({"scheduler": {"type": "OneCycle"}}, "'scheduler'"),
        ({"fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_a_contradiction_is_named(tmp_path, contents, message):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(ConfigError, match=message):
        _read(run_with(path))


def test_a_setting_that_agrees_may_stay(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"gradient_clipping": 1.0}))
    assert _read(run_with(path))["gradient_clipping"] == 1.0


def test_no_file_a_missing_one_and_one_that_is_no_json(tmp_path):
    with pytest.raises(ConfigError, match=r"needs train\.deepspeed_config"):
        _read(Config(train=TrainConfig(strategy="deepspeed")))
    with pytest.raises(ConfigError, match="No such file"):
        _read(run_with(tmp_path / "missing.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        _read(run_with(tmp_path / "bad.json"))


def test_what_does_not_go_together():
    with pytest.raises(ConfigError, match=r"train\.compile"):
        _read(run_with(CONFIGS / "deepspeed_zero1.json", compile=True))
    with pytest.raises(ConfigError, match=r"train\.strategy=deepspeed"):
        TrainConfig(deepspeed_config="configs/deepspeed_zero1.json")
    with pytest.raises(ConfigError, match=r"train\.replicas=0"):
        TrainConfig(replicas=0)
