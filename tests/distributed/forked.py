"""The processes of a group, forked from one that has imported everything: imports take seconds each.

Usage: forked.py PROCESSES PROGRAM [ARGUMENT ...], where PROGRAM is a file that defines ``main()``. They find the
environment that torchrun would give them. When one fails the others are killed. What forks has no threads, or their
locks would stay locked in the children; torchrun's own agent has some.
"""

import importlib.util
import os
import signal
import socket
import sys
import traceback

import sklearn.datasets  # noqa: F401
import torch._dynamo  # an optimizer imports it when it is first used
import torch.utils.tensorboard  # noqa: F401


def fork(main, rank, processes, port):
    """Process id of a new process that runs ``main()``."""
    if pid := os.fork():
        return pid
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    facts |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in facts.items()}
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    processes, sys.argv = int(sys.argv[1]), sys.argv[2:]
    spec = importlib.util.spec_from_file_location("program", sys.argv[0])
    module = sys.modules["program"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pids = {fork(module.main, rank, processes, port) for rank in range(processes)}
    failed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not failed:
            failed = True
            for other in pids:
                os.kill(other, signal.SIGKILL)
    sys.exit(failed)
