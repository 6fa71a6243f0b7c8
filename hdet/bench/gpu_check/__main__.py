"""The command line: see :mod:`hdet.bench.gpu_check`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hdet.bench import report
from hdet.bench.gpu_check.part import OUT_OF_TIME, PARTS, results_of
from hdet.bench.gpu_check.place import ROOT, device_name, kept_by, write
from hdet.monitor.tables import markdown

SCHEMA = 1
_NEEDS = "needs a GPU"
_NO_TIME = "no time left"
_END = 5.0
"""Seconds that are left for what comes after the last part."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts that have not passed yet; returns the exit status: 0 if none failed or was left out for time."""
    options = parser().parse_args(argv)
    folder: Path = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    if options.device == "cuda" and device == "cpu":
        print("python -m hdet.bench.gpu_check: error: there is no GPU.", file=sys.stderr)
        return 2
    where = device_name(device)
    again = tuple(PARTS) if options.again == [] else tuple(options.again or ())
    until = time.monotonic() + options.limit - _END
    done = _known(folder / "gpu_check.json")
    say(f"on {where}, at most {options.limit:g} s; results in {folder}")
    for name in options.parts:
        before = done.get(name)
        if before and before["status"] == "passed" and before["device"] == where and name not in again:
            say(f"{name}: passed already, in {before['seconds']:.0f} s")
            continue
        if name in again:
            kept_by(name, folder).unlink(missing_ok=True)
        done[name] = _run(name, device, folder, until) | {"device": where}
        say(f"{name}: {done[name]['status']} after {done[name]['seconds']:.1f} s {done[name]['error'][-500:]}".rstrip())
        _write(done, folder, options.limit)
    _write(done, folder, options.limit)
    print(table(done, where))
    return int(any(done[name]["status"] not in ("passed", _NEEDS) for name in options.parts))


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    found = argparse.ArgumentParser(
        prog="python -m hdet.bench.gpu_check", description="All that only a GPU can show, in under ten minutes."
    )
    add = found.add_argument
    add("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="default: all")
    add("--again", nargs="*", choices=PARTS, metavar="PART", help="repeat these, or all, though they have passed")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU, if there is one")
    add("--limit", type=float, default=570.0, metavar="SECONDS", help="for all parts together; default: 570")
    add("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR", help="default: runs/gpu_check")
    return found


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"hdet.bench.gpu_check: {what}", file=sys.stderr, flush=True)


def table(done: dict[str, Any], where: str) -> str:
    """One Markdown table: a line for each row of each part, in the order of the parts."""
    lines: list[tuple[str, ...]] = [("part", "status", "what", "result")]
    for name in PARTS:
        part = done.get(name)
        if part is None:
            lines.append((name, "not run", "", ""))
            continue
        elsewhere = "" if part["device"] == where else f" on {part['device']}"
        rows = [(row["case"], row["result"]) for row in part["rows"]]
        rows += [("why", part["error"])] if part["error"] else []
        for i, (case, result) in enumerate(rows or [("", "")]):
            first = (name, f"{part['status']}{elsewhere}, {part['seconds']:.0f} s") if i == 0 else ("", "")
            lines.append(tuple(_cell(text) for text in (*first, case, result)))
    return f"{where}, {report.machine()['cpus']} CPUs\n\n{markdown(lines, padded=False)}"


def _cell(text: str) -> str:
    return " ".join(text.split())[:400].replace("|", "\\|")


def _run(name: str, device: str, folder: Path, until: float) -> dict[str, Any]:
    """The part's status, seconds, rows and error."""
    part, left = PARTS[name], until - time.monotonic()
    nothing: dict[str, Any] = {"seconds": 0.0, "rows": [], "error": ""}
    if part.needs_gpu and device == "cpu":
        return nothing | {"status": _NEEDS}
    if left < _END:
        return nothing | {"status": _NO_TIME}
    limit = min(part.limit, left)
    results = results_of(name, folder)
    results.unlink(missing_ok=True)
    say(f"{name} ... (at most {limit:.0f} s, log in {folder / name}.log)")
    started = time.monotonic()
    command = [sys.executable, "-m", "hdet.bench.gpu_check.part", name, device, str(folder), str(limit - _END)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also what the part has started, and after Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"rows": [], "error": ""}
    error = found["error"]
    if code is None:
        status = "failed" if limit == part.limit else _NO_TIME
        error = f"no end after {limit:.0f} s"
    elif code == OUT_OF_TIME:
        status = _NO_TIME
    else:
        status = "failed" if code else "passed"
        error = error or (f"its process ended with status {code}: see {name}.log" if code else "")
    return {"status": status, "seconds": time.monotonic() - started, "rows": found["rows"], "error": error}


def _known(path: Path) -> dict[str, Any]:
    """The parts in an earlier call's file."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    parts: dict[str, Any] = found["parts"] if found.get("schema") == SCHEMA else {}
    return parts


def _write(done: dict[str, Any], folder: Path, limit: float) -> None:
    ordered = {name: done[name] for name in PARTS if name in done}
    machine = {name: fact for name, fact in report.machine().items() if name != "ops"}  # those before they were built
    content = {"schema": SCHEMA, "machine": machine, "limit": limit, "parts": ordered}
    write(folder / "gpu_check.json", content)
    where = next((part["device"] for part in reversed(done.values())), "")
    (folder / "gpu_check.md").write_text(table(done, where) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
