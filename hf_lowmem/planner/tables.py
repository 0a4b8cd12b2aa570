"""Plain-text tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

WIDTH = 100  # the most columns of anything but a line per parameter


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Return the lines of a table, whose columns are aligned to the right except those numbered in `left`."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    ]


def wrapped(text: str, indent: int = 0, hanging: int = 0) -> str:
    """Return a paragraph of at most `WIDTH` columns, indented by `indent`, and by `hanging` more from line 2 on."""
    return fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + hanging))


def change(new: int, old: int) -> str:
    """Return the difference of `new` from `old` in percent of `old`."""
    percent = round(100 * (new - old) / max(old, 1))
    return f"{percent:+d} %" if percent else "same"
