"""One process of a run fails: it says why, with its rank, and all end within seconds, with its status."""

import gc
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import CONTEXT
from torch.nn.parallel import DistributedDataParallel

from hdet.bench.faults._nursery import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
LIMIT = 120
RUN = ["--task.name=digits", "--model.channels=1", "--train.batch_size=2", "--train.eval_every=0", "--hdet.spread=0.2"]
RUN += ["--train.eval_batches=1", "--train.total_steps=100000", "--hdet.converge_every=3", "--train.log_every=1"]


def _rank(rank, size, port, arguments, kind, output):
    """``python -m hdet.train`` on one rank; ``kind`` says what goes wrong there."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {
        name: str(value) for name, value in {**facts, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items()
    }
    sys.argv = ["hdet.train", *arguments]
    from hdet.train import __main__ as program
    from hdet.train import models, trainer
    from hdet.train.config import ConfigError

    def fail(*_, **__):
        if kind == "bad data":
            raise ConfigError("The data holds token 300.")
        if kind == "no memory":
            raise MemoryError("cannot allocate 10 GiB")
        if kind == "dies":
            os.kill(os.getpid(), 9)
        raise ArithmeticError("a mistake of the program's")

    def later(original, calls):
        count = [0]

        def call(*arguments, **settings):
            count[0] += 1
            return fail() if count[0] > calls else original(*arguments, **settings)

        return call

    def destroy(original=torch.distributed.destroy_process_group):
        alive = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        print(f"rank {rank}: {alive} models alive", flush=True)
        original()

    if kind == "counts":
        torch.distributed.destroy_process_group = destroy
    elif kind == "model":
        models.build = fail
    elif kind in ("loss", "bad data", "no memory", "dies"):
        models.loss_of = later(models.loss_of, 7)
    elif kind == "wrapping":
        trainer.DDPStrategy.wrap = fail
    elif kind == "monitor":
        trainer.RunLog.training = later(trainer.RunLog.training, 3)
    sys.exit(program.main())


def run(tmp_path, rank, kind, *arguments, of_rank=(), size=2):
    """(exit status of each rank, output, seconds) of a run in which ``kind`` goes wrong on one rank."""
    port = free_port()
    output = tmp_path / "output.txt"
    common = [*RUN, f"--train.log_dir={tmp_path}/run", *arguments]
    processes = []
    for r in range(size):
        own = [*common, *(of_rank if r == rank else ())]
        processes.append(
            CONTEXT.Process(target=_rank, args=(r, size, port, own, kind if r == rank else None, str(output)))
        )
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, started + LIMIT - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return statuses, output.read_text()


@pytest.mark.parametrize(
    ("kind", "rank", "status", "said"),
    [
        ("model", 1, 1, "a mistake of the program's"),
        ("wrapping", 0, 1, "a mistake of the program's"),
        ("loss", 1, 1, "a mistake of the program's"),
        ("loss", 0, 1, "a mistake of the program's"),
        ("bad data", 1, 2, "The data holds token 300."),
        ("bad data", 2, 2, "The data holds token 300."),
        ("no memory", 1, 2, "Out of memory: cannot allocate 10 GiB"),
        ("monitor", 0, 1, "a mistake of the program's"),
    ],
)
def test_an_error_on_one_rank_ends_all(tmp_path, kind, rank, status, said):
    statuses, told = run(tmp_path, rank, kind, size=3)
    assert statuses == [status] * 3, told
    assert re.search(rf"error on rank {rank} of 3: ", told)
    assert told.count("error on rank") == 1
    assert said in told
    assert ("Traceback" in told) == (status == 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.dropout=2"], "model.dropout=2"),
        (["--config=/nowhere/at/all.yaml"], "No such file"),
        (["--task.name=text", "--task.path=/nowhere/at/all"], "task.path=/nowhere/at/all"),
        (["--hdet.spread=3"], "spread=3"),
        (["--train.replicas=7"], "train.replicas=7"),
    ],
)
def test_a_mistake_on_one_rank_ends_all_with_status_2(tmp_path, rank, arguments, said):
    statuses, told = run(tmp_path, rank, None, of_rank=arguments)
    assert statuses == [2, 2], told
    assert told.count(f"error on rank {rank} of 2: ") == 1
    assert told.count("error on rank") == 1
    assert said in told
    assert "Traceback" not in told


def test_a_mistake_on_all_ranks_is_told_once(tmp_path):
    statuses, told = run(tmp_path, 0, None, "--model.dropout=2", size=3)
    assert statuses == [2, 2, 2]
    assert told.count("model.dropout=2") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hdet.probe=true", "--train.save_every=1"],
        ["--hdet.spread=0", "--schedule.name=cosine"],
        ["--hdet.gradients=local", "--hdet.outer.momentum=0.5"],
        ["--optimizer.max_lr=auto", "--train.accumulate=2", "--hdet.virtual_replicas=true"],
        ["--hdet.averaging.overlap_steps=1", "--hdet.controller=published", "--model.dropout=0.1"],
        ["--hdet.probe=held_out", "--hdet.gradients=local", "--hdet.hyperparameters={weight_decay: 0.5}"],
    ],
)
def test_nothing_refers_to_the_model_when_the_process_group_is_destroyed(tmp_path, arguments):
    """Else its end would free the group, with Python's lock held, for which a thread of the group may wait."""
    statuses, told = run(tmp_path, 1, "counts", "--train.total_steps=4", *arguments)
    assert statuses == [0, 0], told
    assert "rank 1: 0 models alive" in told


def test_a_process_that_dies_ends_the_others(tmp_path):
    statuses, told = run(tmp_path, 1, "dies", size=3)
    assert statuses[1] == -9
    assert statuses[0] == statuses[2] == 1, told
    assert "error on rank" in told


def test_a_checkpoint_that_only_some_ranks_find_is_told(tmp_path):
    assert run(tmp_path, 0, None, "--train.total_steps=2", "--train.stop_at=2")[0] == [0, 0]
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "output.txt").unlink()
    elsewhere = [f"--train.log_dir={tmp_path}/elsewhere"]
    statuses, told = run(tmp_path, 1, None, "--train.total_steps=2", "--resume", of_rank=elsewhere)
    assert statuses == [2, 2]
    assert "do not find the same checkpoint" in told
    assert "rank 0: step 2, rank 1: none" in told
    assert (Path(tmp_path) / "run" / "checkpoint.pt").read_bytes() == before
