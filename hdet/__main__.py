"""The command ``hdet``, also ``python -m hdet``: ``hdet train``, ``report``, ``compare`` and ``bench``.

``hdet train ...`` is ``python -m hdet.train ...``, with the same options, output and exit status; so are the others.
Several processes: ``torchrun --nproc-per-node=4 --no-python hdet train ...``.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping

import hdet

COMMANDS = {
    "train": ("hdet.train", "train a model as a YAML file says"),
    "report": ("hdet.report", "what runs did and why, in words and charts: one HTML file"),
    "compare": ("hdet.train.compare", "a table of finished runs, and their curves"),
    "bench": ("hdet.bench", "time hdet against every alternative"),
}
BENCHMARKS = {
    "faults": ("hdet.bench.faults", "do wrong things to hdet"),
    "gpu_check": ("hdet.bench.gpu_check", "all that only a GPU can show, in ten minutes"),
    "hyperparameters": ("hdet.bench.hyperparameters", "whether the optimum of other hyperparameters is found"),
    "regret": ("hdet.bench.regret", "what a wrong learning rate costs"),
    "regret.ablations": ("hdet.bench.regret.ablations", "the controller without each of its parts"),
    "regret.collect": ("hdet.bench.regret.collect", "runs at constant learning rates, which the fit reads"),
    "regret.forks": ("hdet.bench.regret.forks", "runs forked with half and twice the learning rate: the right move"),
    "regret.fit": ("hdet.bench.regret.fit", "the controller's constants, fitted on a part of the workloads"),
    "regret.protocol": ("hdet.bench.regret.protocol", "the runs of the clean test, in their order"),
    "regret.real": ("hdet.bench.regret.real", "real processes beside their simulation"),
    "regret.resumed": ("hdet.bench.regret.resumed", "a run that is stopped and goes on with another length"),
    "regret.summary": ("hdet.bench.regret.summary", "means over workloads by start, with their errors, and the harm"),
    "regret.tune": ("hdet.bench.regret.tune", "the best learning rate of a workload, by a sweep of OneCycle"),
    "scaling": ("hdet.bench.scaling", "bytes, memory and time per round, by number of replicas and parameters"),
}
EXTRAS = {"train": "train", "compare": "train", "bench": "bench"}
"""What to install for a command."""


def main() -> int:
    """Run what the command line names; returns the exit status.

    Raises:
        SystemExit: with the status of what was run; with 2 if it does not exist, or a package that it needs.
    """
    arguments = sys.argv[1:]
    command = parser().parse_args(arguments[:1]).command
    module, rest = COMMANDS[command][0], arguments[1:]
    if command == "bench" and rest and not rest[0].startswith("-"):
        module, rest = BENCHMARKS[benchmark_parser().parse_args(rest[:1]).name][0], rest[1:]
    sys.argv[1:] = rest
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as missing:
        if (missing.name or "hdet").split(".")[0] == "hdet":  # a mistake of hdet's
            raise
        extra = f"[{EXTRAS[command]}]" if command in EXTRAS else ""
        print(f"hdet {command}: error: {missing.name} is not installed. Install hdet{extra}.", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The grammar of the first argument. The others are the command's own."""
    benchmarks = f"benchmarks:\n{_listed({f'bench {name}': what for name, what in BENCHMARKS.items()})}"
    found = argparse.ArgumentParser(
        prog="hdet",
        usage="hdet [--help | --version] COMMAND ...",
        description="Train replicas under different learning rates. hdet COMMAND --help has the options of a command.",
        epilog=f"commands:\n{_listed(COMMANDS)}\n\n{benchmarks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--version", action="version", version=f"hdet {hdet.__version__}, {hdet.ops.backend()}")
    found.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return found


def benchmark_parser() -> argparse.ArgumentParser:
    """The grammar of a benchmark's name."""
    found = argparse.ArgumentParser(prog="hdet bench", usage="hdet bench [NAME] ...", add_help=False)
    found.add_argument("name", choices=BENCHMARKS, metavar="NAME")
    return found


def _listed(entries: Mapping[str, tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<23} {what}" for name, (_, what) in entries.items())


if __name__ == "__main__":
    sys.exit(main())
