"""Runs of the training program, one after the other in the same processes. Arguments: their command lines, as JSON."""

import json
import sys

from hdet.train import processes
from hdet.train.config import ConfigError, parse
from hdet.train.trainer import Trainer


def main():
    process = processes.start("cpu")
    for arguments in sys.argv[1:]:
        try:
            Trainer(parse(json.loads(arguments)), process).run()
        except ConfigError as error:  # noqa: PERF203
            print("refused:", error, flush=True)
    processes.end()
