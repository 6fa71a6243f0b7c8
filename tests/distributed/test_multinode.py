"""Several machines on one: launch/multinode.sh, an agent each, over loopback; launch/slurm.sbatch under stand-ins for
Slurm's commands. The processes are real, and so is what they send."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hdet.monitor.base import read_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
LIMIT = 240
RUN = ["--model.n_layer=1", "--model.n_embd=16", "--model.block_size=16", "--train.batch_size=2"]
RUN += [
    "--train.eval_every=0",
    "--train.eval_batches=1",
    "--train.log_every=1",
    "--hdet.spread=0.2",
    "--hdet.converge_every=3",
]
ENDLESS = [*RUN, "--train.total_steps=1000000"]


def environment(**settings):
    """Of a machine: this Python, nothing installed, names that loopback knows, and a lost machine noticed soon."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC", "PET_"))
    } | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HDET_SETUP": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": "1",
        "PET_LOCAL_ADDR": "localhost",
        "PET_RDZV_CONF": "keep_alive_interval=1",
        **settings,
    }


def port_in(low, high):
    """A free port."""
    for port in range(low + os.getpid() % 1000, high):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise AssertionError(f"no free port in [{low}, {high})")


def descendants(pid):
    """Process ids of all that a process has started, and of the process."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += descendants(int(child))
    return found


class Nodes:
    """What runs; all of it is killed in the end."""

    def __init__(self, folder):
        self.folder, self._processes = folder, []
        self.log_dir = folder / "run"

    def start(self, name, command, **settings):
        """A process and what it starts, its output in a file."""
        with open(self.folder / f"{name}.txt", "a") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(**settings),
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def multinode(self, name, nodes, port, *arguments, **settings):
        """launch/multinode.sh as on one of the machines."""
        command = ["bash", str(ROOT / "launch" / "multinode.sh"), f"--train.log_dir={self.log_dir}", *arguments]
        return self.start(name, command, NNODES=str(nodes), HEAD_ADDR="localhost", PORT=str(port), **settings)

    def lose(self, process):
        """A machine is switched off: its agent and its training processes are gone at once."""
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def wait(self, *processes):
        """Their exit statuses."""
        until = time.monotonic() + LIMIT
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {LIMIT} s:\n{self.said()}") from None

    def wait_until(self, is_so, *alive):
        """Wait; fail if one of the processes that must be ``alive`` is not."""
        until = time.monotonic() + LIMIT
        while not is_so():
            dead = [process.returncode for process in alive if process.poll() is not None]
            if dead or time.monotonic() > until:
                raise AssertionError(f"{dead} ended, or nothing came in {LIMIT} s:\n{self.said()}")
            time.sleep(0.05)

    def said(self):
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.txt")))

    def steps(self):
        """The steps in the run's record; the last line may be half written."""
        path = self.log_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [int(step) for step in re.findall(r'"step": (\d+)[^\n]*\n', text)]

    def saved(self):
        """The checkpoint's step; 0 for none."""
        path = self.log_dir / "checkpoint.pt"
        return torch.load(path, weights_only=True)["step"] if path.exists() else 0

    def close(self):
        for process in self._processes:
            if process.poll() is None:
                self.lose(process)


@pytest.fixture
def nodes(tmp_path):
    found = Nodes(tmp_path)
    yield found
    found.close()


def test_two_machines_one_of_which_is_lost_joins_again_and_a_resume_on_one(nodes):
    port = port_in(21000, 29000)
    arguments = [*ENDLESS, "--train.save_every=3", "--resume"]
    first = nodes.multinode("first", 2, port, *arguments, RESTARTS="3")
    nodes.wait_until(lambda: _listens(port), first)  # the head
    second = nodes.multinode("second", 2, port, *arguments, RESTARTS="3")
    nodes.wait_until(lambda: nodes.saved() >= 6, first, second)
    assert "2 replicas on cpu, spread 0.2" in nodes.said()

    nodes.lose(second)
    at_loss = nodes.saved()
    again = nodes.multinode("again", 2, port, *arguments, RESTARTS="3")
    nodes.wait_until(lambda: nodes.saved() > at_loss + 3, first, again)
    (resumed,) = re.findall(r"Resumed after step (\d+)", nodes.said())
    assert at_loss <= int(resumed) < nodes.saved()

    for process in (first, again):  # as Ctrl-C in both terminals: all save, and stop
        os.killpg(process.pid, signal.SIGINT)
    assert 0 not in nodes.wait(first, again)
    step = nodes.saved()
    rounds = read_jsonl(nodes.log_dir / "rounds.jsonl")
    assert {len(one["multipliers"][0]) if "multipliers" in one else len(one["losses"]) for one in rounds} == {2}

    more = [*RUN, f"--train.total_steps={step + 6}", "--resume"]
    alone = nodes.multinode("alone", 1, port_in(port + 1, 30000), *more, NPROC="3")
    assert nodes.wait(alone) == [0], nodes.said()
    said = (nodes.folder / "alone.txt").read_text()
    assert f"Resumed after step {step}." in said
    assert "3 replicas on cpu" in said
    assert nodes.saved() == step + 6
    assert (nodes.log_dir / "summary.json").exists()


def _listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


# What the script asks of Slurm. A task is a process; `scancel` reaches all that the tasks have started, as Slurm does.
STAND_INS = {
    "srun": """#!/usr/bin/env bash
echo "srun $*" >>"$STAND_IN/calls"
while [[ "$1" == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    echo $! >>"$STAND_IN/tasks"
done
status=0
for task in $(jobs -p); do wait "$task" || status=$?; done
exit "$status"
""",
    "scontrol": """#!/usr/bin/env bash
echo "scontrol $*" >>"$STAND_IN/calls"
if [[ "$1 $2" == "show hostnames" ]]; then
    tr , '\\n' <<<"$3"
fi
""",
    "scancel": """#!/usr/bin/env bash
echo "scancel $*" >>"$STAND_IN/calls"
tree() {
    local child
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$child"; done
    echo "$1"
}
for task in $(cat "$STAND_IN/tasks"); do kill -s "${1#--signal=}" $(tree "$task") 2>/dev/null; done
true
""",
}


def test_a_slurm_job_of_two_nodes_that_is_stopped_before_its_limit_goes_on_from_there(nodes):
    tools = nodes.folder / "slurm"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = port_in(20000, 39000) - 20000  # of which the script makes its port
    settings = {
        "PATH": f"{tools}:{environment()['PATH']}",
        "STAND_IN": str(tools),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
        "SLURM_JOB_ID": str(job),
    }
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), f"--train.log_dir={nodes.log_dir}"]
    batch = nodes.start("job", [*script, *ENDLESS], **settings)
    nodes.wait_until(lambda: len(nodes.steps()) > 3, batch)
    os.kill(batch.pid, signal.SIGUSR1)  # Slurm's warning, to the batch script alone
    assert nodes.wait(batch) == [0], nodes.said()
    step = nodes.saved()
    assert step >= 3
    assert nodes.steps()[-1] == step
    calls = (tools / "calls").read_text().splitlines()
    assert calls[0] == "scontrol show hostnames localhost,127.0.0.1"
    assert calls[1].startswith("srun --kill-on-bad-exit=1 bash ")
    assert calls[2:] == [f"scancel --signal=TERM {job}", f"scontrol requeue {job}"]

    (tools / "tasks").unlink()
    batch = nodes.start("requeued", [*script, *RUN, f"--train.total_steps={step + 6}"], **settings)
    assert nodes.wait(batch) == [0], nodes.said()
    said = (nodes.folder / "requeued.txt").read_text()
    assert f"Resumed after step {step}." in said
    assert "2 replicas on cpu" in said
    assert nodes.saved() == step + 6
