"""A simulated fleet: hdet's own code on many ranks, each a thread of one process, over torch's threaded process group.

Every rank has its own model, optimizer and scheduler, and every message goes to all, so that what is agreed is what
real processes would agree on. What is measured of it does not depend on the network: the bytes that a rank hands to
each collective, and the seconds of processor time that a rank takes at a round's end, its waiting left out.
"""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import hdet
from hdet.replicas import notes, topology

_EVERY, _ROUNDS, _WIDTH = 2, 2, 16


@dataclass(frozen=True)
class Collective:
    """One call of one rank."""

    name: str
    given: int
    """Bytes that this rank contributes."""
    received: int
    """Bytes that it holds afterwards."""


@dataclass(frozen=True)
class Fleet:
    """What one rank of a fleet does in the last of a few rounds."""

    ranks: int
    probe: bool
    weights: int
    """Bytes of the model's weights."""
    first: list[Collective]
    """Of the first step, in which all is compared."""
    collectives: list[Collective]
    """Of the round's end."""
    seconds: float
    """Of processor time of a round's end: the median over the ranks."""
    between: float
    """Of a step between."""
    error: str = ""
    """The error that every rank has raised; empty for none."""

    @property
    def message(self) -> int:
        """Bytes of the agreement at the round's end, which travels with the weights."""
        return sum(one.given for one in self.collectives if one.name == "allreduce") - self.weights

    @property
    def numbers(self) -> int:
        """That a rank tells the others in it: an element of fp32 holds a byte of a float64."""
        return self.message // (4 * 8 * self.ranks)

    @property
    def gathered(self) -> int:
        """Bytes that a rank contributes to all-gathers: losses at the probe's points, how far weights moved."""
        return sum(one.given for one in self.collectives if one.name == "allgather")


class Case(NamedTuple):
    """A fleet to simulate."""

    ranks: int
    """Each is a replica."""
    probe: bool = False
    """Whether rounds end with one."""
    stray: int | None = None
    """A rank with another ``spread``, which all must find."""


def simulate(cases: Sequence[Case]) -> list[Fleet]:
    """Run fleets, one after the other, in a process of their own.

    Raises:
        RuntimeError: if a rank of a fleet fails, or ranks come to different errors.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_simulate, cases))


class _PerThread(threading.local):
    """A dictionary for each rank, in place of one for each process."""

    def __init__(self) -> None:
        self._items: dict[Any, Any] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        return self._items.get(key, default)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._items[key] = value


class _Rank(threading.Thread):
    """One rank: trains a few rounds."""

    def __init__(self, rank: int, ranks: int, store: Any, model: nn.Module, probe: bool, spread: float) -> None:
        super().__init__(name=f"rank {rank}", daemon=True)
        self.rank, self._ranks, self._store, self._model = rank, ranks, store, model
        self._probe, self._spread = probe, spread
        self.calls: list[Collective] = []
        self.first: list[Collective] = []
        self.last: list[Collective] = []
        self.seconds: list[float] = []
        self.error = ""
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            dist.init_process_group("threaded", rank=self.rank, world_size=self._ranks, store=self._store)
            self._train()
        except hdet.HdetError as error:
            self.error = str(error)
        except BaseException as failure:
            self.failure = failure

    def _train(self) -> None:
        optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        scheduler = hdet.OneCycleLR(
            optimizer,
            0.01,
            15 * _EVERY,  # rounds are so long that each ends with a probe from the second on
            cycle_momentum=False,
            model=self._model,
            spread=self._spread,
            converge_every=_EVERY,
            auto_lr=True,
            gradients="local",
            rollback=False,
            probe=hdet.Probe(loss_fn=_loss, batches=[self._batch(0)]) if self._probe else None,
        )
        for step in range(_EVERY * _ROUNDS):
            loss = _loss(self._model, self._batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.calls = []
            started = time.thread_time()
            scheduler.step(loss)
            self.seconds.append(time.thread_time() - started)
            if step == 0:
                self.first = self.calls
        self.last = self.calls

    def _batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.rank + step)
        return torch.randn(4, _WIDTH, generator=generator)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch.roll(1, 1)).square().mean()
    return loss


def _simulate(case: Case) -> Fleet:
    ranks, probe, stray = case
    torch.set_num_threads(1)  # else each rank has threads of its own
    sys.setswitchinterval(1.0)  # a rank works until it waits for the others
    torch.manual_seed(0)
    model = nn.Linear(_WIDTH, _WIDTH)
    with _threaded() as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fleet = [
            _Rank(rank, ranks, store, copy.deepcopy(model), probe, 0.2 if rank == stray else 0.1)
            for rank in range(ranks)
        ]
        for rank in fleet:
            rank.start()
        for rank in fleet:
            while rank.is_alive():
                rank.join(0.5)
                _check(fleet)  # the others wait for one that has failed
    _check(fleet)
    errors = {rank.error for rank in fleet}
    if len(errors) > 1:
        raise RuntimeError(f"Ranks of the fleet raised different errors: {sorted(errors)}")
    weights = sum(p.nbytes for p in model.parameters())
    if error := errors.pop():
        return Fleet(ranks, probe, weights, [], [], 0.0, 0.0, error)
    # The last rank to come does the work of a collective for all: the median leaves it out.
    ends = statistics.median(rank.seconds[-1] for rank in fleet)
    between = statistics.median(rank.seconds[-2] for rank in fleet)
    return Fleet(ranks, probe, weights, fleet[0].first, fleet[0].last, ends, between)


def _check(fleet: Sequence[_Rank]) -> None:
    """Raise ``RuntimeError`` if a rank has failed."""
    for rank in fleet:
        if rank.failure is not None:
            raise RuntimeError(f"{rank.name} of the fleet has failed: {rank.failure!r}") from rank.failure


def _threads() -> Any:
    """torch's process group of threads."""
    return importlib.import_module("torch.testing._internal.distributed.multi_threaded_pg")


@contextmanager
def _threaded() -> Iterator[Any]:
    """Threads are ranks: torch's threaded process group, with its calls counted."""
    threaded = _threads()
    group: Any = threaded.ProcessLocalGroup
    original = {name: getattr(group, name) for name in ("allreduce", "allgather", "broadcast")}

    def counted(name: str) -> Any:
        def call(self: Any, first: Any, *rest: Any) -> Any:
            rank = threading.current_thread()
            assert isinstance(rank, _Rank)
            given = rest[0] if name == "allgather" else first
            sizes = (sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor)) for tensors in (given, first))
            rank.calls.append(Collective(name, *sizes))
            return original[name](self, first, *rest)

        return call

    def gather(_: Any, data: Any) -> None:  # torch's own copies tensor by tensor, a million of them for 1,024 ranks
        values = [given[0].detach() for _, given in data]
        for (outputs,), _ in data:
            torch._foreach_copy_([output.detach() for output in outputs], values)

    isolate: Any = importlib.import_module("torch._C._distributed_c10d")._set_thread_isolation_mode
    isolate(True)  # names of process groups are each thread's own
    threaded._install_threaded_pg()
    meetings, own_gather = topology._meetings, threaded.AllGather.work
    topology._meetings = _PerThread()  # type: ignore[assignment]
    patience, notes.PATIENCE = notes.PATIENCE, math.inf  # nobody is late: all share one processor
    try:
        threaded.AllGather.work = gather
        for name in original:
            setattr(group, name, counted(name))
        yield dist.HashStore()
    finally:
        for name, method in original.items():
            setattr(group, name, method)
        topology._meetings = meetings
        notes.PATIENCE = patience
        threaded.AllGather.work = own_gather
        group.reset()
        threaded._uninstall_threaded_pg()
        isolate(False)
