"""What worker files have in common: their scenarios are run one by one in the process group that is there."""

import os
import pickle
import sys
import traceback

import torch
import torch.distributed as dist


def run(scenarios, out):
    """Write what each returns on this rank into a file of ``out``.

    ``HDET_SCENARIOS``: names of those to run, with commas between; default all.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    only = os.environ.get("HDET_SCENARIOS")
    for function in scenarios:
        if only and function.__name__ not in only.split(","):
            continue
        try:
            torch.manual_seed(0)
            result = function(rank, world)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others are in a collective, and are killed
        (out / f"{function.__name__}.{rank}.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()
    dist.barrier()
