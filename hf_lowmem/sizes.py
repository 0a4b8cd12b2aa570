"""Bytes, for people."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_unit(nbytes: int, unit: str) -> str:
    """`nbytes` as a number of `unit`: a whole one of bytes, else with two decimals."""
    return str(nbytes) if unit == "B" else f"{nbytes / 1024 ** UNITS.index(unit):.2f}"


def unit_of(nbytes: int) -> str:
    """The largest unit of which `nbytes` are at least one, as two decimals show it."""
    number = next((n for n in range(1, len(UNITS)) if nbytes / 1024**n < 0.999995), len(UNITS))
    return UNITS[number - 1]


def readable(nbytes: int) -> str:
    """Such as "7.60 GiB"."""
    unit = unit_of(nbytes)
    return f"{in_unit(nbytes, unit)} {unit}"
