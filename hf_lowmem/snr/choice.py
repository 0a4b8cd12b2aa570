"""How signal-to-noise ratios decide what a second moment is reduced to, in a run and from a CSV alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

FULL, HEAD, ROW_COL = "full", "head", "row_col"  # the rules beside lists of axes; two of them name a ratio, too
MEASUREMENTS = 20  # the number in a calibration, beside those after its first and its last step

Number = TypeVar("Number", float, Tensor)
Way = TypeVar("Way")


def interval(steps: int) -> int:
    """Return the number of steps between the measurements of a calibration of `steps` steps."""
    return max(1, steps // MEASUREMENTS)


def term(name: object, ratio: Number) -> Number:
    """Return what is summed of a ratio to average it: its inverse for the factored estimate, otherwise itself.

    The gradient of a single token is of rank 1, and the factored estimate of it nearly exact. Its huge ratio would
    decide an arithmetic mean alone, but counts as one without noise among the inverses.
    """
    return 1 / ratio if name == ROW_COL else ratio


def mean_of_terms(name: object, total: float, count: float) -> float:
    """Return the mean of `count` ratios whose terms sum up to `total`: NaN without any.

    That of the factored estimate is the harmonic mean, which is infinite where the estimate was always exact.
    """
    if not count:
        return math.nan
    if name != ROW_COL:
        return total / count
    return count / total if total else math.inf


def mean_ratio(name: object, ratios: Iterable[float]) -> float:
    """Return the mean of those ratios of one reduction that are known.

    >>> mean_ratio("fan_in", [1.0, 3.0, float("nan")]), mean_ratio("row_col", [1.0, 3.0, float("inf")])
    (2.0, 2.25)
    """
    terms = [each for each in (term(name, ratio) for ratio in ratios) if math.isfinite(each)]
    return mean_of_terms(name, math.fsum(terms), len(terms))


def best(ratios: Mapping[Way, float], cutoff: float) -> Way | None:
    """Return the reduction with the highest ratio above the cut-off, None (every entry is kept) without one.

    Source: arXiv:2503.01843; authors' code dayal-kalra/low-memory-adam@bb3652c.

    >>> best({"fan_in": 1.5, "fan_out": 2.0, "both": float("nan")}, cutoff=1.0)
    'fan_out'
    """
    above = {way: ratio for way, ratio in ratios.items() if ratio > cutoff}  # NaN never is
    return max(above, key=lambda way: above[way], default=None)
