"""NaN, infinities and huge numbers, written into runs at random: is what comes of them excluded, undone or reported?

A run is 24 steps of a small net with BatchNorm, in rounds of 4: two virtual replicas in one process, or two processes.
At a random step a value goes into a parameter, a buffer, a gradient, the optimizer's state or a loss, on one replica or
on all. Some runs converge inside the round after it. Asked for:

- nothing that is not finite is silent: a report says that a replica was excluded, that the round was undone, what is
  not finite, or that a loss is not; or there is a DivergedError;
- if a replica stays finite, or if rounds are undone, there is no DivergedError, and all is finite in the end;
- the processes are equal in the end, bit for bit, and tell the same;
- a run into which nothing was written reports nothing.
"""

from __future__ import annotations

import datetime
import functools
import logging
import math
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hdet
from hdet.bench.faults.sections import Outcome, cases

FULL = 300
"""Runs."""
_STEPS, _ROUND = 24, 4
_KINDS = ("parameter", "buffer", "gradient", "state", "loss")
_VALUES = (math.nan, math.inf, -math.inf, 1e30, 3e38)
_SECONDS = 20.0
"""That processes wait for one another."""


class Case(NamedTuple):
    """What is done to a run."""

    number: int
    kind: str
    """``""``: nothing."""
    value: float
    step: int
    everywhere: bool
    """Whether on all replicas, or on one."""
    rollback: bool
    optimizer: str
    overlap: int
    converges: bool
    """Whether ``converge()`` is called in the round after it."""

    def __str__(self) -> str:
        where = "all replicas" if self.everywhere else "one replica"
        how = f"{self.optimizer}, rollback={self.rollback}, overlap {self.overlap}, converge() {self.converges}"
        return f"run {self.number}: {self.value:g} into a {self.kind} on {where} after step {self.step} ({how})"


class Told(NamedTuple):
    """What became of a run, on one rank."""

    bad: str
    """What was not finite at some time, on this rank: ``tensors``, ``loss`` or nothing."""
    reports: list[str]
    """What the reports told."""
    logged: bool
    error: str
    finite: bool
    """Whether parameters, buffers and state are in the end."""
    bits: bytes


def run(share: float, seed: int) -> Outcome:
    """Try the section: two thirds of the runs in this process, a third over two forked processes."""
    tried = list(_generate(cases(FULL, share), seed))
    outcome = Outcome(tried=len(tried))
    alone, together = [c for c in tried if c.number % 3], [c for c in tried if c.number % 3 == 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        told = {case: [_run(case, 0, 1)] for case in alone} | dict(zip(together, _fork(together), strict=True))
    finally:
        torch.set_num_threads(threads)
    for case, ranks in told.items():
        wrong = _judge(case, ranks)
        if wrong:
            outcome.failures.append(f"{case}: {wrong}")
    return outcome


def _generate(count: int, seed: int) -> Iterator[Case]:
    chance = random.Random(f"poison {seed}")
    for number in range(count):
        overlap = 0 if chance.random() < 0.8 else 2
        yield Case(
            number,
            "" if number % 15 == 7 else chance.choice(_KINDS),
            chance.choice(_VALUES),
            chance.randrange(_STEPS - 2 * _ROUND),
            chance.random() < 0.5,
            not overlap and chance.random() < 0.6,
            chance.choice(("adamw", "sgd")),
            overlap,
            chance.random() < 0.3,
        )


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(case: Case, rank: int, size: int) -> Told:
    """One run. Collective."""
    generator = torch.Generator().manual_seed(case.number)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.number)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # infinite by design
    model.register_buffer("average", torch.ones(3))  # equal on all replicas
    kind: Any = torch.optim.AdamW if case.optimizer == "adamw" else torch.optim.SGD
    settings: dict[str, Any] = {"virtual_replicas": 2} if size == 1 else {"gradients": "local"}
    if size > 1:
        settings["averaging"] = hdet.Averaging(overlap_steps=case.overlap)
    optimizer = kind(model.parameters(), 0.01, **({} if case.optimizer == "adamw" else {"momentum": 0.9}))
    told: list[str] = []
    logger, warnings = logging.getLogger("hdet"), _Warnings()
    logger.addHandler(warnings)
    propagate, logger.propagate = logger.propagate, False
    bad, error = "", ""

    def report(report: hdet.Report) -> None:
        excluded, losses = report.excluded, [loss for loss in report.losses if not math.isnan(loss)]
        is_loss_bad = report.complete and (len(losses) < report.replicas or not all(map(math.isfinite, losses)))
        happened = {
            f"excluded {excluded}": excluded,
            "rolled back": report.rolled_back,
            "rescaled": report.rescaled,
            "loss": is_loss_bad,
            f"not finite: {report.nonfinite}": report.nonfinite,
        }
        told.extend(what for what, whether in happened.items() if whether)

    ensemble = hdet.Ensemble(
        optimizer,
        model=model,
        spread=0.1,
        converge_every=_ROUND,
        total_steps=_STEPS,
        auto_lr=case.rollback,
        controller=hdet.controller.Published() if case.rollback else None,
        monitor=report,
        **settings,
    )
    hit = case.everywhere or rank == size - 1
    try:
        for step in range(_STEPS):
            optimizer.zero_grad()
            losses = []
            for micro in ensemble.each(range(2 if size == 1 else 1)):
                x = torch.randn(16, 4, generator=generator) + rank
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean() / (2 if size == 1 else 1)
                loss.backward()
                is_hit = hit and step == case.step and (case.everywhere or size > 1 or micro == 1)
                losses.append(case.value if is_hit and case.kind == "loss" else loss.item())
            if hit and step == case.step and case.kind == "gradient":
                _poison([p.grad for p in model.parameters() if p.grad is not None], case, generator)
            optimizer.step()
            if hit and step == case.step:
                _poison(_tensors(case.kind, model, optimizer), case, generator)
            if not _finite(model, optimizer):
                bad = "tensors"
            elif not bad and not all(map(math.isfinite, losses)):
                bad = "loss"
            ensemble.step(losses if size == 1 else losses[0])
            if case.converges and step == case.step + 1:
                ensemble.converge()
        ensemble.converge()
    except hdet.DivergedError as raised:
        error = str(raised)
    finally:
        logger.removeHandler(warnings)
        logger.propagate = propagate
    tensors = [*model.parameters(), *model.buffers()]
    bits = b"".join(t.detach().numpy().tobytes() for t in tensors)
    return Told(bad, told, bool(warnings.lines), error, _finite(model, optimizer), bits)


def _tensors(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    if kind == "parameter":
        return [p.data for p in model.parameters()]
    if kind == "buffer":
        return [b for name, b in model.named_buffers() if b.is_floating_point() and name != "mask"]
    values = [v for state in optimizer.state.values() for v in state.values()] if kind == "state" else []
    return [v for v in values if isinstance(v, Tensor) and v.dim()]


@torch.no_grad()
def _poison(tensors: Sequence[Tensor], case: Case, generator: torch.Generator) -> None:
    """Write the value into one element of one tensor, the same on every rank."""
    if tensors:
        chance = random.Random(case.number)
        tensor = tensors[chance.randrange(len(tensors))]
        tensor.view(-1)[chance.randrange(tensor.numel())] = case.value


def _finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    buffers = [b for name, b in model.named_buffers() if name != "mask"]
    return all(bool(t.isfinite().all()) for t in (*model.parameters(), *buffers, *state))


def _judge(case: Case, ranks: Sequence[Told]) -> str:
    """What is wrong with what became of a run; nothing if nothing is."""
    first = ranks[0]
    if any((one.reports, one.error) != (first.reports, first.error) for one in ranks):
        return f"the ranks tell different things: {[(one.reports, one.error) for one in ranks]}"
    told = bool(first.reports or first.error)
    if not case.kind:
        return "" if not told and first.finite else f"nothing was written, and it told {first.reports}"
    if any(one.bad for one in ranks) and not told:
        return "nobody told of what was not finite"
    if any(one.bad == "tensors" for one in ranks) and not (first.logged or first.error):
        return "nothing was logged"
    said = first.reports[-1].startswith("not finite") if first.reports else False
    ends_bad = not all(one.finite for one in ranks)
    if not first.error and ends_bad and not said:
        return f"it is not finite in the end, and the last report does not say so: {first.reports}"
    if not first.error and len({one.bits for one in ranks}) > 1:
        return "the processes are not equal in the end"
    is_huge = math.isfinite(case.value)
    can_be_saved = case.rollback or (len(ranks) > 1 and not case.everywhere)
    if can_be_saved and not is_huge and (first.error or ends_bad):
        return f"it could have been saved: {first.error or first.reports}"
    if first.error and not any(one.bad for one in ranks):
        return f"an error, though all was finite: {first.error}"
    return ""


def _fork(cases: Sequence[Case], size: int = 2) -> list[list[Told]]:
    """[case][rank] run by forked processes, all cases in the same ones."""
    if not cases:
        return []
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                _child(functools.partial(_serve, cases, rank, size, Path(folder)))
            pids.append(pid)
        statuses = _await(pids, 60 + 2 * len(cases))
        if any(statuses):
            output = "".join(path.read_text() for path in sorted(Path(folder).glob("*.txt")))
            raise RuntimeError(f"Processes ended with {statuses}:\n{output[-4000:]}")
        rows = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return [[Told(*told) for told in of_ranks] for of_ranks in zip(*rows, strict=True)]


def _child(work: Callable[[], None]) -> None:
    """Do the work of a forked process, and end it."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(cases: Sequence[Case], rank: int, size: int, folder: Path) -> None:
    with (folder / f"{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 2)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        torch.set_num_threads(1)
        limit = datetime.timedelta(seconds=_SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
        told = []
        for case in cases:
            print(case, file=output, flush=True)
            told.append(tuple(_run(case, rank, size)))
            dist.barrier()
        torch.save(told, folder / f"{rank}.pt")
        dist.destroy_process_group()


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _await(pids: Sequence[int], seconds: float) -> list[int]:
    """Their exit statuses; at the limit, and once one has failed, the others are killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) or time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, 9)
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]
