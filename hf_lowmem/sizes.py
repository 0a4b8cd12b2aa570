"""Numbers of bytes in a form that people read."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_unit(nbytes: int, unit: str) -> str:
    """Return `nbytes` as a number of `unit`, with two decimals unless the unit is bytes."""
    return str(nbytes) if unit == "B" else f"{nbytes / 1024 ** UNITS.index(unit):.2f}"


def unit_of(nbytes: int) -> str:
    """Return the largest unit in which `nbytes`, shown with two decimals, is at least one."""
    number = next((n for n in range(1, len(UNITS)) if nbytes / 1024**n < 0.999995), len(UNITS))
    return UNITS[number - 1]


def readable(nbytes: int) -> str:
    """Return `nbytes` with its unit, such as "7.60 GiB"."""
    unit = unit_of(nbytes)
    return f"{in_unit(nbytes, unit)} {unit}"
