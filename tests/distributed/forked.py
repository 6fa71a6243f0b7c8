"""torchrun's agent, whose workers are forked from a process that has imported everything: imports take seconds each.

Usage: forked.py PROCESSES PROGRAM [ARGUMENT ...], where PROGRAM is a file that defines ``main()``.
"""

import importlib.util
import sys
import uuid

import sklearn.datasets  # noqa: F401
import torch._dynamo  # an optimizer imports it when it is first used
import torch.utils.tensorboard  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

if __name__ == "__main__":
    processes, sys.argv = int(sys.argv[1]), sys.argv[2:]
    spec = importlib.util.spec_from_file_location("program", sys.argv[0])
    module = sys.modules["program"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, module.main)()
