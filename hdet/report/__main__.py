"""``python -m hdet.report RUN_DIR [RUN_DIR ...] [--output FILE]``: see :mod:`hdet.report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hdet.report.page import write
from hdet.report.run import place, read


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of the runs that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hdet.report",
        description="Write what runs did, and why, into one HTML file. Also while a run goes on.",
        allow_abbrev=False,
    )
    what = "folder with a rounds.jsonl or metrics.jsonl, or a file that hdet.JsonLines wrote; several: side by side"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=what)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html; of several runs ./report.html"
    )
    arguments = parser.parse_args(argv)
    try:
        runs = [read(path) for path in arguments.runs]
        first = arguments.runs[0]
        print(f"report: {write(runs, arguments.output or (Path('report.html') if len(runs) > 1 else place(first)))}")
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}.")
    return 0


def _fail(text: str) -> int:
    print(f"python -m hdet.report: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
