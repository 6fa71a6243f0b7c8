"""The processes of a group, forked from one that has imported everything: imports take seconds each.

Usage: forked.py PROCESSES PROGRAM [ARGUMENT ...], where PROGRAM is a file that defines ``main()``. They find the
environment that torchrun would give them. When one fails the others are killed. What forks has no threads, or their
locks would stay locked in the children; torchrun's own agent has some.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# An optimizer imports dynamo when it is first used.
CONTEXT.set_forkserver_preload(["hdet", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard"])


def launch(processes, program, *arguments, output=None, limit=None):
    """Run the program, its output into the file ``output``; returns the exit status, ``None`` if it took longer than
    ``limit`` seconds and was killed with all that it had started."""
    parent = CONTEXT.Process(target=_run, args=(processes, str(program), arguments, output, dict(os.environ)))
    parent.start()
    parent.join(limit)
    if parent.exitcode is None:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.join()
        return None
    return parent.exitcode


def _run(processes, program, arguments, output, environment):
    os.setsid()
    os.environ.clear()
    os.environ |= environment
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    sys.argv = [program, *arguments]
    spec = importlib.util.spec_from_file_location("program", program)
    module = sys.modules["program"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.exit(run_group(module.main, processes))


def run_group(main, processes):
    """Fork the processes of a group, each of which runs ``main()``, and wait for them; when one fails, kill the others.
    Returns whether one did."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pids = {_fork(main, rank, processes, port) for rank in range(processes)}
    failed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not failed:
            failed = True
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return failed


def _fork(main, rank, processes, port):
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
    sys.exit(launch(int(sys.argv[1]), Path(sys.argv[2]).resolve(), *sys.argv[3:]))
