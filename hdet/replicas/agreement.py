"""Before replicas act together they make sure that they can: same step, same settings, same model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hdet.errors import ReplicaMismatchError
from hdet.replicas.topology import Replicas


class Term(NamedTuple):
    """One number that a rank tells the others."""

    value: float
    merge: Callable[[list[float]], float]
    """What a replica of several members tells, given theirs."""


def gather_agreed(
    replicas: Replicas,
    steps: int,
    layout: int,
    facts: Mapping[str, object],
    terms: Mapping[str, Term],
    gather: Callable[[Sequence[float]], list[list[float]]] | None = None,
) -> list[dict[str, float]]:
    """Gather ``terms`` from every rank in one small message that also proves that they agree. Collective.

    Args:
        replicas: the group.
        steps: scheduler steps taken.
        layout: hash of the model, below ``2**53``: of what this member holds of it.
        facts: settings and state by name, all of which must be the same on every rank.
        terms: what to gather, by name; the same names in the same order on every rank.
        gather: how; default ``replicas.all_gather``.

    Returns:
        Every replica's terms, by replica.

    Raises:
        ReplicaMismatchError: on every rank alike, naming what differs, the values and the replicas or ranks.
    """
    rows = (gather or replicas.all_gather)([steps, digest(facts), layout, *(term.value for term in terms.values())])
    members = replicas.members
    if any(row[:2] != rows[0][:2] or row[2] != rows[i % members][2] for i, row in enumerate(rows)):
        raise ReplicaMismatchError(_explain(replicas, rows, replicas.all_gather_object(dict(facts))))
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


def _explain(replicas: Replicas, rows: list[list[float]], gathered: list[dict[str, object]]) -> str:
    def by_value(values: Iterable[object], show: Callable[..., str] = str) -> str:
        names: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            names.setdefault(show(value), []).append(index)
        return "; ".join(f"{value} on {_names(replicas, indices)}" for value, indices in names.items())

    lines = []
    if any(row[0] != rows[0][0] for row in rows):
        lines.append(f"steps taken: {by_value((row[0] for row in rows), lambda steps: f'{steps:.0f}')}")
    lines += [
        f"{name}: {by_value(facts.get(name) for facts in gathered)}"
        for name in gathered[0]
        if len({repr(facts.get(name)) for facts in gathered}) > 1
    ]
    if any(row[2] != rows[i % replicas.members][2] for i, row in enumerate(rows)):
        hashes = by_value((row[2] for row in rows), lambda layout: hex(int(layout)))
        lines.append(f"the model's parameters (shapes, dtypes or strides): {hashes}")
    return (
        "The replicas do not agree, so they cannot be averaged:\n  "
        + "\n  ".join(lines)
        + "\nEvery rank must build the scheduler with the same arguments and call step() equally often."
    )


def _names(replicas: Replicas, indices: Sequence[int]) -> str:
    """``replica 0, 1``, or ``rank 0, 1`` where a replica is several ranks."""
    first, *others = (replicas.name_of(index) for index in indices)
    return ", ".join([first, *(other.split()[-1] for other in others)])
