"""The installation: what the README says works where it is typed, and what was not compiled is said."""

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdet.ops import _native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "csrc" / "build_native.py"
can_compile = pytest.mark.skipif(
    not shutil.which("g++") or _native._version(torch.__version__) < _native.FIRST_TORCH,
    reason="needs a C++ compiler and torch 2.10 or newer",
)


def python(*arguments, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HDET_NATIVE")}
    environment.update(settings.pop("env", {}))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, **settings
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def checkout(directory):
    """The sources that an installation needs, as a clone has them: with nothing compiled."""
    for name in ("hdet", "csrc"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory


@can_compile
def test_the_check_of_the_readme_works_in_the_checkout_and_elsewhere(tmp_path):
    """A Python that is started in the checkout imports ``hdet/`` from there, and not what was installed."""
    if not any(importlib.metadata.distributions(name="pip")):  # to look for the module would undo setuptools' distutils
        pytest.skip("needs pip")
    (check,) = re.findall(r'python -c "(import hdet; .*?)"', (ROOT / "README.md").read_text())
    sources, installed = checkout(tmp_path), tmp_path / "installed"
    said = python("-c", check, cwd=sources)
    assert f"hdet was imported from {sources}, a source tree" in said
    assert f"pip install -v --no-build-isolation -e {sources} compiles it, or says why not" in said

    python("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", installed, sources)
    both = "import hdet.ops._native as native; print(native.__file__); " + check
    for directory, root in ((sources, sources), (installed, installed)):
        file, backend = python("-c", both, cwd=directory).splitlines()
        assert file == str(root / "hdet/ops/_native.py")
        assert "cpu native" in backend

    # A build that can compile nothing leaves no library of older sources behind.
    assert len(list(sources.glob("build/*/hdet/ops/*.so")) + list(sources.glob("hdet/ops/*.so"))) == 2
    python("-c", "import setuptools; setuptools.setup()", "-q", "build_ext", cwd=sources, env={"CXX": "false"})
    assert not list(sources.glob("build/*/hdet/ops/*.so")) + list(sources.glob("hdet/ops/*.so"))


def test_a_build_that_pip_isolates_finds_the_torch_of_the_environment(tmp_path):
    """pip takes the environment's packages off ``sys.path`` and puts what the build requires there."""
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    code = f"""
        import runpy, sys
        sys.path = [{str(tmp_path)!r}, *(p for p in sys.path if "site-packages" not in p and p != "")]
        try:
            import torch
        except ImportError:
            print(runpy.run_path({str(BUILD)!r})["import_torch"]())
    """
    said = python("-W", "ignore", "-c", "\n".join(line[8:] for line in code.splitlines()))
    assert said.splitlines()[-1] == str(Path(torch.__file__).parent)


@pytest.mark.parametrize(("rank", "said"), [(None, 1), ("0", 1), ("1", 0)])
def test_what_was_not_compiled_is_said_once_per_machine(rank, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "hdet/ops/_native.py"))
    monkeypatch.setattr(_native, "FIRST_TORCH", (2, 0))
    monkeypatch.delenv("HDET_NATIVE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with caplog.at_level(logging.WARNING, logger="hdet"):
        backend = _native.load()
        assert f"hdet was imported from {tmp_path}; " in backend.note
        assert [record.getMessage().startswith(str(backend)) for record in caplog.records] == [True] * said
        monkeypatch.setenv("HDET_NATIVE", "0")
        assert "switched off" in _native.load().note
        assert len(caplog.records) == said


def test_a_torch_without_the_stable_abi_is_named(monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.delenv("HDET_NATIVE", raising=False)
    backend = _native.load()
    assert backend.cpu == backend.cuda == "reference"
    assert backend.note == "native ops need torch 2.10 or newer, this is 2.9.1+cu128"
    assert not caplog.records
