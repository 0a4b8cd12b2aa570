"""Plain-text tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

WIDTH = 100  # columns, of what is not one line per parameter


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of columns two spaces apart, flush right but for those numbered in `left`."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    ]


def wrapped(text: str, indent: int = 0, hanging: int = 0) -> str:
    """A paragraph of at most `WIDTH` columns; lines begin at `indent`, those after the first at `hanging` more."""
    return fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + hanging))


def change(new: int, old: int) -> str:
    """How much less or more `new` is, in percent of `old`."""
    percent = round(100 * (new - old) / max(old, 1))
    return f"{percent:+d} %" if percent else "same"
