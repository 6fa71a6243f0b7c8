"""Groups of real processes over gloo, forked one group after the other from one that has imported everything.

Usage: golden_launch.py OUT PROCESSES:PROGRAM:PART ..., where PROGRAM is a file of this folder that defines
``main(out, part)``, and ``prepare()`` if there is something to import first. A group that fails ends it all.
"""

import importlib
import os
import socket
import sys
import traceback
from pathlib import Path


def run(program, out, processes, part):
    """Fork the processes of a group and wait for them; when one fails, kill the others. Returns whether one did."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    pids = {fork(program, out, part, rank, processes, port) for rank in range(processes)}
    failed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not failed:
            failed = True
            for other in pids:
                os.kill(other, 9)
    return failed


def fork(program, out, part, rank, processes, port):
    """Process id of a new process that runs ``main()``."""
    if pid := os.fork():
        return pid
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    facts |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in facts.items()}
    status = 1
    try:
        program.main(out, part)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    importlib.import_module("torch._dynamo")  # an optimizer imports it when it is first used
    for job in sys.argv[2:]:
        processes, name, part = job.split(":")
        program = importlib.import_module(name)
        if hasattr(program, "prepare"):
            program.prepare()
        if run(program, Path(sys.argv[1]), int(processes), part):
            sys.exit(f"{job} failed")


if __name__ == "__main__":
    main()
