"""Tables as text. Rows are sequences of cells, all of one length; the first is the header."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart."""
    return "\n".join("  ".join(row).rstrip() for row in _padded(rows))


def markdown(rows: Sequence[Sequence[str]], *, padded: bool = True) -> str:
    """A Markdown table, whose source has columns of equal width if ``padded``."""
    if padded:
        rows = _padded(rows, at_least=3)
    rule = " | ".join("-" * len(cell) for cell in rows[0]) if padded else "|".join(["---"] * len(rows[0]))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {rule} |" if padded else f"|{rule}|", *lines[1:]])


def _padded(rows: Sequence[Sequence[str]], at_least: int = 0) -> list[list[str]]:
    widths = [max(at_least, *map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
