"""Packages: a sdist has all files, a wheel's name says whether it has native ops, and versions agree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hdet
from hdet.ops import _native

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hdet"]["environments"]
PURE = f"hdet-{hdet.__version__}-py3-none-any.whl"


@pytest.fixture
def sources(tmp_path):
    """The checkout's files, with nothing compiled."""
    hidden = shutil.ignore_patterns(".*", "*.so", "__pycache__", "*.egg-info", "build", "dist", "runs", "site")
    shutil.copytree(ROOT, tmp_path / "sources", ignore=hidden)
    return tmp_path / "sources"


def run(*arguments, cwd, status=0, **environment):
    """What a Python program says, both its output and its errors."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HDET_NATIVE")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=kept | environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def backend(call, cwd, **environment):
    """Calls setuptools as pip and build do, in the environment of the tests."""
    said = run("-W", "ignore", "-c", f"from setuptools import build_meta; build_meta.{call}", cwd=cwd, **environment)
    return said, sorted(path.name for path in (cwd / "dist").iterdir())


def libraries(wheel):
    return [Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_in_which_nothing_was_compiled_says_so_and_fits_every_platform(sources):
    """Such a wheel had the platform's name, and was taken for the native one."""
    said, names = backend("build_wheel('dist')", sources, CXX="false", PATH="")
    assert names == [PURE]
    assert "_native_cpu is left out, plain torch takes its place: " in said
    assert "THIS WHEEL HAS NO NATIVE OPS" in said
    wheel = zipfile.ZipFile(sources / "dist" / PURE)
    assert not libraries(wheel.filename)
    assert "Root-Is-Purelib: true" in wheel.read(f"hdet-{hdet.__version__}.dist-info/WHEEL").decode()
    assert "hdet = hdet.__main__:main" in wheel.read(f"hdet-{hdet.__version__}.dist-info/entry_points.txt").decode()
    assert {"hdet/py.typed", "hdet/report/page.css"} < set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist()} == {"hdet", f"hdet-{hdet.__version__}.dist-info"}


def test_a_build_that_must_be_native_fails_where_it_cannot_be(sources):
    wanted = {"CXX": "false", "PATH": "", "HDET_BUILD_NATIVE": "1"}
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    said = run("-W", "ignore", "-c", code, cwd=sources, status=1, **wanted)
    assert "hdet: HDET_BUILD_NATIVE=1, and _native_cpu cannot be compiled: no C++ compiler" in said
    assert not list(sources.glob("dist/*.whl"))


def test_a_sdist_has_every_file_of_the_checkout(sources):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    (sources / "hdet/ops/_native_cpu.so").write_bytes(b"of this machine")
    _, names = backend("build_sdist('dist')", sources)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if not name.startswith(".") and (ROOT / name).exists()}
    with tarfile.open(sources / "dist" / names[0]) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert not tracked - packed
    assert not [name for name in packed if name.endswith(".so") or "__pycache__" in name]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++") or _native.BACKEND.cpu != "native", reason="needs a C++ compiler and torch")
def test_wheels_of_the_build_program_with_isolation_and_without(sources, tmp_path):
    """Isolation hides torch, so that nothing can be compiled; what is built without it has the platform's name."""
    pytest.importorskip("build")
    said = run("-m", "build", "--outdir", tmp_path / "isolated", cwd=sources)
    assert "THIS WHEEL HAS NO NATIVE OPS" in said
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "native", cwd=sources)
    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "pip", sources, cwd=sources)
    found = {
        folder: [path.name for path in (tmp_path / folder).glob("*.whl")] for folder in ("isolated", "native", "pip")
    }
    assert found["isolated"] == [PURE]
    assert found["native"] == found["pip"] != [PURE]
    assert re.fullmatch(r"hdet-.+-abi3-\w+\.whl", found["pip"][0])
    for folder, kernels in (("isolated", "reference"), ("native", "native"), ("pip", "native")):
        wheel, installed = tmp_path / folder / found[folder][0], tmp_path / f"{folder}_installed"
        assert ("_native_cpu.so" in libraries(wheel)) == (kernels == "native")
        run("-m", "pip", "install", "-q", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
        code = "import hdet; print(hdet.__file__, hdet.ops.backend().cpu)"
        assert f"{installed / 'hdet/__init__.py'} {kernels}" in run("-c", code, cwd=installed)


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == hdet.__version__ == citation["version"]
    assert citation["license"] == PROJECT["license"]
    assert "## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_environments_are_the_oldest_and_newest_that_are_named():
    oldest, newest = ENVIRONMENTS["oldest"], ENVIRONMENTS["newest"]
    lowest = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    pythons = [name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert f">={oldest['python']}" == PROJECT["requires-python"]
    assert (pythons[0], pythons[-1]) == (oldest["python"], newest["python"])
    assert oldest["torch"] == f"{lowest.pop('torch')}.0"
    packages = dict(package.split("==") for package in oldest["packages"].split())
    assert packages.keys() == lowest.keys()
    assert all(packages[name].startswith(lowest[name]) for name in lowest)


SCRIPT = ROOT / "launch" / "environments.sh"


def test_an_environment_that_is_not_named_is_told(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, "newset"],
        env=os.environ | {"HDET_ENVIRONMENTS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pyproject.toml names no python for newset in [tool.hdet.environments]" in done.stderr
    assert "environments.sh: failed: newset" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("HDET_ENVIRONMENTS" not in os.environ, reason="makes some GB in the folder HDET_ENVIRONMENTS")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_hdet_works_with_the_oldest_and_the_newest_python_and_torch(name):
    done = subprocess.run(["bash", SCRIPT, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
