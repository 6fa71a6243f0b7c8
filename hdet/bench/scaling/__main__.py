"""The command line: see :mod:`hdet.bench.scaling`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hdet.bench import report
from hdet.bench.scaling import costs, fit, fleet
from hdet.bench.scaling.network import PUBLISHED, Cluster, Link
from hdet.monitor.tables import markdown

PARAMETERS = (0.1e9, 1e9, 7e9, 70e9, 400e9)
REPLICAS = (1, 8, 64, 1024, 10_000)
RANKS = (4, 64, 1024)
"""Of the simulated fleets."""
_GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, compute, print Markdown and write it all; returns the exit status."""
    options = parser().parse_args(argv)
    machine = costs.Machine(memory=options.memory * _GB, operations=options.operations)
    between = replace(PUBLISHED.between, bandwidth=options.between * _GB)
    if options.between * _GB != PUBLISHED.between.bandwidth:
        between = replace(between, source="given: --between")
    cluster = replace(PUBLISHED, between=between)
    parts: list[str] = []
    content: dict[str, Any] = {"machine": report.machine(), "cluster": asdict(cluster)}
    work = costs.Work(steps=options.steps, tokens=options.tokens, probe_tokens=options.tokens)
    if "fit" in options.sections:
        say("all-reduces among 2, 3 and 4 processes")
        timed = fit.measure()
        found = fit.fit(timed)
        say("converges of hdet among 2 and 4 processes")
        predicted = fit.predict(found.link)
        parts.append(_fit(found, timed, predicted))
        content["fit"] = {"fit": asdict(found), "timed": timed, "predicted": predicted}
    if "fleet" in options.sections:
        say(f"fleets of {', '.join(map(str, options.ranks))} ranks")
        fleets = fleet.simulate([fleet.Case(ranks, probe) for ranks in options.ranks for probe in (False, True)])
        parts.append(_fleets(fleets))
        content["fleets"] = [asdict(one) for one in fleets]
        work = replace(work, numbers=fleets[-1].numbers)
        host = _line([(one.ranks, one.seconds) for one in fleets if one.probe])
    else:
        host = _line([(1, 0.0)])
    if "costs" in options.sections:
        parts.append(_costs(cluster, work, machine, host, measured="fleet" in options.sections))
        content["costs"] = _table_of(cluster, work, machine, host)
    print("\n\n".join(parts))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    found = argparse.ArgumentParser(
        prog="python -m hdet.bench.scaling",
        description="Bytes, memory and time of a round, by replicas and parameters.",
    )
    add = found.add_argument
    sections = ("fit", "fleet", "costs")
    add("--sections", nargs="+", choices=sections, default=sections, help="default: all")
    add("--ranks", nargs="+", type=int, default=RANKS, metavar="N", help="of the simulated fleets; default: 4 64 1024")
    add("--steps", type=int, default=100, metavar="T", help="to a round; default: 100")
    add("--tokens", type=int, default=8192, metavar="N", help="of a GPU in a step, and in a probe; default: 8192")
    add("--between", type=float, default=50.0, metavar="GB/s", help="of a GPU's network adapter; default: 50")
    add("--memory", type=float, default=80.0, metavar="GB", help="of a GPU; default: 80")
    add("--operations", type=float, default=400e12, metavar="N", help="per second and GPU; default: 400e12")
    add("--output", type=Path, default=Path("runs/scaling.json"), metavar="FILE", help="default: runs/scaling.json")
    return found


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"hdet.bench.scaling: {what}", file=sys.stderr, flush=True)


def _line(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Through the smallest and the largest fleet: seconds by ranks."""
    (low, at_low), (high, at_high) = min(points), max(points)
    slope = (at_high - at_low) / (high - low) if high > low else 0.0
    return lambda ranks: at_low + slope * (ranks - low)


def _fit(found: fit.Fit, timed: Sequence[fit.Timed], predicted: Sequence[fit.Predicted]) -> str:
    link = found.link
    rows = [
        (f"{p.shape}, {p.ranks} processes", _time(p.model), _time(p.measured), f"{p.model / p.measured:.2f}")
        for p in predicted
    ]
    lines = [
        f"Measured: {len(timed)} all-reduces over gloo. Fitted to those of {fit.FITTED[0]} and {fit.FITTED[1]} "
        f"processes: alpha {link.alpha * 1e6:.0f} µs, {link.bandwidth / _GB:.2f} GB/s "
        f"{'that all processes share' if link.is_shared else 'for each process'}; median error {found.error:.0%}, of "
        f"those of {fit.HELD_OUT} processes {found.held_out_error:.0%}.",
        "",
        markdown([("converge of hdet", "model", "measured", "model / measured"), *rows], padded=False),
    ]
    return "\n".join(lines)


def _fleets(fleets: Sequence[fleet.Fleet]) -> str:
    lines = ["Simulated: hdet's own code on threads.", ""]
    rows = [
        (
            f"{one.ranks:,}{', with a probe' if one.probe else ''}",
            str(one.numbers),
            _bytes(one.message),
            f"{one.gathered} B",
            _time(one.seconds),
            _time(one.between),
        )
        for one in fleets
    ]
    sizes = ("replicas", "numbers a rank tells", "message, with the weights", "all-gathers, given by a rank")
    head = (*sizes, "processor time of a round's end", "of a step between")
    return "\n".join([*lines, markdown([head, *rows], padded=False)])


def _strategies(parameters: float, machine: costs.Machine) -> Iterator[costs.Strategy]:
    """Those that fit: without hdet. ZeRO-3 over as many nodes as it takes with hdet."""
    for strategy in (costs.DDP, costs.HSDP):
        if costs.TRAINING * parameters / strategy.members < machine.memory:
            yield strategy
    members = costs.ZERO3.members
    each = costs.TRAINING + costs.ROLLBACK + costs.PROBE
    while each * parameters / members > machine.memory:
        members *= 2
    yield replace(costs.ZERO3, members=members)


def _table_of(
    cluster: Cluster, work: costs.Work, machine: costs.Machine, host: Callable[[int], float]
) -> list[dict[str, Any]]:
    found = []
    for parameters in PARAMETERS:
        for strategy in _strategies(parameters, machine):
            for replicas in REPLICAS:
                here = replace(work, host_seconds=max(0.0, host(replicas * strategy.members)))
                one = costs.of_round(parameters, replicas, strategy, cluster, here, machine)
                facts = {"parameters": parameters, "replicas": replicas, "strategy": asdict(strategy)}
                found.append({**facts, **asdict(one), "share": one.share})
    return found


def _costs(
    cluster: Cluster, work: costs.Work, machine: costs.Machine, host: Callable[[int], float], *, measured: bool
) -> str:
    table = _table_of(cluster, work, machine, host)

    def name_of(row: dict[str, Any]) -> tuple[float, str, int]:
        return row["parameters"], row["strategy"]["name"], row["strategy"]["members"]

    cases = list(dict.fromkeys(name_of(row) for row in table))
    heads = [f"{n:,}" for n in REPLICAS if n > 1]
    times, memory = [], []
    for case in cases:
        rows = [row for row in table if name_of(row) == case]
        parameters, name, members = case
        label = (f"{parameters / 1e9:g}B", f"{name}, {members} GPU{'s' * (members > 1)}")
        times.append((*label, *(f"{_time(_added(r))}, {r['share']:.2%}" for r in rows if r["replicas"] > 1)))
        last = rows[-1]
        fits = "yes" if last["memory"] + last["added_memory"] <= machine.memory else "no"
        sent = _bytes(last["converge"][1])
        gradients = _bytes(last["gradient_bytes"] / work.steps)
        memory.append(
            (*label, sent, gradients, _bytes(last["memory"]), _bytes(last["added_memory"]), fits, last["algorithm"])
        )
    head = (
        f"Model, inputs: inside a node {_said(cluster.inside)}; between nodes {_said(cluster.between)}; "
        f"{machine.operations / 1e12:g} TFLOP/s in training; {work.tokens:,} tokens a GPU and step, as many in a "
        f"pass of the probe; {work.steps} steps a round; {work.numbers} numbers a rank"
        + (
            ", and its processor's time as measured above, on a line through the smallest and largest fleet."
            if measured
            else "."
        )
    )
    head_of_memory = ("parameters", "a replica", "sent by converge", "by gradients, each step")
    parts = [
        head,
        "Seconds that hdet adds to a round with a probe, and its share of the round's computing:",
        markdown([("parameters", "a replica", *heads), *times], padded=False),
        f"Bytes and memory of a GPU, with {REPLICAS[-1]:,} replicas:",
        markdown([(*head_of_memory, "training", "hdet adds", "fits", "all-reduce"), *memory], padded=False),
        f"All-reduce of {PARAMETERS[1] / 1e9:g}B fp32 weights among replicas of one GPU:",
        markdown([("replicas", "ring", "tree", "hierarchical"), *_ways(cluster)], padded=False),
    ]
    return "\n\n".join(parts)


def _added(row: dict[str, Any]) -> float:
    return row["converge"][0] + row["agreement"][0] + row["probe"][0] + float(row["passes"])


def _ways(cluster: Cluster) -> Iterator[tuple[str, ...]]:
    for replicas in REPLICAS[1:]:
        ways = costs.algorithms(cluster, costs.DDP, replicas)
        cells = [_time(ways[name](4 * PARAMETERS[1]).seconds) if name in ways else "" for name in _WAYS]
        yield f"{replicas:,}", *cells


_WAYS = ("ring", "tree", "hierarchical")


def _said(link: Link) -> str:
    return f"{link.alpha * 1e6:g} µs and {link.bandwidth / _GB:g} GB/s ({link.source})"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


if __name__ == "__main__":
    sys.exit(main())
