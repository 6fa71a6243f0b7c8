"""Before replicas act together they make sure that they can: same step, same settings, same model."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hdet.errors import ReplicaMismatchError
from hdet.replicas.topology import Replicas

_MARK = 0xA50
"""Of hdet's messages: a :class:`Call` is added to it. It stands above :data:`_STEP_BITS` bits for the step."""
_STEP_BITS = 41


class Term(NamedTuple):
    """One number that a rank tells the others."""

    value: float
    merge: Callable[[list[float]], float]
    """What a replica of several members tells, given theirs."""


class Call(enum.IntEnum):
    """The calls in which replicas exchange a message."""

    FIRST_STEP = 1
    FIRST_CONVERGE = 2
    ROUND = 3
    CONVERGE = 4

    def at(self, steps: int) -> str:
        """The call in words, made after ``steps`` steps."""
        if self is Call.FIRST_STEP:
            return "the first step()" if not steps else f"the comparison before step {steps + 1}"
        if self is Call.FIRST_CONVERGE:
            return f"converge() before the first step(), at step {steps}"
        return f"the end of the round at step {steps}" if self is Call.ROUND else f"converge() at step {steps}"


def gather_agreed(
    replicas: Replicas,
    call: Call,
    steps: int,
    layout: int,
    facts: Mapping[str, object],
    terms: Mapping[str, Term],
    gather: Callable[[Sequence[float]], list[list[float]]] | None = None,
    describe: Callable[[], Sequence[Mapping[str, object]]] = tuple,
) -> list[dict[str, float]]:
    """Gather ``terms`` from every rank in one small message that also proves that they agree. Collective.

    Args:
        replicas: the group.
        call: what this rank is doing.
        steps: scheduler steps taken.
        layout: hash of the model, below ``2**53``: of what this member holds of it.
        facts: settings and state by name, all of which must be the same on every rank.
        terms: what to gather, by name; the same names in the same order on every rank.
        gather: how; default ``replicas.all_gather``.
        describe: asked where layouts differ: what this rank holds of the model, tensor by tensor, as :func:`differing`
            compares it.

    Returns:
        Every replica's terms, by replica.

    Raises:
        ReplicaMismatchError: on every rank alike, naming what differs, the values and the replicas or ranks.
    """
    replicas.doing = call.at(steps)
    own = [((_MARK + call) << _STEP_BITS) + steps, digest(facts), layout]
    rows = (gather or replicas.all_gather)([*own, *(term.value for term in terms.values())])
    members = replicas.members
    if any(row[:2] != rows[0][:2] or row[2] != rows[i % members][2] for i, row in enumerate(rows)):
        raise ReplicaMismatchError(_explain(replicas, rows, facts, describe))
    if members == 1:
        return [dict(zip(terms, row[3:], strict=True)) for row in rows]
    return [
        {name: term.merge([row[3 + i] for row in replica]) for i, (name, term) in enumerate(terms.items())}
        for replica in replicas.by_replica(rows)
    ]


def same(values: list[float]) -> float:
    """A hash of the members' values: for a :class:`Term` that replicas compare."""
    return float(digest(values))


def digest(facts: object) -> int:
    """A 48-bit hash of ``repr(facts)``: exact in float64, and the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=6).digest(), "big")


def differing(
    replicas: Replicas, own: Sequence[Mapping[str, object]], *, ignored: Sequence[str] = (), all_ranks: bool = False
) -> str:
    """The first difference between what ranks hold, in words; empty where there is none. Collective.

    Args:
        replicas: the group.
        own: what this rank holds in order: each with a ``name``, and other facts. A fact that is ``None`` on a rank is
            not compared.
        ignored: facts that are not compared.
        all_ranks: whether members of a replica hold the same, too.
    """
    kept = [{key: value for key, value in one.items() if key not in ignored} for one in own]
    held = replicas.all_gather_object(kept)
    for i, theirs in enumerate(held):
        first = held[0 if all_ranks else i % replicas.members]
        for number in range(max(len(theirs), len(first))):
            if number >= len(theirs) or number >= len(first) or _differ(theirs[number], first[number]):
                return _first_difference(replicas, held, number)
    return ""


def _differ(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return any(
        one.get(key) != other.get(key) and None not in (one.get(key), other.get(key)) for key in {**one, **other}
    )


def _first_difference(replicas: Replicas, held: Sequence[Sequence[Mapping[str, object]]], number: int) -> str:
    """Of tensor ``number``, in words."""
    names = [of[number]["name"] if number < len(of) else "nothing more" for of in held]
    if len(set(names)) > 1:
        order = "another order, or other tensors" if all(len(of) == len(held[0]) for of in held) else "other tensors"
        return f"the tensors averaged ({order}), number {number}: {_by_value(replicas, names)}"
    lines = []
    for key in held[0][number]:
        values = [of[number].get(key) for of in held]
        if len({repr(value) for value in values if value is not None}) > 1:
            what = "other values" if key == "values" else _by_value(replicas, values)
            pairs = [i for i, value in enumerate(values) if value is not None and value != values[0]]
            where = f" on {_names(replicas, pairs)} than on {_names(replicas, [0])}" if key == "values" else ""
            lines.append(f"{names[0]}: {'' if key == 'values' else f'{key} '}{what}{where}")
    return "; ".join(lines)


def _explain(
    replicas: Replicas,
    rows: list[list[float]],
    facts: Mapping[str, object],
    describe: Callable[[], Sequence[Mapping[str, object]]],
) -> str:
    calls = [call for row in rows if (call := _call_of(row[0])) is not None]
    if strangers := [i for i, row in enumerate(rows) if _call_of(row[0]) is None]:
        return (
            f"What came from {_names(replicas, strangers)} in {replicas.doing} is no message of hdet's: another "
            "collective, such as a backward pass under DistributedDataParallel, was in its place. Every rank must call "
            "step() equally often, and converge() at the same steps."
        )
    lines = []
    if any(call != calls[0] for call in calls):
        if any(call[1] != calls[0][1] for call in calls):
            lines.append(f"steps taken: {_by_value(replicas, (steps for _, steps in calls))}")
        lines.append(f"the call: {_by_value(replicas, (call.at(steps) for call, steps in calls))}")
    if any(row[1] != rows[0][1] for row in rows):
        gathered = replicas.all_gather_object(dict(facts))
        names = list(dict.fromkeys(name for of in gathered for name in of))
        lines += [
            f"{name}: {_by_value(replicas, (of.get(name) for of in gathered))}"
            for name in names
            if len({repr(of.get(name)) for of in gathered}) > 1
        ]
    if any(row[2] != rows[i % replicas.members][2] for i, row in enumerate(rows)):
        found = differing(replicas, describe(), ignored=["values"])
        lines.append(found or "the model's parameters (shapes, dtypes or strides)")
    return (
        "The replicas do not agree, so they cannot be averaged:\n  "
        + "\n  ".join(lines)
        + "\nEvery rank must build the scheduler with the same arguments and call step() equally often."
    )


def _call_of(number: float) -> tuple[Call, int] | None:
    """The call and the step in a message; ``None`` if it is none of hdet's."""
    if not number.is_integer():  # neither are NaN and the infinities
        return None
    mark, steps = divmod(int(number), 1 << _STEP_BITS)
    return (Call(mark - _MARK), steps) if mark - _MARK in list(map(int, Call)) else None


def _by_value(replicas: Replicas, values: Iterable[object]) -> str:
    names: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        names.setdefault(str(value), []).append(index)
    return "; ".join(f"{value} on {_names(replicas, indices)}" for value, indices in names.items())


def _names(replicas: Replicas, indices: Sequence[int]) -> str:
    """``replica 0, 1``, or ``rank 0, 1`` where a replica is several ranks."""
    first, *others = (replicas.name_of(index) for index in indices)
    return ", ".join([first, *(other.split()[-1] for other in others)])
