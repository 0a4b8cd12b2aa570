"""Paired differences: the loss of an optimizer against a baseline's with the same seed, over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_error(changes: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which is None for a single change or an infinite one."""
    several = len(changes) > 1 and all(map(math.isfinite, changes))
    return statistics.mean(changes), statistics.stdev(changes) / math.sqrt(len(changes)) if several else None


def in_percent(change: float, error: float | None) -> str:
    if math.isinf(change):
        return "diverged"
    return f"{change:+.2%}" + (f" ± {error:.2%}" if error is not None else "")
