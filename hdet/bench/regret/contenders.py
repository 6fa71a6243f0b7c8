"""Who takes part in the regret benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hdet.bench.regret import peers
from hdet.bench.regret.autolrs import autolrs
from hdet.bench.regret.forked import fork
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.watched import watch
from hdet.bench.regret.workloads import Workload
from hdet.schedules.found import Recorder
from hdet.steer.published import Published

ORACLE = "one_cycle"
"""The contender whose best start is the measure of all."""
_OTHER_SEED = 1000
"""How far away the seed is with which a schedule was found that is replayed."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train a model."""

    name: str
    run: Callable[[Workload, float, int], Outcome]
    """Trains a workload with a max_lr and a seed. Raises ``Unavailable``, with the reason, if it cannot run here."""
    uses_start: bool = True
    """Whether max_lr matters. If not, it runs once per seed, and that is shown for every start."""
    ours: bool = False
    """Whether the targets are about it."""
    reference: bool = False
    """Whether it is there to judge the others by: it runs when it is asked for, and is left out of comparisons."""
    describe: str
    version: int = 1
    """Raised with every change of its results: its earlier runs are then made again."""


def _peer(train: Callable[[Workload, float, int], float], *, uses_start: bool = True) -> Contender:
    """A function of :mod:`.peers`, timed."""

    def run(workload: Workload, max_lr: float, seed: int) -> Outcome:
        started = time.perf_counter()
        loss = train(workload, max_lr, seed)
        return Outcome(loss, time.perf_counter() - started)

    describe = " ".join((train.__doc__ or "").split())
    return Contender(name=train.__name__, run=run, uses_start=uses_start, describe=describe)


def _simulated(
    name: str, describe: str, *, ours: bool = False, uses_start: bool = True, version: int = 1, **settings: Any
) -> Contender:
    """hdet's, with replicas simulated."""

    def run(workload: Workload, max_lr: float, seed: int) -> Outcome:
        return simulate(workload, max_lr, seed, Setting(**settings))

    return Contender(name=name, run=run, uses_start=uses_start, ours=ours, describe=describe, version=version)


def _replayed(workload: Workload, max_lr: float, seed: int) -> Outcome:
    started = time.perf_counter()
    recorder = Recorder(["group0"])
    first = simulate(workload, max_lr, seed + _OTHER_SEED, Setting(), recorder)
    model = peers.build(workload, seed)
    optimizer = peers.optimizer_of(workload, model, max_lr)
    loss = peers.train(workload, model, optimizer, recorder.schedule().scheduler(optimizer), seed)
    return Outcome(loss, time.perf_counter() - started, first.gain, {"first": first.loss})


_OURS = (
    _simulated(
        "hdet",
        'max_lr="auto": found by hdet.find_lr around the start, then auto_lr=True with a probe; the samples that the '
        "search takes are taken from the run.",
        ours=True,
        version=18,
        auto=True,
    ),
    _simulated("posterior", "auto_lr=True with a probe, from the start given.", ours=True, version=2),
    _simulated(
        "movement",
        "auto_lr=True without a probe, from the start given: by how far the weights move alone.",
        ours=True,
        probe=False,
    ),
    Contender(
        name="replayed",
        run=_replayed,
        describe="The schedule that posterior found in another run, from the start given, replayed without replicas.",
        version=10,
    ),
    _simulated(
        "find_lr",
        "max_lr found by hdet.find_lr around the start, then OneCycle; the same number of samples in all.",
        version=6,
        auto=True,
        controller=Published(meta_lr=0.0),
        rollback=False,
    ),
    _simulated(
        "published",
        "auto_lr=True without a probe: the published controller, corrected.",
        version=2,
        controller=Published(),
    ),
    _simulated(
        "published_literal",
        "The published controller word for word.",
        controller=Published(literal=True, meta_lr=1.0),
        rollback=False,
    ),
)

REPEATS = (0.999, 1.001, 1.002)
"""Gains of the repeats of OneCycle: how far apart they end says what chance is worth."""


def _repeat(gain: float) -> Contender:
    def run(workload: Workload, max_lr: float, seed: int) -> Outcome:
        started = time.perf_counter()
        loss = peers.one_cycle(workload, gain * max_lr, seed)
        return Outcome(loss, time.perf_counter() - started)

    return Contender(name=f"repeat_{gain:g}", run=run, reference=True, describe=f"OneCycle with {gain:g} times max_lr.")


_REFERENCES = (
    *map(_repeat, REPEATS),
    Contender(
        name="watched",
        run=watch,
        reference=True,
        describe="OneCycle with a probe that moves nothing; keeps what each round shows.",
    ),
    Contender(
        name="forked",
        run=fork,
        reference=True,
        describe="OneCycle, and its end with half, twice and the tuned learning rate from several times on.",
    ),
)

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *_OURS,
        _peer(peers.one_cycle),
        _peer(peers.schedule_free),
        _peer(peers.prodigy, uses_start=False),
        _peer(peers.d_adaptation, uses_start=False),
        _peer(peers.dog, uses_start=False),
        _peer(peers.mechanic, uses_start=False),
        _peer(autolrs),
        _peer(peers.nadamw_cosine),
        _peer(peers.population),
        *_REFERENCES,
    )
}
