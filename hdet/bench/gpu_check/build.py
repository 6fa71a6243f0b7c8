"""Parts ``build`` and ``tests``: the native ops compiled from this checkout, and the tests that need a GPU."""

from __future__ import annotations

import filecmp
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdet.bench.gpu_check.place import ROOT, Place, Row


def build(place: Place) -> Iterator[Row]:
    """Compile the CPU ops, and on a GPU those for its architecture; load them in a new process.

    A library takes the place of the one in the checkout at once, and only if it is another.

    Raises:
        RuntimeError: if one cannot be compiled, or does not load.
    """
    builder = _builder()
    made = {"cpu": builder.build_cpu} | ({"cuda": builder.build_cuda} if place.device == "cuda" else {})
    for kind, compiled in made.items():
        target = ROOT / "hdet" / "ops" / f"_native_{kind}.so"
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            library = Path(folder, target.name)
            started = time.perf_counter()
            try:
                compiled(library)
            except builder.CannotBuildError as reason:
                raise RuntimeError(f"The {kind} ops cannot be compiled: {reason}") from reason
            seconds = time.perf_counter() - started
            if not target.exists() or not filecmp.cmp(library, target, shallow=False):
                os.replace(library, target)
        yield Row(f"{kind} ops", f"compiled in {seconds:.0f} s", {"seconds": seconds})
    asked = "from hdet import ops; b = ops.backend(); print(b.cpu, b.cuda); print(b)"
    environment = {name: value for name, value in os.environ.items() if name != "HDET_NATIVE"}
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"hdet does not load: {done.stderr[-2000:]}")
    backends, said = done.stdout.splitlines()
    if dict(zip(("cpu", "cuda"), backends.split(), strict=True))[place.device] != "native":
        raise RuntimeError(f"The ops were compiled and do not load: {said}")
    yield Row("loaded", said, {"backend": said})


def _builder() -> Any:
    """csrc/build_native.py, which is no part of the package."""
    file = ROOT / "csrc" / "build_native.py"
    if not file.exists():
        raise RuntimeError(f"{file} is missing: there is nothing to compile outside of a checkout.")
    spec = importlib.util.spec_from_file_location("build_native", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tests(place: Place) -> Iterator[Row]:
    """Run the tests that are marked ``gpu``. Their output is in the part's log.

    Raises:
        RuntimeError: if one fails, or none ran.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    results = place.folder / "tests.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={results}", *files]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not results.exists():
        raise RuntimeError(f"pytest ended with status {status} before it had results.")
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    skipped = [
        f"{case.get('name')}: {reason.get('message')}" for case in suite for reason in case if reason.tag == "skipped"
    ]
    named = [f"{case.get('classname')}.{case.get('name')}" for case in suite for what in case if what.tag != "skipped"]
    yield Row(
        f"tests marked gpu, of {len(files)} files",
        f"{passed} passed, {len(named)} failed, {len(skipped)} skipped",
        {"passed": passed, "failed": named, "skipped": skipped},
    )
    if status or not passed:
        raise RuntimeError(f"pytest ended with status {status}; failed: {', '.join(named) or 'none'}.")
