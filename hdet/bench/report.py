"""The measurements as tables of ratios, as verdicts on the project's targets, and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch

from hdet import ops
from hdet.bench.measure import OURS, Comparison, Spread, spread_of
from hdet.bench.processes import cpus
from hdet.monitor.tables import aligned

SCHEMA = 1
Verdict: TypeAlias = Literal["met", "within noise", "missed", "not measured"]
"""``within noise``: medians miss the target, and their better quartiles meet it."""
_TITLES = {
    "kernels": "Pack and unpack",
    "graph": "A CUDA graph of a training step with converge",
    "step": "scheduler.step(loss) between converges",
    "virtual": "Virtual replicas",
    "converge": "Converge",
    "overhead": "A training run",
}


@dataclass(frozen=True)
class Target:
    """One of the project's targets, and whether it was met here."""

    name: str
    wanted: str
    measured: str
    verdict: Verdict


def machine() -> dict[str, Any]:
    """The facts of the machine that the numbers depend on; none identifies it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": cpus(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "ops": str(ops.backend()),
    }


def as_json(results: Sequence[Comparison], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, all samples included, as plain values."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "settings": settings,
        "results": [asdict(result) for result in results],
        "targets": [asdict(target) for target in targets(results)],
    }


# ------------------------------------------------------------------------------------------------------ tables


def tables(results: Sequence[Comparison]) -> str:
    """One table per section: ours in seconds, and each alternative as how many times as long it took."""
    facts = machine()
    gpus = f", {facts['gpus']} x {facts['gpu']}" if facts["gpu"] else ""
    parts = [f"{facts['cpus']} CPUs ({facts['architecture']}){gpus}, torch {facts['torch']}; {facts['ops']}\n"]
    for section, title in _TITLES.items():
        chosen = [result for result in results if result.section == section]
        if chosen:
            parts.append(f"{title}: time of {OURS}, and how many times as long the alternatives took (quartiles)")
            parts.append(_table(chosen) + "\n")
    if counted := [result for result in results if result.section == "traffic"]:
        parts.append("Traffic: KiB that one rank hands to collectives per training step")
        parts.append(_traffic(counted) + "\n")
    return "\n".join(parts)


def targets_table(results: Sequence[Comparison]) -> str:
    """The targets, one to a line."""
    rows = [("target", "wanted", "measured", "verdict")]
    rows += [(target.name, target.wanted, target.measured, target.verdict) for target in targets(results)]
    return aligned(rows)


def _table(results: Sequence[Comparison]) -> str:
    names = list(dict.fromkeys(name for r in results for name in (*r.samples, *r.skipped) if name != OURS))
    rows = [("", "rounds", OURS, *names)]
    notes = []
    for result in results:
        cells = [_ratio(result.ratio(name)) if name in result.samples else "-" for name in names]
        ours = result.samples.get(OURS)
        rows.append((result.case, str(len(ours or ())), _seconds(spread_of(ours)) if ours else "-", *cells))
        notes += [f"{name}: {reason}" for name, reason in result.skipped.items()]
    counts = {note: notes.count(note) for note in notes}
    return "\n".join([aligned(rows), *(f"  skipped {n} times: {note}" for note, n in counts.items())])


def _traffic(results: Sequence[Comparison]) -> str:
    rows: list[Sequence[str]] = [
        ("", "replicas", "model", "between replicas", "inside a replica", "converge, as reported")
    ]
    for result in results:
        facts = result.facts
        sizes = (4 * facts["parameters"], facts["across"], facts["inside"], facts["reported"])
        rows.append((result.case, str(facts["replicas"]), *(f"{size / 1024:.1f}" for size in sizes)))
    return aligned(rows)


def _seconds(spread: Spread) -> str:
    unit, factor = next(
        ((unit, factor) for unit, factor in (("s", 1.0), ("ms", 1e3)) if spread.median * factor >= 1), ("us", 1e6)
    )
    median, low, high = (f"{value * factor:.3g}" for value in spread)
    return f"{median} {unit} ({low}-{high})"


def _ratio(spread: Spread) -> str:
    return f"{_short(spread.median)} ({_short(spread.low)}-{_short(spread.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 5 else f"{value:.2f}"


# ----------------------------------------------------------------------------------------------------- targets


def targets(results: Iterable[Comparison]) -> list[Target]:
    """The project's targets, judged by what of it was measured."""
    done = [result for result in results if result.samples]
    converge = [r for r in done if r.section == "converge"]
    kernels = [r for r in done if r.section == "kernels"]
    big = [r for r in kernels if r.facts["device"] == "cpu" and r.facts["parameters"] >= 25_000_000]
    on_gpu = [r for r in kernels if r.facts["clock"] == "device"]
    return [
        _judge(
            "converge: against every alternative",
            [
                (f"{r.case}, {name}", r.ratio(name))
                for r in converge
                for name in r.alternatives
                if not name.startswith(OURS)
            ],
            at_least=1.0,
        ),
        _judge(
            "converge of 1M elements in 200 tensors: against the per-tensor loop",
            [(r.case, r.ratio("per_tensor")) for r in converge if r.facts["shape"] == "1m"],
            at_least=50.0,
        ),
        *(
            _judge(
                f"CPU {op} of 25M elements and more: speed against a memory copy",
                [(r.case, r.ratio("memcpy")) for r in big if r.facts["op"] == op],
                at_least=0.8,
            )
            for op in ("pack", "unpack")
        ),
        _judge(
            "GPU pack and unpack of GPT-2: share of the card's copy bandwidth",
            [(r.case, _share_of_bandwidth(r)) for r in on_gpu if r.facts["shape"] == "gpt2"],
            at_least=0.9,
        ),
        _judge(
            "GPU pack and unpack of 5,000 tiny tensors: against foreach",
            [(r.case, r.ratio("foreach")) for r in on_gpu if r.facts["shape"] == "tiny"],
            at_least=3.0,
        ),
        _judge(
            "step(loss): time over torch's OneCycleLR.step",
            [(r.case, _inverse(r.ratio("torch"))) for r in done if r.section == "step"],
            at_most=1.5,
        ),
        _judge(
            "a training run, T=50: time added to plain DDP",
            list(_overheads(done, converge_every=50, probe=False).values()),
            at_most=0.02,
            show=lambda value: f"{value:.2%}",
        ),
        _judge(
            "a training run of 100 rounds with a probe, T=100: time added to plain DDP",
            _whole_runs(done, converge_every=100, without=1.0),
            at_most=0.02,
            show=lambda value: f"{value:.2%}",
        ),
        _judge(
            "the probe in a training run of 100 rounds, T=100: time added to hdet without one",
            _whole_runs(done, converge_every=100, without=0.0),
            at_most=0.02,
            show=lambda value: f"{value:.2%}",
        ),
    ]


def _judge(
    name: str,
    cases: Sequence[tuple[str, Spread]],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    show: Callable[[float], str] = lambda value: f"{_short(value)}x",
) -> Target:
    """A target that every case must reach, with the worst case."""
    if at_least is not None:
        limit, sign, wanted = at_least, 1, f"at least {show(at_least)}"
    else:
        assert at_most is not None
        limit, sign, wanted = at_most, -1, f"at most {show(at_most)}"
    if not cases:
        return Target(name, wanted, "", "not measured")
    case, worst = min(cases, key=lambda pair: sign * pair[1].median)
    missed = [spread for _, spread in cases if sign * spread.median < sign * limit]
    verdict: Verdict = "met"
    if missed:
        better = [spread.high if sign > 0 else spread.low for spread in missed]
        verdict = "within noise" if all(sign * value >= sign * limit for value in better) else "missed"
    count = f"; {len(missed)} of {len(cases)} cases miss it" if len(missed) > 1 else ""
    return Target(name, wanted, f"{show(worst.median)} ({case}{count})", verdict)


def _inverse(spread: Spread) -> Spread:
    return Spread(1 / spread.median, 1 / spread.high, 1 / spread.low)


def _share_of_bandwidth(result: Comparison) -> Spread:
    full = result.facts["copy_bandwidth"]
    return spread_of([result.facts["bytes"] / seconds / full for seconds in result.samples[OURS]])


def _whole_runs(results: Sequence[Comparison], *, converge_every: int, without: float) -> list[tuple[str, Spread]]:
    """:func:`_overheads` over all rounds of a run, of which the last ones are not probed: the time that a probe
    adds, and ``without`` times what is added without one."""
    probed, others = (_overheads(results, converge_every=converge_every, probe=probe) for probe in (True, False))
    shares = {r.facts["processes"]: r.facts["probed_share"] for r in results if r.facts.get("probe")}
    return [
        (case, Spread(*(shares[size] * x + (without - shares[size]) * others[size][1].median for x in spread)))
        for size, (case, spread) in probed.items()
        if size in others
    ]


def _overheads(results: Sequence[Comparison], *, converge_every: int, probe: bool) -> dict[int, tuple[str, Spread]]:
    """hdet's time inside ``scheduler.step`` less torch's, over the time of a plain round: by number of processes."""
    kind = (converge_every, probe)
    chosen = [r for r in results if r.section == "overhead"]
    chosen = [r for r in chosen if (r.facts["converge_every"], r.facts["probe"]) == kind]
    by_part = {(r.facts["processes"], r.facts["part"]): r for r in chosen}
    found = {}
    for (processes, part), inside in by_part.items():
        if part == "scheduler":
            rounds = by_part[processes, "round"].samples["plain_ddp"]
            added = zip(inside.samples[OURS], inside.samples["plain_ddp"], rounds, strict=True)
            found[processes] = inside.case, spread_of([(ours - theirs) / whole for ours, theirs, whole in added])
    return found
