"""Every script of examples/ runs, and docs/guides says what it changes in the same script without hdet."""

import ast
import importlib.util
import re
import runpy
import shutil
from pathlib import Path

import pytest
from conftest import launch_forked

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "hf_trainer": "transformers", "accelerate_loop": "accelerate"}


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("write_integrations", ROOT / "docs" / "write_integrations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments, processes=2):
    """What two processes print."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = launch_forked(processes, ROOT / "examples" / f"{name}.py", *map(str, arguments))
    assert done.returncode == 0, done.stdout
    return done.stdout


def numbers(name, text):
    """What stands after a name, wherever it is printed."""
    return [float(found) for found in re.findall(rf"{name}\W+(-?[\d.]+)", text)]


@pytest.mark.distributed
def test_ddp():
    told = run("ddp")
    assert len(numbers("gain", told)) == 4
    assert numbers("gain", told)[-1] > 2
    assert numbers("validation loss", told)[-1] < 4  # 7.5 without hdet


@pytest.mark.distributed
def test_lightning_module():
    told = run("lightning_module")
    assert numbers("hdet/gain", told)[-1] > 2
    assert numbers("validation loss", told)[-1] < 4


@pytest.mark.distributed
def test_hf_trainer():
    told = run("hf_trainer")
    assert numbers("hdet/gain/group0", told)[-1] > 1
    assert numbers("eval_loss", told)[-1] < numbers("eval_loss", told)[0]


@pytest.mark.distributed
def test_accelerate_loop(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    losses = numbers("validation loss", run("accelerate_loop"))
    assert len(losses) == 4
    assert losses[-1] < 4  # 7.9 without hdet


@pytest.mark.distributed
def test_fsdp2_resumes_from_its_last_checkpoint(tmp_path):
    first = run("fsdp2", tmp_path / "run")
    assert re.findall(r"step (\d+)", first) == ["100", "200"]
    shutil.rmtree(tmp_path / "run" / "200")
    again = run("fsdp2", tmp_path / "run")
    assert re.findall(r"step (\d+)", again) == ["200"]


def test_virtual_replicas(capsys):
    runpy.run_path(str(ROOT / "examples" / "virtual_replicas.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert len(numbers("gain", told)) == 3
    assert numbers("gain", told)[-1] > 2
    assert numbers("loss", told)[-1] < 4


def test_notebook(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = runpy.run_path(str(ROOT / "examples" / "notebook.py"))
    assert (tmp_path / "notebook.png").stat().st_size > 1000
    assert "max_lr" in repr(cells["found"])
    assert "step=200" in repr(cells["scheduler"].ensemble.last_report)


def test_every_example_is_run_here_short_and_has_a_plain_twin():
    for name in EXAMPLES:
        assert any(test.startswith(f"test_{name}") for test in globals()), name
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 80
        plain = (ROOT / "examples" / "plain" / f"{name}.py").read_text()
        assert "hdet" not in re.sub(r"# %%.*?\n#.*\n", "", plain)
        ast.parse(plain)


def test_the_pages_have_the_diffs_and_the_table_of_now(writer):
    pages = [page.read_text(encoding="utf-8") for page in writer.PAGES]
    for page in pages:
        assert page == writer.written(page), "Examples or tests have changed: python docs/write_integrations.py"
    assert sorted(re.findall(r"<!-- diff (\w+) -->", "".join(pages))) == EXAMPLES


def test_every_test_that_the_table_names_is_there(writer):
    for test in writer.tests():
        file, name = test.split("::")
        assert f"def {name}(" in (writer.ROOT / "tests" / "distributed" / file).read_text(), test


def test_a_framework_changes_few_lines(writer):
    """Lightning took 29 lines of glue by hand, the Trainer 32."""
    assert writer.changed("lightning_module") <= 5
    assert writer.changed("hf_trainer") <= 5
    assert writer.changed("accelerate_loop") <= 6
