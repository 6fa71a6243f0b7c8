"""Regrets, as tables in Markdown and as verdicts on the project's targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from hdet.bench.regret.contenders import CONTENDERS, ORACLE, Contender
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Run
from hdet.monitor.tables import markdown

NEAR = (0.1, 3.0)
"""Starts for which the first target holds."""
FAR = (0.01, 8.0)
"""Starts of the second."""


class Oracle(NamedTuple):
    """The best that OneCycle does on a workload."""

    loss: float
    start: float


class Regret(NamedTuple):
    """Of one contender, workload and start, over the seeds. Infinite where a seed diverged."""

    mean: float
    low: float
    high: float
    diverged: int
    seeds: int


@dataclass(frozen=True)
class Regrets:
    """The regrets of all runs."""

    starts: tuple[float, ...]
    oracles: dict[str, Oracle]
    """By workload. One whose every sweep diverged, or did not run, is left out altogether."""
    cells: dict[tuple[str, str, float], Regret]
    """By workload, contender and start."""

    @property
    def contenders(self) -> list[str]:
        """Those that ran."""
        return list(dict.fromkeys(contender for _, contender, _ in self.cells))

    def of(self, contender: str, workload: str | None = None) -> dict[tuple[str, float], Regret]:
        """A contender's regrets by workload and start."""
        return {
            (where, start): cell
            for (where, who, start), cell in self.cells.items()
            if who == contender and workload in (None, where)
        }

    def worst(self, contender: str, workload: str | None = None) -> tuple[str, float, float] | None:
        """Where a contender does worst: workload, start and mean regret. None if it did not run there."""
        cells = self.of(contender, workload)
        return max(((*where, cell.mean) for where, cell in cells.items()), key=lambda found: found[2], default=None)


@dataclass(frozen=True)
class Target:
    """One of the project's targets, and whether a contender meets it."""

    contender: str
    name: str
    wanted: str
    measured: str
    verdict: Literal["met", "missed", "not measured"]


def regrets_of(
    outcomes: Mapping[Run, Outcome], starts: Iterable[float], contenders: Mapping[str, Contender] = CONTENDERS
) -> Regrets:
    """Compare every run with its workload's oracle.

    Args:
        outcomes: of one plan: a workload's runs all have the same number of steps.
        starts: those to show; the oracle is the best of all there are.
        contenders: in the order in which they are shown.
    """
    starts = tuple(starts)
    losses: dict[tuple[str, str, float | None], list[float]] = {}
    for run, outcome in outcomes.items():
        loss = outcome.loss if math.isfinite(outcome.loss) else math.inf
        losses.setdefault((run.workload, run.contender, run.start), []).append(loss)
    found = Regrets(starts, {}, {})
    for workload in dict.fromkeys(run.workload for run in outcomes):
        oracle = _oracle(losses, workload)
        if oracle is None:
            continue
        found.oracles[workload] = oracle
        for name, contender in contenders.items():
            for start in starts:
                own = losses.get((workload, name, start if contender.uses_start else None))
                if own:
                    found.cells[workload, name, start] = _regret([loss / oracle.loss - 1 for loss in own])
    return found


def _oracle(losses: Mapping[tuple[str, str, float | None], list[float]], workload: str) -> Oracle | None:
    sweep = {start: own for (where, who, start), own in losses.items() if (where, who) == (workload, ORACLE)}
    seeds = max(map(len, sweep.values()), default=0)
    found = [Oracle(statistics.fmean(own), start) for start, own in sweep.items() if start and len(own) == seeds]
    best = min(found, default=None)
    return best if best and math.isfinite(best.loss) else None


def _regret(values: Sequence[float]) -> Regret:
    return Regret(statistics.fmean(values), min(values), max(values), values.count(math.inf), len(values))


# ------------------------------------------------------------------------------------------------------------ tables


def tables(regrets: Regrets) -> str:
    """One table per workload: contenders by starts, mean over the seeds (min..max)."""
    parts = []
    for workload, oracle in regrets.oracles.items():
        rows = [("regret", *(f"x{start:.3g}" for start in regrets.starts))]
        for name in regrets.contenders:
            own = regrets.of(name, workload)
            if own:
                cells = (own.get((workload, start)) for start in regrets.starts)
                rows.append((name, *(_cell(cell) if cell else "-" for cell in cells)))
        parts.append(f"### {workload}: oracle {oracle.loss:.4g}, at x{oracle.start:.3g}\n\n{markdown(rows)}\n")
    return "\n".join(parts)


def summary(regrets: Regrets, contenders: Mapping[str, Contender] = CONTENDERS) -> str:
    """One table of all contenders: the worst mean regret over workloads and starts, the mean at x1, the worst
    workload."""
    rows = [("contender", "worst case", "mean at x1", "worst workload")]
    for name in regrets.contenders:
        worst = regrets.worst(name)
        assert worst is not None
        workload, start, regret = worst
        tuned = _tuned(regrets, name)
        where = f"{workload}, x{start:.3g}" if contenders[name].uses_start else workload
        rows.append((name, percent(regret), "-" if tuned is None else percent(tuned), where))
    return markdown(rows)


def targets_table(regrets: Regrets, contenders: Mapping[str, Contender] = CONTENDERS) -> str:
    """The targets, one to a row."""
    rows = [("contender", "target", "wanted", "measured", "verdict")]
    rows += [(t.contender, t.name, t.wanted, t.measured, t.verdict) for t in targets(regrets, contenders)]
    return markdown(rows)


def percent(regret: float) -> str:
    """A regret for the reader."""
    if not math.isfinite(regret):
        return "diverged"
    digits = 2 if abs(regret) < 0.1 else 1 if abs(regret) < 1 else 0
    return f"{100 * regret:.{digits}f}%"


def _cell(cell: Regret) -> str:
    if cell.diverged:
        return "diverged" if cell.diverged == cell.seeds else f"diverged ({cell.diverged} of {cell.seeds})"
    spread = f" ({percent(cell.low)[:-1]}..{percent(cell.high)[:-1]})" if cell.seeds > 1 else ""
    return percent(cell.mean) + spread


def as_json(regrets: Regrets, contenders: Mapping[str, Contender] = CONTENDERS) -> dict[str, Any]:
    """Everything here as plain values. What is not finite is null."""
    cells = [
        {"workload": workload, "contender": contender, "start": start, **cell._asdict()}
        for (workload, contender, start), cell in regrets.cells.items()
    ]
    for cell in cells:
        cell |= {name: None for name in ("mean", "low", "high") if not math.isfinite(cell[name])}
    return {
        "starts": list(regrets.starts),
        "oracles": {workload: oracle._asdict() for workload, oracle in regrets.oracles.items()},
        "regrets": cells,
        "targets": [asdict(target) for target in targets(regrets, contenders)],
    }


# ----------------------------------------------------------------------------------------------------------- targets


def targets(regrets: Regrets, contenders: Mapping[str, Contender] = CONTENDERS) -> list[Target]:
    """The project's targets for each of its own contenders, judged by what of it was measured."""
    found = []
    for name, contender in contenders.items():
        if contender.ours:
            peers = [peer for peer in regrets.contenders if not contenders[peer].ours]
            near = f"regret from every start in {NEAR[0]:g} to {NEAR[1]:g}"
            found += [
                _within(regrets, name, near, lambda start: NEAR[0] <= start <= NEAR[1], 0.03),
                _within(regrets, name, f"regret at {FAR[0]:g} and {FAR[1]:g}", lambda start: start in FAR, 0.05),
                _at_tuned(regrets, name),
                _against_peers(regrets, name, peers),
            ]
    return found


def _within(regrets: Regrets, name: str, target: str, chosen: Callable[[float], bool], limit: float) -> Target:
    wanted = f"at most {limit:.0%}"
    cells = {where: cell.mean for where, cell in regrets.of(name).items() if chosen(where[1])}
    if not cells:
        return Target(name, target, wanted, "", "not measured")
    workload, start = max(cells, key=lambda where: cells[where])
    missed = sum(regret > limit for regret in cells.values())
    count = f"; {missed} of {len(cells)} cases miss it" if missed > 1 else ""
    measured = f"{percent(cells[workload, start])} ({workload}, x{start:.3g}{count})"
    return Target(name, target, wanted, measured, "missed" if missed else "met")


def _at_tuned(regrets: Regrets, name: str) -> Target:
    target, wanted, mean = "regret at x1, mean over workloads", "at most 0.5%", _tuned(regrets, name)
    if mean is None:
        return Target(name, target, wanted, "", "not measured")
    return Target(name, target, wanted, percent(mean), "met" if mean <= 0.005 else "missed")


def _tuned(regrets: Regrets, name: str) -> float | None:
    means = [cell.mean for (_, start), cell in regrets.of(name).items() if start == 1]
    return statistics.fmean(means) if means else None


def _against_peers(regrets: Regrets, name: str, peers: Sequence[str]) -> Target:
    """How much worse every peer's worst case over the starts is, on every workload."""
    target, wanted = "worst case, against every peer on every workload", "lower"
    leads: dict[str, float] = {}
    for workload in regrets.oracles:
        ours = regrets.worst(name, workload)
        for peer in peers:
            theirs = regrets.worst(peer, workload)
            if ours and theirs:
                both = f"{percent(ours[2])} against {percent(theirs[2])} ({peer}, {workload}"
                leads[both] = theirs[2] - ours[2] if math.isfinite(ours[2]) else -math.inf
    if not leads:
        return Target(name, target, wanted, "", "not measured")
    closest = min(leads, key=lambda both: leads[both])
    missed = sum(lead <= 0 for lead in leads.values())
    count = f"; {missed} of {len(leads)} cases miss it" if missed > 1 else ""
    return Target(name, target, wanted, f"{closest}{count})", "missed" if missed else "met")
