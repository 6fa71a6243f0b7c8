"""Every block of code of the README and of docs/get_started.md is run as it stands there, or has a reason why not.

A diff is laid into a program that has what it takes for granted; both of its sides are run, by two processes.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import launch_forked
from torch import nn

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/get_started.md")
pytestmark = pytest.mark.timeout(600)

DDP = """
    import gc
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def SIDE():
        torch.manual_seed(0)
        x = torch.randn(2048, 16)
        data = TensorDataset(x, (x[:, :8] * x[:, 8:]).sum(1, keepdim=True))
        loader = DataLoader(data, 16, sampler=DistributedSampler(data))
        probe_loader = DataLoader(data, 16, sampler=DistributedSampler(data, seed=1))
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
        steps = len(loader)
        DIFF
        told = [None, None]
        dist.all_gather_object(told, sum(p.sum().item() for p in model.parameters()))
        if dist.get_rank() == 0:
            print("loss", loss_fn(model, data.tensors).item(), "equal", told[0] == told[1])

    def main():
        dist.init_process_group("gloo")
        before()
        after()
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
"""
LIGHTNING = """
    import functools
    import lightning as L
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 1)

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def SIDE():
        torch.manual_seed(0)
        x = torch.randn(512, 16)
        module, loader = Module(), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16)
        strategy = DDPStrategy(process_group_backend="gloo")
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer = functools.partial(L.Trainer, accelerator="cpu", devices=2, strategy=strategy, **off)
        DIFF
        if trainer.is_global_zero:
            with torch.no_grad():
                print("loss", nn.functional.mse_loss(module.net(x), x.sum(1, keepdim=True)).item())

    def main():
        before()
        after()
"""
TRAINER = """
    import tempfile
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    def SIDE():
        torch.manual_seed(0)
        small = {"vocab_size": 32, "n_positions": 12, "n_embd": 32, "n_layer": 1, "n_head": 2, "use_cache": False}
        model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
        sequences = (torch.randint(1, 32, (512, 1)) + torch.arange(12)) % 32
        dataset = [{"input_ids": ids, "labels": ids} for ids in sequences]
        with tempfile.TemporaryDirectory() as folder:
            off = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 5}
            group = {"use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
            arguments = TrainingArguments(output_dir=folder, num_train_epochs=3, learning_rate=1e-3, **off, **group)
            DIFF
            if trainer.is_world_process_zero():
                print("loss", trainer.state.log_history[-2]["loss"])

    def main():
        before()
        after()
"""
PROGRAMS = {
    "DistributedDataParallel": (DDP, "torch"),
    "lightning": (LIGHTNING, "lightning"),
    "transformers": (TRAINER, "transformers"),
}

ENVIRONMENT = "makes or changes an environment, from the network: "
ELSEWHERE = {
    "bash launch/demo.sh": ENVIRONMENT + "what follows is run by test_the_demo",
    "bash launch/test.sh": ENVIRONMENT + "it then runs this very test",
    "pip install --no-build-isolation .": ENVIRONMENT + "test_build.py installs so, elsewhere and without dependencies",
    'pip install --no-build-isolation ".[tensorboard]"': ENVIRONMENT + "its extras are looked up by test_extras",
    'DS_BUILD_OPS=0 pip install --no-build-isolation ".[deepspeed]"': ENVIRONMENT + "the same",
}
"""Commands that no test types as they stand, and why."""


def blocks(page):
    """[(language, code)] of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    """Every line of a shell that the pages show, without its comment."""
    lines = {
        line.split("  #")[0].strip()
        for page in PAGES
        for kind, code in blocks(page)
        if kind == "bash"
        for line in code.splitlines()
    }
    return sorted(lines - {""})


def diffs():
    """[name] of the diffs: what they bring in, and their code."""
    found = {}
    for kind, code in blocks("README.md"):
        if kind == "diff":
            (name,) = [name for name in PROGRAMS if name in code]
            found[name] = code
    return found


def side(diff, other):
    """The lines of a diff but for those that begin with ``other``."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith(other))


def test_every_block_is_of_a_kind_that_is_run():
    assert {kind for page in PAGES for kind, _ in blocks(page)} == {"bash", "diff", "python"}
    assert set(diffs()) == set(PROGRAMS)
    assert set(ELSEWHERE) < set(commands())
    assert [kind for kind, _ in blocks("README.md")].count("python") == 0
    assert [kind for kind, _ in blocks("docs/get_started.md")].count("diff") == 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_diff_can_be_run_before_and_after(name, tmp_path):
    program, package = PROGRAMS[name]
    pytest.importorskip(package)
    program = textwrap.dedent(program)
    part = re.search(r"^def SIDE.*?(?=^def main)", program, re.MULTILINE | re.DOTALL)[0]
    indent = re.search(r"^( *)DIFF$", part, re.MULTILINE)[1]
    sides = ""
    for now, other in (("before", "+"), ("after", "-")):
        code = textwrap.indent(side(diffs()[name], other), indent)
        sides += part.replace("SIDE", now).replace(f"{indent}DIFF\n", code)
    file = tmp_path / "program.py"
    file.write_text(program.replace(part, sides))
    done = launch_forked(2, file)
    assert done.returncode == 0, done.stdout
    before, after = map(float, re.findall(r"^loss ([\d.]+)", done.stdout, re.MULTILINE))
    assert after < before  # max_lr is too low
    assert "equal False" not in done.stdout


def test_the_calls_in_one_screen(tmp_path, monkeypatch, recwarn):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    ((_, code),) = [block for block in blocks("docs/get_started.md") if block[0] == "python"]
    model = nn.Linear(4, 1)
    given = {
        "hdet": __import__("hdet"),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loss_fn": lambda model, batch: model(batch).square().mean(),
        "loader": [torch.randn(8, 4) for _ in range(20)],
        "loss": torch.tensor(1.0),
        "max_lr": 1e-3,
        "total_steps": 100,
        "steps": 100,
    }
    tree = ast.parse(code)
    for node in ast.walk(tree):  # "...": more arguments, or elements of a list
        for field in ("args", "elts"):
            if isinstance(node, (ast.Call, ast.List)) and hasattr(node, field):
                setattr(node, field, [item for item in getattr(node, field) if ast.unparse(item) != "..."])
    for statement in tree.body:
        line = ast.unparse(statement)
        if "any_torch_scheduler" in line:  # an example of its own
            given["scheduler"].close()
            given["any_torch_scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(given["optimizer"], 100)
        exec(line, given)
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize("command", [command for command in commands() if command not in ELSEWHERE])
def test_a_command_runs(command):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_extras_that_are_named_are_there():
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    lines = [line for line in pages.splitlines() if "pip install" in line]
    named = {name for line in lines for names in re.findall(r"\[([\w,]+)\]", line) for name in names.split(",")}
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert named >= {"tensorboard", "deepspeed", "lightning"}
    for name in named:
        assert re.search(rf"^{name} = \[", metadata, re.MULTILINE), name


@pytest.mark.distributed
def test_the_demo(tmp_path):
    """launch/demo.sh as it is, but in this environment, and for a few steps."""
    for package in ("jsonargparse", "matplotlib", "tensorboard"):
        pytest.importorskip(package)
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "demo.sh", tmp_path / "launch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "launch" / "env.sh").write_text(f"HDET_ROOT={tmp_path}\nsetup() {{ :; }}\nprocesses() {{ echo 2; }}\n")
    (tmp_path / "bin").mkdir()
    shorter = "--train.total_steps 20 --train.eval_every 10 --train.eval_batches 2"
    (tmp_path / "bin" / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@" {shorter}\n'
    )
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "launch/demo.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "demo" / "demo.png").stat().st_size > 10_000
    assert re.search(r"^run .*validation loss", done.stdout, re.MULTILINE)
    assert {line.split()[0] for line in done.stdout.splitlines() if line} >= {"plain", "hdet"}
