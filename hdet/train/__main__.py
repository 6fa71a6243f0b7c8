"""``python -m hdet.train``: see :mod:`hdet.train`."""

from __future__ import annotations

import sys

from hdet.train import processes
from hdet.train.config import ConfigError, parse
from hdet.train.trainer import Trainer


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    try:
        config = parse(sys.argv[1:])
        trainer = Trainer(config, processes.start(config.train.device))
    except ConfigError as error:
        return processes.fail(error)
    stopped_by = trainer.run()
    processes.end()
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())
