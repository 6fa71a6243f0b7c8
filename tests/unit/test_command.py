"""The command ``hdet``: it runs what ``python -m`` runs, and names what does not exist."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hdet
from hdet import __main__ as command


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls ``hdet`` with arguments; returns exit status, output and errors."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["hdet", *arguments])
        try:
            status = command.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return called


def test_help_has_all_that_there_is(call):
    status, said, _ = call("--help")
    assert status == 0
    for name in (*command.COMMANDS, *command.BENCHMARKS):
        assert f" {name} " in said


def test_version_says_which_kernels_run(call):
    assert call("--version")[:2] == (0, f"hdet {hdet.__version__}, {hdet.ops.backend()}\n")


@pytest.mark.parametrize(
    ("arguments", "named", "known"),
    [
        (["trian"], "COMMAND: invalid choice: 'trian'", command.COMMANDS),
        (["tra"], "COMMAND: invalid choice: 'tra'", command.COMMANDS),
        ([""], "COMMAND: invalid choice: ''", command.COMMANDS),
        ([], "the following arguments are required: COMMAND", ()),
        (["bench", "regrets"], "NAME: invalid choice: 'regrets'", command.BENCHMARKS),
        (["--vers"], "the following arguments are required: COMMAND", ()),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(call, arguments, named, known):
    status, said, wrong = call(*arguments)
    assert (status, said) == (2, "")
    assert named in wrong
    assert all(name in wrong for name in known)


@pytest.mark.parametrize(
    ("arguments", "module", "rest"),
    [
        (["train", "--config", "a.yaml", "--help"], "hdet.train", ["--config", "a.yaml", "--help"]),
        (["compare", "runs/a"], "hdet.train.compare", ["runs/a"]),
        (["bench"], "hdet.bench", []),
        (["bench", "--sections", "regret"], "hdet.bench", ["--sections", "regret"]),
        (["bench", "regret.real", "--help"], "hdet.bench.regret.real", ["--help"]),
    ],
)
def test_a_command_gets_its_own_arguments(call, monkeypatch, arguments, module, rest):
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: ran.append((name, sys.argv[1:])))
    assert call(*arguments) == (0, "", "")
    assert ran == [(module, rest)]


def test_the_status_and_the_errors_are_those_of_the_program(tmp_path):
    """In a process of its own: runpy warns of a module that another test has imported."""
    done = subprocess.run([sys.executable, "-m", "hdet", "compare", tmp_path], capture_output=True, text=True)
    wanted = f"python -m hdet.train.compare: error: {tmp_path}/summary.json is missing: no finished run.\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(wanted)


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(call, monkeypatch):
    def run_module(name, **_):
        raise ModuleNotFoundError("No module named 'jsonargparse.typing'", name="jsonargparse.typing")

    monkeypatch.setattr(runpy, "run_module", run_module)
    wanted = "hdet train: error: jsonargparse.typing is not installed. Install hdet[train].\n"
    assert call("train") == (2, "", wanted)


def test_a_module_of_hdet_that_is_missing_is_our_mistake(call, monkeypatch):
    def run_module(name, **_):
        raise ModuleNotFoundError("No module named 'hdet.trian'", name="hdet.trian")

    monkeypatch.setattr(runpy, "run_module", run_module)
    with pytest.raises(ModuleNotFoundError, match=r"hdet\.trian"):
        call("train")


def test_each_program_of_the_package_has_a_name():
    named = {module for module, _ in (*command.COMMANDS.values(), *command.BENCHMARKS.values())}
    assert all(importlib.util.find_spec(module) for module in named)
    root = Path(hdet.__file__).parent
    found = (path for path in root.rglob("*.py") if 'prog="python -m hdet.' in path.read_text(encoding="utf-8"))
    programs = {".".join(("hdet", *path.relative_to(root).with_suffix("").parts)) for path in found}
    assert programs
    assert {name.removesuffix(".__main__") for name in programs} <= named
