"""What ranks tell one another beside their collectives: where one waits, that its call failed, that it has ended.

A rank that waits for a message of the others cannot tell one that is slow from one that will never send it. So a rank
that has waited for :data:`PATIENCE` seconds leaves a note in the process group's store, and reads the notes of the
others from then on: one that waits in another call, or has left, will not come. Nothing is written or read before.

In a large group :data:`READERS` ranks read the notes of all, the others those of the readers, and all less often: the
store answers one question at a time.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PATIENCE = 5.0
"""Seconds that a rank waits for a message before it leaves a note, and reads those of the others."""
EVERY = 0.5
"""Seconds between two readings, of up to :data:`SMALL` ranks."""
SMALL = 128
"""Ranks: in a group of twice as many the time between two readings is twice as long."""
READERS = 64
"""Ranks that read the notes of all others, at most."""
WARNS_AFTER = 15.0
"""Seconds after which a rank that still waits says so."""
_ASKS_FOR = 3.0
"""Seconds that a rank whose call failed waits for the others' notes."""


_LEFT: set[int] = set()
"""This process's rank, while it has a note in the store."""


class Note(NamedTuple):
    """What a rank has told."""

    state: str
    """``waits``, ``failed`` or ``ended``."""
    doing: str
    """In or after which call."""
    group: str
    """The ranks that take part in it."""


class Notes:
    """The notes of the ranks of one group.

    Args:
        store: of the process group; ``None`` for no notes.
        ranks: of the group.
        me: this rank.
        name_of: the name of a rank in a message.
    """

    def __init__(self, store: Any, ranks: Sequence[int], me: int, name_of: Callable[[int], str]) -> None:
        self._store, self._me, self._name_of = store, me, name_of
        readers = ranks[:: -(-len(ranks) // READERS)]
        self._others = [rank for rank in (ranks if me in readers else readers) if rank != me]
        self._count = len(ranks)
        self.every = EVERY * max(1.0, len(ranks) / SMALL)
        """Seconds between two readings."""
        self._group = ",".join(map(str, sorted(ranks))) if len(ranks) <= 64 else f"{len(ranks)} from {min(ranks)}"

    def leave(self, state: str, doing: str) -> None:
        """Tell the others."""
        try:
            if self._store is not None:
                self._store.set(_key(self._me), json.dumps(Note(state, doing, self._group)))
                _LEFT.add(self._me)
        except RuntimeError:  # the store is gone
            self._store = None

    def clear(self) -> None:
        """Take this rank's note back."""
        if self._me in _LEFT:
            _LEFT.discard(self._me)
            try:
                self._store.set(_key(self._me), "")
            except RuntimeError:
                self._store = None

    def others(self) -> dict[int, Note]:
        """By rank, those that have left a note, among the ranks that this one reads."""
        found: dict[int, Note] = {}
        try:
            for rank in self._others if self._store is not None else ():
                if self._store.check([_key(rank)]) and (text := self._store.get(_key(rank))):
                    found[rank] = Note(*json.loads(text))
        except (RuntimeError, ValueError):
            self._store = None
        return found

    def obstacles(self, doing: str) -> str:
        """Which ranks will not take part in the call, and why; empty if none is known."""
        return "; ".join(
            f"{self._name_of(rank)} {_told(note)}"
            for rank, note in self.others().items()
            if note.state == "ended" or (note.group == self._group and (note.state == "failed" or note.doing != doing))
        )

    def ask(self, doing: str) -> str:
        """The same after this rank's call has failed: waits some seconds for what the others tell."""
        until = time.monotonic() + (_ASKS_FOR if self._store is not None else 0)
        while not (found := self.obstacles(doing)) and time.monotonic() < until:
            time.sleep(self.every / 5)
        return found

    def meet(self, name: str, doing: str) -> str:
        """Wait until all ranks of the group have come here, for a few seconds at most; returns the obstacles."""
        store, count = self._store, self._count
        if store is None or count == 1:
            return ""
        self.clear()
        started, before = time.monotonic(), ""
        try:
            if store.add(f"hdet/{name}/{self._group}", 1) % count == 0:
                store.set(f"hdet/{name}/{self._group}/all", "1")
            while not store.check([f"hdet/{name}/{self._group}/all"]):
                waited = time.monotonic() - started
                if waited > 2 * PATIENCE:
                    break
                time.sleep(min(self.every / 5, 1e-3 + waited / 10))
                if waited > PATIENCE / 2:
                    if self._me not in _LEFT:
                        self.leave("waits", doing)
                    if (found := self.obstacles(doing)) and found == before:
                        return found
                    before = found
                    time.sleep(self.every)
        except RuntimeError:
            self._store = None
        return ""


def _key(rank: int) -> str:
    return f"hdet/note/{rank}"


def _told(note: Note) -> str:
    if note.state == "ended":
        return f"has ended, {note.doing}"
    return f"is in {note.doing}" if note.state == "waits" else f"has failed in {note.doing}"


_EXITS: list[Callable[[], None]] = []


def at_exit(tell: Callable[[], None]) -> None:
    """Call ``tell`` when the interpreter ends."""
    if not _EXITS:
        atexit.register(_end)
    _EXITS.append(tell)


def _end() -> None:
    for tell in _EXITS:
        tell()


def last_error() -> str:
    """The exception that ends the interpreter, in words; empty for none."""
    error = getattr(sys, "last_value", None)
    return "" if error is None else f" by {type(error).__name__}: {str(error)[:200]}"
