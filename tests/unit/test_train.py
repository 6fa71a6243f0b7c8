"""The training program in one process: configuration, data, models, optimizer, checkpoints, signals, the whole run."""

import ast
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hdet
from hdet.monitor.base import read_jsonl
from hdet.replicas.topology import Replicas
from hdet.train import __main__ as program
from hdet.train import checkpoint, compare, data, models, optimization
from hdet.train.config import Config, ConfigError, ModelConfig, OptimizerConfig, TaskConfig, parse
from hdet.train.stop import StopRequest

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = ["--model.n_layer=1", "--model.n_embd=16", "--model.block_size=16", "--train.batch_size=4"]


def generator(*key):
    return torch.Generator().manual_seed(data.step_seed(*key))


def run(monkeypatch, log_dir, *arguments):
    """The exit status of ``python -m hdet.train``."""
    monkeypatch.setattr(sys, "argv", ["hdet.train", *TINY, f"--train.log_dir={log_dir}", *arguments])
    return program.main()


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.total_stepz=3"], "train.total_stepz"),
        (["--hdet.publishd.momentum=3"], "hdet.publishd"),
        (["--train.total_steps=1.5"], "train.total_steps"),
        (["--train.total_steps=many"], "train.total_steps"),
        (["--optimizer.name=adam"], "optimizer.name"),
        (["--optimizer.max_lr=-1"], "optimizer.max_lr"),
        (["--optimizer.betas=[0.9,1]"], "optimizer.betas"),
        (["--model.n_head=3"], "model.n_head"),
        (["--model.dropout=1"], "model.dropout"),
        (["--hdet.published.momentum=2"], "momentum"),
        (["--hdet.posterior.memory=2"], "memory"),
        (["--hdet.posterior.momentum=0.5"], "hdet.posterior.momentum"),
        (["--hdet.published.momentum=0.5"], r"no effect without hdet\.controller=published"),
        (["--hdet.controller=published", "--hdet.posterior.evidence_error=9"], r"hdet\.posterior has no effect"),
        (["--hdet.controller=published", "--hdet.probe=true"], r"no use with hdet\.controller=published"),
        (["--hdet.controller=two_slope"], r"hdet\.controller"),
        (["--hdet.averaging.overlap_steps=2"], r"Set hdet\.controller=published"),
        (["--hdet.probe=true", "--hdet.auto_lr=false"], r"hdet\.auto_lr=false"),
        (["--hdet.probe=true", "--hdet.averaging.overlap_steps=2"], r"hdet\.averaging\.overlap_steps=2"),
        (["--hdet.rollback=cpu", "--hdet.auto_lr=false"], r"hdet\.rollback=cpu"),
        (["--hdet.rollback=cpu", "--hdet.averaging.overlap_steps=2"], r"hdet\.rollback=cpu"),
        (["--hdet.rollback=gpu"], "hdet.rollback"),
        (["--hdet.probe=sometimes"], "hdet.probe"),
        (["--hdet.hyperparameters={eps: 0.1}"], "Invalid hdet.hyperparameters=eps"),
        (["--hdet.hyperparameters={dropout: 0.1}", "--train.compile=true"], "train.compile"),
        (["--task.probe_fraction=1"], "task.probe_fraction"),
        (["--optimizer.label_smoothing=1"], "optimizer.label_smoothing"),
        (["--optimizer.max_lr=automatic"], "optimizer.max_lr"),
        (["--task.name=text"], "task.path"),
        (["--task.path=somewhere"], "task.path"),
        (["--task.vocab_size=70000"], "task.vocab_size"),
        (["--train.log_every=0"], "train.log_every"),
        (["--train.device=tpu"], "train.device"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_bad_setting_is_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        parse(arguments)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {stepz: 3}", "stepz"),
        ("trian: {total_steps: 3}", "trian"),
        ("train: 3", "train=3"),
        ("hdet: {published: 3}", "hdet"),
        ("hdet: {probe: true, posterior: 3}", "hdet"),
        ("hdet: {two_slope: {step: 0.1}}", "two_slope"),
    ],
)
def test_a_bad_key_in_a_file_is_named(tmp_path, text, named):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        parse([f"--config={file}"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hdet.spread=1.5"], "spread=1.5"),
        (["--hdet.spread=-1"], "spread=-1"),
        (["--hdet.converge_every=-5"], "converge_every=-5"),
        (["--schedule.name=cosinus"], "cosinus"),
        (["--schedule.name=cosine", "--schedule.options.warmup=3"], "warmup"),
        (["--schedule.options.warmup_steps=3"], "warmup_steps"),
        (["--train.device=cuda"], "train.device=cuda"),
        (["--task.name=tokens", "--task.path=nowhere.bin"], "nowhere.bin"),
    ],
)
def test_a_run_that_cannot_start_exits_with_2_and_leaves_nothing(monkeypatch, tmp_path, capfd, arguments, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, tmp_path / "run", *arguments) == 2
    assert named in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {total_steps: 5, seed: 7}\nhdet: {controller: published, published: {momentum: 0.5}}\n")
    config = parse([f"--config={file}", "--train.total_steps=6", "--resume"])
    assert (config.train.total_steps, config.train.seed, config.train.resume) == (6, 7, True)
    assert config.hdet.published == hdet.controller.Published(momentum=0.5)
    assert config.optimizer == OptimizerConfig()


def test_auto_lr_can_be_configured(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {max_lr: auto}\nhdet: {probe: true, rollback: cpu, posterior: {bounds: [0.1, 10]}}\n")
    config = parse([f"--config={file}", "--hdet.per_group=true", "--hdet.posterior.memory=0.1"])
    assert (config.optimizer.max_lr, config.hdet.rollback, config.hdet.per_group) == ("auto", "cpu", True)
    assert config.hdet.posterior == hdet.controller.Posterior(memory=0.1, bounds=(0.1, 10.0))
    assert parse(["--hdet.rollback=false"]).hdet.rollback is False


def test_the_baseline_takes_a_config_with_a_probe():
    """Nothing in the section has an effect at spread 0, so nothing in it can be contradictory."""
    assert parse(["--hdet.spread=0", "--hdet.probe=true", "--hdet.auto_lr=false"]).hdet.spread == 0


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--print_config", "--train.total_steps=6"])
    assert not ended.value.code
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse([f"--config={file}"]) == parse(["--train.total_steps=6"])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid(file):
    config = parse([f"--config={file}"])
    assert config.hdet.spread > 0
    assert config.train.log_dir == f"runs/{file.stem}"


def test_every_setting_has_its_own_docstring():
    tree = ast.parse(Path(sys.modules[Config.__module__].__file__).read_text())
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{section.name}.{field.target.id}"


# ------------------------------------------------------------------------------------------------------------- data


def sources(tmp_path):
    tokens = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 300, 4000, dtype=np.uint16).tofile(tokens)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; " * 99)
    return {
        "char_lm": TaskConfig(name="char_lm"),
        "digits": TaskConfig(name="digits"),
        "tokens": TaskConfig(name="tokens", path=str(tokens), vocab_size=300),
        "text": TaskConfig(name="text", path=str(text)),
    }


@pytest.mark.parametrize("name", ["char_lm", "digits", "tokens", "text"])
def test_a_batch_depends_on_seed_rank_step_and_micro_batch_alone(tmp_path, name):
    task = sources(tmp_path)[name]
    first, second = data.load(task, 16), data.load(task, 16)
    second.draw(5, generator(9, 9, 9))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = first.draw(4, generator(0, 1, 2, 0))
    for mine, theirs in zip(one, second.draw(4, generator(0, 1, 2, 0)), strict=True):
        assert torch.equal(mine, theirs)
    for other in ((1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1), (0, 1, 2, "probe")):
        assert not torch.equal(one.inputs, first.draw(4, generator(*other)).inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert one.targets.dtype == torch.int64
    assert 0 <= one.targets.min() <= one.targets.max() < first.classes


@pytest.mark.parametrize("name", ["char_lm", "tokens", "text"])
def test_targets_are_the_next_tokens(tmp_path, name):
    inputs, targets = data.load(sources(tmp_path)[name], 16).draw(4, generator(0, 0, 0))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_windows_reach_both_ends_of_the_data():
    windows = data.Windows(np.arange(20, dtype=np.uint8), np.arange(12, dtype=np.uint8), 8, 256)
    inputs = windows.draw(500, generator(0, 0, 0)).inputs
    assert (inputs.min(), inputs.max()) == (0, 18)
    assert windows.draw(500, generator(0, 0, 0)).targets.max() == 19
    batches = [windows.validation(i, 2, 2) for i in range(2)]
    assert [int(batch.inputs[row, 0]) for batch in batches for row in range(2)] == [0, 1, 2, 3]


def test_training_and_validation_data_do_not_overlap(tmp_path):
    windows = data.load(sources(tmp_path)["tokens"], 16)
    assert (len(windows.train), len(windows.val)) == (3800, 200)
    digits = data.load(TaskConfig(name="digits"), 1)
    count = digits.validation_batches(50, 1000)
    held_out = torch.cat([digits.validation(i, 50, count).inputs for i in range(count)])
    drawn = torch.cat([digits.draw(500, generator(0, 0, step)).inputs for step in range(20)])
    assert (len(held_out), len(drawn.unique(dim=0))) == (360, pytest.approx(1437, abs=10))


@pytest.mark.parametrize("name", ["tokens", "digits"])
def test_what_the_probe_sees_is_not_trained_on(tmp_path, name):
    task = dataclasses.replace(sources(tmp_path)["tokens"] if name == "tokens" else TaskConfig(name=name))
    drawn = data.load(task, 16, held_out=True)
    if name == "tokens":
        assert (len(drawn.train), len(drawn.held_out), len(drawn.val)) == (3610, 190, 200)
        return
    images = [
        torch.cat([drawn.draw(500, generator(0, 0, step), held_out=kept).inputs for step in range(20)]).unique(dim=0)
        for kept in (False, True)
    ]
    assert [len(x) for x in images] == pytest.approx([1365, 72], abs=10)
    assert len(torch.cat(images).unique(dim=0)) == sum(map(len, images))


def test_data_that_do_not_fit_are_refused(tmp_path):
    task = sources(tmp_path)["tokens"]
    with pytest.raises(ConfigError, match="probe's data has 38 tokens"):
        data.load(dataclasses.replace(task, probe_fraction=0.01), 64, held_out=True)
    with pytest.raises(ConfigError, match="block_size"):
        data.load(task, 5000)
    small = data.load(TaskConfig(name="tokens", path=task.path, vocab_size=100), 16)
    with pytest.raises(ConfigError, match=r"task\.vocab_size=100"):
        small.draw(8, generator(0, 0, 0))
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"abc")
    with pytest.raises(ConfigError, match="uint16"):
        data.load(TaskConfig(name="tokens", path=str(odd)), 16)


# ------------------------------------------------------------------------------------------------ models, optimizer


def test_gpt2_has_as_many_parameters_as_gpt2():
    """Radford et al. 2019's smallest model: 124,439,808 parameters, with the embedding shared."""
    config = parse([f"--config={Path(__file__).parents[2] / 'configs' / 'gpt2_124m.yaml'}"])
    with torch.device("meta"):
        model = models.build(config.model, config.task.name, config.task.vocab_size)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_gpt_starts_as_gpt2_does():
    torch.manual_seed(0)
    model = models.GPT(ModelConfig(n_layer=8, n_embd=64), 256)
    assert model.head.weight is model.tokens.weight
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (model.blocks[0].attention.out, model.blocks[3].out):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert not projection.bias.any()
    assert models.GPT(ModelConfig(tie_weights=False), 256).head.weight is not model.tokens.weight


def test_gpt_does_not_look_ahead():
    model = models.GPT(ModelConfig(n_layer=2, n_embd=16, block_size=8), 50).eval()
    tokens = torch.randint(50, (2, 8), generator=generator(0, 0, 0))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    assert model(tokens[:, :3]).shape == (2, 3, 50)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_decay(name):
    model = models.GPT(ModelConfig(n_layer=1, n_embd=16), 256)
    optimizer = optimization.build_optimizer(OptimizerConfig(name=name), model, torch.device("cpu"))
    decay, no_decay = optimizer.param_groups
    assert (decay["name"], decay["weight_decay"], no_decay["name"], no_decay["weight_decay"]) == (
        "decay",
        0.1,
        "no_decay",
        0.0,
    )
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in no_decay["params"]} == {1}
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("spread", [0, 0.2])
@pytest.mark.parametrize("arguments", [[], ["--schedule.name=cosine", "--schedule.options.warmup_steps=3"]])
def test_one_face_for_every_schedule(spread, arguments):
    """Alone, a replica's learning rates are the plain schedule's, whoever makes them."""
    config = parse([f"--hdet.spread={spread}", "--train.total_steps=10", *arguments])
    model = torch.nn.Linear(2, 2)
    optimizer = optimization.build_optimizer(config.optimizer, model, torch.device("cpu"))
    schedule = optimization.Schedule(config, optimizer, model, [])
    assert (schedule.ensemble is None) == (spread == 0)
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    if arguments:
        cosine = hdet.schedules.cosine(total_steps=10, warmup_steps=3)
        expected = torch.optim.lr_scheduler.LambdaLR(plain, cosine)
    else:
        expected = torch.optim.lr_scheduler.OneCycleLR(plain, 1e-3, 10, cycle_momentum=False)
    for _ in range(10):
        assert schedule.base_lr == expected.get_last_lr()[0]
        assert schedule.gains == {"decay": 1.0, "no_decay": 1.0}
        optimizer.step()
        schedule.step(torch.tensor(1.0))
        plain.step()
        expected.step()


def nothing_to_probe(model, batch):
    raise AssertionError


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--hdet.posterior.evidence_error=0.9"],
        ["--hdet.controller=published", "--hdet.published.momentum=0.5"],
        ["--hdet.probe=true", "--hdet.posterior.memory=0.1", "--hdet.rollback=cpu"],
    ],
)
def test_the_ensemble_gets_what_the_section_says(schedule, arguments):
    arguments = [*arguments, "--train.total_steps=10", "--hdet.per_group=true", f"--schedule.name={schedule}"]
    config = parse(arguments)
    model = torch.nn.Linear(2, 2)
    optimizer = optimization.build_optimizer(config.optimizer, model, torch.device("cpu"))
    probe = hdet.Probe(loss_fn=nothing_to_probe) if config.hdet.probe else None
    ensemble = optimization.Schedule(config, optimizer, model, [], probe).ensemble
    resolved = ensemble.settings
    assert (resolved.probe is not None, resolved.given["per_group"]) == (config.hdet.probe, True)
    assert resolved.controller == getattr(config.hdet, config.hdet.controller)
    assert (resolved.total_steps, resolved.rolls_back) == (10, True)


def test_hyperparameters_are_explored_as_the_section_says():
    settings = ["--hdet.probe=held_out", "--hdet.gradients=local", "--train.total_steps=10", "--hdet.spread=0"]
    spreads = "--hdet.hyperparameters={weight_decay: 0.5, momentum: 0.3, dropout: 0.1, label_smoothing: 0.05}"
    config = parse([*settings, spreads, "--optimizer.label_smoothing=0.2", "--model.dropout=0.3"])
    model = models.build(config.model, "digits", 10)
    optimizer = optimization.build_optimizer(config.optimizer, model, torch.device("cpu"))
    probe = hdet.Probe(loss_fn=nothing_to_probe, batches=[0], held_out=True)
    schedule = optimization.Schedule(config, optimizer, model, [], probe)
    centres = {"weight_decay": 0.1, "momentum": 0.9, "dropout": 0.3, "label_smoothing": 0.2}
    assert schedule.ensemble.centres == pytest.approx(centres)
    assert float(schedule.label_smoothing) == 0.2
    shared = parse(["--hdet.probe=held_out", "--hdet.hyperparameters={dropout: 0.1}"])
    with pytest.raises(ConfigError, match="gradients="):
        optimization.Schedule(shared, optimizer, model, [], probe)


def test_find_max_lr_trains_under_the_run_s_clipping():
    """With SGD and a tiny grad_clip, only a learning rate that is larger in proportion gets anywhere."""
    found = {}
    for grad_clip in (0.0, 1e-2):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        config = OptimizerConfig(name="sgd", max_lr="auto", momentum=0.0, weight_decay=0.0, grad_clip=grad_clip)
        before = [p.clone() for p in model.parameters()]
        found[grad_clip] = optimization.find_max_lr(
            config,
            model,
            lambda model, x: (model(x) - x.sum(-1, keepdim=True)).square().mean(),
            torch.randn(64, 8, 4),
            torch.device("cpu"),
            auto_lr=False,
        ).max_lr
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert found[1e-2] > 5 * found[0.0]


# -------------------------------------------------------------------------------------------- checkpoints and signals


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "config": {}})
    needed = ("step", "config")

    def crash(state, file):
        file.write(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(ConfigError, match=r"Cannot write .*checkpoint\.pt: .*disk full"):
        checkpoint.save(path, {"step": 2, "config": {}})
    assert checkpoint.load(path, {}, needed)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("at", ["write", "fsync", "replace", "directory"])
def test_a_kill_while_saving_leaves_a_usable_checkpoint(tmp_path, at):
    """SIGKILL in the middle of the write, before it is on disk, before and after it takes the old one's place."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "config": {}, "x": torch.ones(1000)})

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(state, file):
        file.write(b"half a checkpoint")
        file.flush()
        die()

    def second(*_):
        os.fsync = die

    target, name, deadly = {
        "write": (torch, "save", half),
        "fsync": (os, "fsync", die),
        "replace": (os, "replace", die),
        "directory": (os, "fsync", second),
    }[at]
    needed = ("step", "config")
    child = os.fork()
    if child == 0:
        try:
            setattr(target, name, deadly)
            checkpoint.save(path, {"step": 2, "config": {}, "x": torch.zeros(1000)})
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoint.load(path, {}, needed)["step"] == (2 if at == "directory" else 1)
    assert path.with_name("checkpoint.pt.tmp").exists() == (at != "directory")
    checkpoint.save(path, {"step": 3, "config": {}})  # what is left of the write that was killed does no harm
    assert checkpoint.load(path, {}, needed)["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("spread", ["0.2", "0"])
def test_a_run_may_be_resumed_with_more_steps(monkeypatch, tmp_path, schedule, spread):
    """From the step of the checkpoint on, the learning rates are those of the longer run."""
    settings = ["--task.name=digits", "--model.channels=2", "--train.eval_every=0", "--train.log_every=1"]
    settings += [f"--schedule.name={schedule}", f"--hdet.spread={spread}", "--hdet.auto_lr=false"]
    extended, long = tmp_path / "extended", tmp_path / "long"
    assert run(monkeypatch, extended, *settings, "--train.total_steps=6") == 0
    assert run(monkeypatch, extended, *settings, "--train.total_steps=12", "--resume") == 0
    assert run(monkeypatch, long, *settings, "--train.total_steps=12") == 0
    rates = [
        {r["step"]: r["lr"] for r in read_jsonl(directory / "metrics.jsonl") if "lr" in r}
        for directory in (extended, long)
    ]
    assert [rates[0][step] for step in range(7, 13)] == [rates[1][step] for step in range(7, 13)]
    assert rates[0][6] != rates[1][6]
    assert torch.load(extended / "checkpoint.pt", weights_only=True)["step"] == 12
    assert run(monkeypatch, extended, *settings, "--train.total_steps=9", "--resume") == 2  # beyond its end


def test_resuming_under_another_setting_is_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"config": {"optimizer": {"max_lr": 0.1}, "train": {"eval_every": 5}}})
    checkpoint.load(path, {"optimizer": {"max_lr": 0.1}, "train": {"eval_every": 6}}, ("config",))
    with pytest.raises(ConfigError, match=r"optimizer\.max_lr=0\.1, and this run has 0\.2"):
        checkpoint.load(path, {"optimizer": {"max_lr": 0.2}}, ("config",))


def test_a_learning_rate_that_was_found_is_not_looked_for_again(monkeypatch, tmp_path, capfd):
    arguments = ["--train.total_steps=4", "--train.eval_every=0", "--train.log_every=1", "--optimizer.max_lr=auto"]
    arguments.insert(0, "--hdet.auto_lr=false")
    assert run(monkeypatch, tmp_path, *arguments, "--train.stop_at=2") == 0
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["config"]["optimizer"]["max_lr"] == "auto"
    out = capfd.readouterr().out
    assert f"max_lr {saved['max_lr']:.2e} found by trying" in out
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, tmp_path, *arguments[:-1], "--resume") == 2  # at max_lr=0.001 it would be another run
    assert "optimizer.max_lr=auto" in capfd.readouterr().err

    def search(*_):
        raise AssertionError("find_lr ran again")

    monkeypatch.setattr(hdet, "find_lr", search)
    assert run(monkeypatch, tmp_path, *arguments, "--resume") == 0
    assert "found by trying" not in capfd.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["max_lr"] == saved["max_lr"]
    peak = max(r["lr"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "lr" in r)
    assert 0.5 * saved["max_lr"] < peak <= saved["max_lr"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number):
    before = signal.getsignal(number)
    with StopRequest(Replicas()) as stop:
        assert stop.after_step() == 0
        signal.raise_signal(number)
        assert stop.after_step() == number
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(number) is before


# ----------------------------------------------------------------------------------------------------- the whole run


def test_a_run_leaves_its_results(monkeypatch, tmp_path, capfd):
    arguments = ["--train.total_steps=6", "--train.eval_every=3", "--train.log_every=2", "--train.accumulate=2"]
    assert run(monkeypatch, tmp_path / "run", *arguments, "--optimizer.max_lr=1e-2") == 0
    out = capfd.readouterr().out
    assert "found by trying" not in out
    for said in ("M parameters", "1 replica ", "spread 0.111", "tensorboard --logdir", "step 3: validation", "Done in"):
        assert said in out
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "train_loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] == records[-1]["val_loss"]
    assert (summary["steps"], summary["replicas"], list(summary["gain"])) == (6, 1, ["decay", "no_decay"])
    assert summary["gain"]["decay"] == summary["gain"]["no_decay"] != 1  # by how far the weights move
    assert 0 <= summary["converge_overhead"] < 1
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hdet.spread=0", "--model.dropout=0.2"],
        ["--hdet.spread=0", "--schedule.name=cosine", "--optimizer.name=sgd"],
        ["--hdet.converge_every=2", "--model.dropout=0.2", "--train.accumulate=2", "--train.dtype=bfloat16"],
        ["--task.name=digits", "--schedule.name=linear", "--hdet.converge_every=4"],
        ["--optimizer.max_lr=auto", "--hdet.spread=0", "--schedule.name=cosine", "--model.dropout=0.2"],
        ["--optimizer.max_lr=auto", "--hdet.probe=true", "--hdet.per_group=true", "--hdet.converge_every=2"],
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(monkeypatch, tmp_path, arguments):
    arguments = [*arguments, "--train.total_steps=8", "--train.eval_every=4", "--train.eval_batches=4"]
    assert run(monkeypatch, tmp_path / "whole", *arguments) == 0
    assert run(monkeypatch, tmp_path / "parts", *arguments, "--train.stop_at=4") == 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert run(monkeypatch, tmp_path / "parts", *arguments, "--resume") == 0
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    curves = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    losses = [[r["val_loss"] for r in curve if "val_loss" in r] for curve in curves]
    assert losses[0] == losses[1]


def test_a_signal_saves_and_says_how_to_go_on(monkeypatch, tmp_path, capfd):
    raised = iter([None, None, signal.SIGTERM])
    step = optimization.Schedule.step

    def step_then_signal(self, loss):
        step(self, loss)
        if number := next(raised, None):
            signal.raise_signal(number)

    monkeypatch.setattr(optimization.Schedule, "step", step_then_signal)
    assert run(monkeypatch, tmp_path, "--train.total_steps=50") == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert "--resume" in capfd.readouterr().out


def test_compare_shows_finished_runs(monkeypatch, tmp_path, capsys):
    for name, spread in (("plain", "0"), ("hdet", "0.3")):
        run(monkeypatch, tmp_path / name, "--train.total_steps=4", "--train.log_every=1", f"--hdet.spread={spread}")
    capsys.readouterr()
    picture = tmp_path / "out" / "both.png"
    assert compare.main([str(tmp_path / "plain"), str(tmp_path / "hdet"), "--output", str(picture)]) == 0
    header, plain, ours, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["run", "spread"]
    assert (plain.split()[:2], ours.split()[:2]) == (["plain", "0"], ["hdet", "0.3"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert compare.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
