"""The command line: see :mod:`hdet.bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from hdet.bench import plot, report
from hdet.bench.contenders import CONTENDERS
from hdet.bench.measure import Comparison
from hdet.bench.sections import SECTIONS, Settings, run
from hdet.bench.shapes import SHAPES

_QUICK_SHAPES = ("1k", "100k")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it and write it; returns the exit status."""
    options = parser().parse_args(argv)
    settings = settings_of(options)
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[Comparison] = []
    failure: Exception | None = None
    try:
        for result in run(settings):
            results.append(result)
            found = report.as_json(results, asdict(settings))  # each time: whatever ends the run, this much is there
            (options.output / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (TimeoutError, ProcessExitedException, ProcessRaisedException) as error:
        failure = error

    print(report.tables(results))
    if "converge" in settings.sections:
        for name, contender in CONTENDERS.items():
            print(f"{name}: {' '.join((contender.__doc__ or '').split())}")
        try:
            plot.draw(results, options.output / "bench.png")
            print(f"\nplot: {options.output / 'bench.png'}")
        except ModuleNotFoundError:
            print("\nno plot: matplotlib is not installed")
    print(f"all samples: {options.output / 'bench.json'}\n\n{report.targets_table(results)}")
    if failure:
        print(f"python -m hdet.bench: error: not all was measured: {failure}", file=sys.stderr)
    return 1 if failure else 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    default = Settings()
    found = argparse.ArgumentParser(
        prog="python -m hdet.bench", description="Measure hdet against every alternative, in one run, in alternation."
    )
    add = found.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=default.sections, help="default: all")
    add("--processes", nargs="+", type=_at_least(2), default=default.processes, metavar="N", help="default: 2 4")
    add("--shapes", nargs="+", choices=SHAPES, help="what is averaged and packed; default: all")
    add(
        "--repeat", type=_at_least(3), default=default.repeat, metavar="N", help="rounds of a case at most; default: 25"
    )
    add("--seconds", type=float, default=default.seconds, help="per case, about; default: 20")
    add("--device", choices=("auto", "cpu", "cuda"), default=default.device, help="default: GPUs, if there are enough")
    add("--limit", type=float, default=default.limit, help="seconds until processes are killed; default: 3600")
    add("--output", type=Path, default=Path("bench"), metavar="DIR", help="default: bench")
    add("--quick", action="store_true", help="small shapes and three rounds: tries everything, measures nothing")
    return found


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    default = Settings()
    averaged = _QUICK_SHAPES if options.quick else default.shapes
    packed = _QUICK_SHAPES if options.quick else default.kernel_shapes
    return Settings(
        sections=tuple(options.sections),
        processes=tuple(options.processes),
        shapes=tuple(options.shapes or averaged),
        kernel_shapes=tuple(options.shapes or packed),
        models=((32, 1), (64, 1)) if options.quick else default.models,
        repeat=3 if options.quick else options.repeat,
        seconds=0.2 if options.quick else options.seconds,
        converge_every=10 if options.quick else default.converge_every,
        device=options.device,
        limit=options.limit,
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
