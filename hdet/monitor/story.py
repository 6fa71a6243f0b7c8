"""What a run did and why, in words. Pure functions of reports: no torch, no files.

The same words stand in the HTML report, in TensorBoard's Text tab, at the end of the training program, in its progress
bar and in the ``repr`` of a scheduler.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from hdet.monitor.report import Report
from hdet.steer.report import UNKNOWN_JUDGEMENT, Judgement

_TURN = 0.15
"""A move of the log gain by less than this is none."""
_NEAR = 0.05
"""A log gain this near to where a move ends has arrived."""
_MOST = 4
"""Moves that are told, at most: with more of them, smaller ones are left out."""
_RIGHT = 1.1
"""A movement within this factor of its target is as it should be."""
_CLEAR = 1.25
"""A gain that the probe argues for says something if it is further than this factor from that in force."""
_LISTED = 5
"""Steps that are listed, at most."""


class Move(NamedTuple):
    """A stretch of rounds over which the gain went one way, stayed, or one that was undone."""

    kind: Literal["raised", "lowered", "kept", "undone", "rested"]
    first: int
    """Step of its first round's end."""
    last: int
    """Step by which it had come as far as it came."""
    gain: float
    """Where it ended."""
    why: str
    """In words, without a full stop; empty where the reports do not tell."""


def slim(report: Report) -> Report:
    """The report without what the story does not need: values by replica."""
    return replace(report, replica_lr=(), losses=(), distance=())


def groups_of(reports: Sequence[Report]) -> list[int]:
    """Indices of the parameter groups to be told of: one for all that have had the same gain all along."""
    if not reports:
        return []
    histories: dict[tuple[float, ...], int] = {}
    for g in range(len(reports[0].groups)):
        histories.setdefault(tuple(report.next_gain[g] for report in reports if g < len(report.next_gain)), g)
    return sorted(histories.values())


def moves(reports: Sequence[Report], group: int = 0) -> list[Move]:
    """How the gain of one parameter group moved, in order.

    Args:
        reports: in the order of their steps.
        group: index of the parameter group.
    """
    found: list[Move] = []
    stretch: list[Report] = []

    def end() -> None:
        found.extend(_stretch(stretch, group))
        stretch.clear()

    resting: list[Report] = []
    for report in reports:
        if report.rolled_back:
            end()
            found.append(Move("undone", report.step, report.step, report.next_gain[group], report.cause))
        elif report.complete and _judgement(report, group).rests:
            end()
            resting.append(report)
        elif report.complete:
            stretch.append(report)
    end()
    if resting:
        found.append(Move("rested", resting[0].step, resting[-1].step, resting[-1].next_gain[group], ""))
    return sorted(found, key=lambda move: move.first)


def sentences(reports: Sequence[Report], *, peak_lr: float = math.nan) -> list[str]:
    """The story of a run, a few sentences in the order of its steps.

    Args:
        reports: of the run so far.
        peak_lr: highest learning rate of the base schedule, where the reports do not have it.
    """
    if not reports:
        return ["No round is over yet."]
    peak = reports[-1].peak_lr if math.isfinite(reports[-1].peak_lr) else peak_lr
    told = [_start(reports[0], peak)]
    indices = groups_of(reports)
    for g in indices:
        name = f"{reports[0].groups[g]}: " if len(indices) > 1 else ""
        told += [f"{name}{_sentence(move, peak if g == 0 else math.nan)}" for move in moves(reports, g)]
    told += _others(reports)
    told += _excluded(reports)
    told += _losses(reports)
    return told


def in_one_sentence(reports: Sequence[Report], *, peak_lr: float = math.nan) -> str:
    """The same in one sentence, of the first parameter group."""
    if not reports:
        return "No round is over yet."
    first, last = reports[0], reports[-1]
    peak = last.peak_lr if math.isfinite(last.peak_lr) else peak_lr
    told = moves(reports)
    parts = [f"{_subject(peak)} {_rate(peak, first.gain[0])} at the start"]
    main = [move for move in told if move.kind in ("raised", "lowered")]
    if main:
        final = main[-1]
        net = "raised" if final.gain > first.gain[0] else "lowered"
        why = next((f" ({move.why})" for move in main if move.kind == net and move.why), "")
        how = f"{net} in {len(main)} moves" if len(main) > 1 else net
        parts.append(f"{how} to {_rate(peak, final.gain)} by step {final.last}{why}")
    parts += [
        f"at rest from step {move.first} on, at {_rate(peak, move.gain)}" for move in told if move.kind == "rested"
    ]
    undone = [move for move in told if move.kind == "undone"]
    if undone:
        parts.append(f"{_count(len(undone), 'rollback')}, the last at step {undone[-1].last}")
    excluded = sum(bool(report.excluded) for report in reports)
    if excluded:
        parts.append(f"replicas left out of {_count(excluded, 'average')}")
    return "; ".join(parts) + "."


def now(report: Report | None) -> str:
    """The state after one converge, in a few words for a progress bar."""
    if report is None:
        return "no round is over yet"
    gain = f"gain {report.next_gain[0]:.3g}"
    if report.rolled_back:
        return f"{gain}: round undone, {report.cause}" if report.cause else f"{gain}: round undone"
    judged = _judgement(report, 0)
    if judged.rests:
        return f"{gain}, at rest"
    ratio = _ratio(report, 0)
    if not math.isfinite(ratio):
        return gain
    change = math.log(report.next_gain[0] / report.gain[0]) if report.gain[0] > 0 else 0.0
    way = "rising" if change > 0.01 else "falling" if change < -0.01 else "steady"
    return f"{gain}, {way}: weights move {_times(ratio)} the target"


def summary(
    kind: str, report: Report | None, *, replicas: int, spread: float, step: int, total_steps: int | None
) -> str:
    """A scheduler in one line, for its ``repr``.

    Args:
        kind: name of its class.
        report: of the latest converge.
        replicas, spread, step, total_steps: its own.
    """
    end = "" if total_steps is None else f" of {total_steps}"
    fan = f", spread {spread:.3g}" if spread else ""
    return f"<{kind}: {_count(replicas, 'replica')}{fan}, step {step}{end}: {now(report)}>"


# ------------------------------------------------------------------------------------------------------ sentences


def _start(first: Report, peak: float) -> str:
    lr, base = first.replica_lr[0] if first.replica_lr else (), first.base_lr[0]
    spread = max(lr) / base - 1 if lr and base > 0 else 0.0
    replicas = _count(first.replicas, "replica")
    fan = f", under {1 - spread:.3g} to {1 + spread:.3g} times the common learning rate" if spread > 1e-9 else ""
    return f"The {_subject(peak).lower()} was {_rate(peak, first.gain[0])} at the start, with {replicas}{fan}."


def _sentence(move: Move, peak: float) -> str:
    rate, why = _rate(peak, move.gain), f": {move.why}" if move.why else ""
    if move.kind == "undone":
        return f"The round that ended at step {move.last} was undone, and it became {rate}{why}."
    if move.kind == "rested":
        return (
            f"From step {move.first} on it rested at {rate}: the schedule had begun to fall for good, and its own "
            "annealing is not fought."
        )
    if move.kind == "kept":
        return f"From step {move.first} to {move.last} it stayed near {rate}{why}."
    return f"By step {move.last} it was {move.kind} to {rate}{why}."


def _others(reports: Sequence[Report]) -> list[str]:
    """Of the other hyperparameters."""
    last = {h.name: h for h in reports[-1].hyperparameters}
    told = []
    for h in reports[0].hyperparameters:
        if h.name in last:
            to = last[h.name].next_centre
            moved = abs(to - h.centre) > 1e-3 * abs(h.centre)
            told.append(
                f"{h.name} moved from {h.centre:.3g} to {to:.3g}." if moved else f"{h.name} stayed at {h.centre:.3g}."
            )
    return told


def _excluded(reports: Sequence[Report]) -> list[str]:
    steps: dict[int, list[int]] = {}
    for report in reports:
        for replica in report.excluded:
            steps.setdefault(replica, []).append(report.step)
    return [
        f"Replica {replica} was not finite and left out of the average, then healed from the others, at {_listed(at)}."
        for replica, at in sorted(steps.items())
    ]


def _losses(reports: Sequence[Report]) -> list[str]:
    known = [report for report in reports if report.complete and math.isfinite(report.mean_loss)]
    if len(known) < 2:
        return []
    first, last = known[0], known[-1]
    return [
        f"The mean training loss of a round went from {first.mean_loss:.4g} (to step {first.step}) to "
        f"{last.mean_loss:.4g} (to step {last.step})."
    ]


# ----------------------------------------------------------------------------------------------------- the moves


def _stretch(reports: Sequence[Report], group: int) -> list[Move]:
    """The moves of whole rounds, none of which was undone."""
    if not reports:
        return []
    gains = [max(g, 1e-300) for g in (reports[0].gain[group], *(report.next_gain[group] for report in reports))]
    logs = [math.log(gain) for gain in gains]
    least = _TURN
    pivots = _pivots(logs, least)
    while len(pivots) - 1 > _MOST:
        least *= 1.5
        pivots = _pivots(logs, least)
    found = []
    for begin, end in itertools.pairwise(pivots):
        change, part = logs[end] - logs[begin], reports[begin:end]
        kind: Literal["raised", "lowered", "kept"] = (
            "kept" if abs(change) < least else "raised" if change > 0 else "lowered"
        )
        reached = end
        if kind != "kept":
            reached = next(i for i in range(begin, end + 1) if abs(logs[i] - logs[end]) <= _NEAR)
            part = reports[begin : max(reached, begin + 1)]
        found.append(Move(kind, part[0].step, reports[max(reached, 1) - 1].step, gains[end], _why(kind, part, group)))
    return found


def _pivots(values: Sequence[float], least: float) -> list[int]:
    """Indices of the turning points of a curve, first and last included: between two of them it goes one way, but for
    moves smaller than ``least``."""
    turns, top, bottom, way = [0], 0, 0, 0
    for i, value in enumerate(values):
        top = i if value > values[top] else top
        bottom = i if value < values[bottom] else bottom
        if way >= 0 and values[top] - value >= least:
            if way > 0 or values[top] - values[turns[0]] >= least:
                turns.append(top)
            way, bottom = -1, i
            top = i
        elif way <= 0 and value - values[bottom] >= least:
            if way < 0 or values[turns[0]] - values[bottom] >= least:
                turns.append(bottom)
            way, top = 1, i
            bottom = i
    end = len(values) - 1
    return turns if turns[-1] == end else [*turns, end]


def _why(kind: str, reports: Sequence[Report], group: int) -> str:
    """What moved the gain over these rounds, or held it."""
    judged = [_judgement(report, group) for report in reports]
    ratios = [ratio for report in reports if math.isfinite(ratio := _ratio(report, group))]
    if not ratios:
        return _by_losses(kind, reports, group)
    parts = []
    middle = statistics.median(ratios)
    if kind == "raised" and min(ratios) < 1 / _RIGHT:
        parts.append(f"the weights moved too little, {_from_to(ratios, lambda ratio: ratio < 1)} the target")
    elif kind == "lowered" and max(ratios) > _RIGHT:
        parts.append(f"the weights moved too much, {_from_to(ratios, lambda ratio: ratio > 1)} the target")
    elif kind == "kept" and 1 / _RIGHT <= middle <= _RIGHT:
        parts.append(f"the weights moved as they should, {_times(middle)} the target")
    argued = judged[-1].evidence / reports[-1].gain[group]
    if argued > _CLEAR and kind != "lowered":
        parts.append(f"the probe saw lasting progress and argued for a gain of {judged[-1].evidence:.3g}")
    elif argued < 1 / _CLEAR and kind != "raised":
        parts.append(f"the probe saw noise rather than progress and argued for a gain of {judged[-1].evidence:.3g}")
    first, last = judged[0].trust, judged[-1].trust
    if math.isfinite(last) and max(first, last) > 0.01:
        if kind == "kept" and last > 0.5:
            parts.append(
                f"the estimate, {_times(judged[-1].estimate)} the given rate, could not be told apart from it (right "
                f"with a probability of {last:.0%})"
            )
        elif round(first, 2) == round(last, 2):
            parts.append(f"the given rate was right with a probability of {last:.0%}")
        else:
            way = "fell" if last < first else "rose"
            parts.append(f"the probability that the given rate is right {way} from {first:.0%} to {last:.0%}")
    return _joined(parts)


def _by_losses(kind: str, reports: Sequence[Report], group: int) -> str:
    """The same of a controller that goes by the training losses alone."""
    slopes = [h for report in reports if math.isfinite(h := report.hypergradient[group])]
    if not slopes or kind == "kept":
        return ""
    if kind == "raised" and statistics.fmean(slopes) > 0:
        return "replicas with higher learning rates had the lower training losses"
    if kind == "lowered" and statistics.fmean(slopes) < 0:
        return "replicas with lower learning rates had the lower training losses"
    return ""


def _judgement(report: Report, group: int) -> Judgement:
    return report.judgements[group] if group < len(report.judgements) else UNKNOWN_JUDGEMENT


def _ratio(report: Report, group: int) -> float:
    """The movement in units of its target; NaN where one of them is not known."""
    target = _judgement(report, group).target
    movement = report.movement[group] if group < len(report.movement) else math.nan
    return movement / target if target > 0 and movement > 0 else math.nan


# --------------------------------------------------------------------------------------------------------- words


def _subject(peak: float) -> str:
    return "Peak learning rate" if _is_known(peak) else "Gain"


def _rate(peak: float, gain: float) -> str:
    return f"{peak * gain:.3g} (gain {gain:.3g})" if _is_known(peak) else f"{gain:.3g}"


def _is_known(peak: float) -> bool:
    return math.isfinite(peak) and peak > 0


def _from_to(ratios: Sequence[float], counts: Callable[[float], bool]) -> str:
    """The first ratio that counts, and the last one."""
    first, last = _ratio_in_words(next(filter(counts, ratios))), _ratio_in_words(ratios[-1])
    return f"{last} times" if first == last else f"at first {first} and at the end {last} times"


def _times(ratio: float) -> str:
    return f"{_ratio_in_words(ratio)} times"


def _ratio_in_words(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.095 else f"{ratio:.1g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:_LISTED]))
    more = f" and {len(steps) - _LISTED} more" if len(steps) > _LISTED else ""
    return f"step{'s' * (len(steps) > 1)} {shown}{more}"


def _joined(parts: Sequence[str]) -> str:
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
