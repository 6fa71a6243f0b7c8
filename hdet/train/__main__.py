"""``python -m hdet.train``: see :mod:`hdet.train`."""

from __future__ import annotations

import errno
import signal
import sys
import traceback

import torch

from hdet.errors import HdetError
from hdet.train import processes
from hdet.train.config import Config, ConfigError, parse
from hdet.train.trainer import Trainer

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    config: Config | None = None
    try:
        config = parse(sys.argv[1:])
        stopped_by = _train(config)
        processes.end()
    except ConfigError as error:
        return processes.fail(str(error), 2)
    except KeyboardInterrupt:
        return processes.fail("interrupted: what came after the last checkpoint is lost.", 128 + signal.SIGINT)
    except Exception as error:
        return processes.fail(*_explained(error, config))
    return 128 + stopped_by if stopped_by else 0


def _train(config: Config) -> int:
    """In a function of its own: when it returns, the model under DistributedDataParallel can be freed."""
    return Trainer(config, processes.start(config.train.device)).run()


def _explained(error: Exception, config: Config | None) -> tuple[str, int]:
    """What to print, and the exit status."""
    if isinstance(error, HdetError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK and config is not None:
        return f"{error.filename or config.train.log_dir}: {error.strerror}.", 2
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        text = str(error).split("\n")[0][:300]
        return f"Out of memory: {text} Lower train.batch_size, model.block_size or the model's size.", 2
    return "".join(traceback.format_exception(error)).rstrip(), 1


if __name__ == "__main__":
    sys.exit(main())
