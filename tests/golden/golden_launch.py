"""Groups of real processes over gloo, forked one group after the other from one that has imported everything.

Usage: golden_launch.py OUT PROCESSES:PROGRAM:PART ..., where PROGRAM is a file of this folder that defines
``main(out, part)``, and ``prepare()`` if there is something to import first. A group that fails ends it all.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from forked import run_group


def main():
    importlib.import_module("torch._dynamo")  # an optimizer imports it when it is first used
    for job in sys.argv[2:]:
        processes, name, part = job.split(":")
        program = importlib.import_module(name)
        if hasattr(program, "prepare"):
            program.prepare()
        if run_group(partial(program.main, Path(sys.argv[1]), part), int(processes)):
            sys.exit(f"{job} failed")


if __name__ == "__main__":
    main()
