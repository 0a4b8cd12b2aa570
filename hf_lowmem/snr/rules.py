"""From measured ratios to the rules that say what is averaged of each weight's second moment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hf_lowmem.snr.ratios import HEAD, ROW_COL, Measured, Reduction, read_ratios

Over = Literal["mean", "min"]
Choice = Reduction | None  # None keeps every entry
ENTRY_BYTES = 4  # a second moment in float32

_NORM = re.compile(r"(?:^|\.)(?:ln\w*|\w*norm\w*)\.\w+$", re.IGNORECASE)


def rules_from_csv(
    path: str | Path,
    cutoff: float = 1.0,
    over: Over = "mean",
    bytes_budget: float | None = None,
    row_col: bool = True,
) -> dict[str, Any]:
    """Return the rules that follow from a CSV of ratios, as the option `rules` of `slim_adamw` reads them.

    The ratio of each subset of a weight's axes is averaged over all measurements, and of the subsets above the cut-off
    that with the highest ratio is averaged over. Norms and vectors keep every entry. So far that is the authors' rule,
    which the other options change.

    Source: arXiv:2503.01843; authors' code dayal-kalra/low-memory-adam@bb3652c.

    Args:
        path: a CSV of this package or of SlimAdam's authors.
        cutoff: the ratio that must be exceeded.
        over: "mean" decides by the mean over all measurements, "min" by the smallest of them.
        bytes_budget: in place of `cutoff`, the most bytes of second moment per parameter, in float32: the highest
            cut-off that keeps it is taken.
        row_col: let the factored estimate, whose ratio is the square of the estimate over that of its error, compete
            with the axes.

    Returns:
        By name: a list of axes, "row_col", None where every entry is kept, or an object of these by part for a fused
        weight that was measured by parts.

    Raises:
        ValueError: the file holds no ratios, `cutoff` is no positive number, or the budget is too small for any rules.
    """
    measured = read_ratios(path)
    if bytes_budget is not None:
        cutoff = cutoff_for(measured, bytes_budget, over, row_col)
    elif not 0 < cutoff < math.inf:
        raise ValueError(f"cutoff={cutoff} must be a number above 0.")
    return as_rules(measured, {key: choose(each, cutoff, over, row_col) for key, each in measured.items()})


def choose(measured: Measured, cutoff: float, over: Over = "mean", row_col: bool = True) -> Choice:
    """Return what a weight or part is reduced to by its ratios over all measurements."""
    return decide(measured, {how: combined(ratios, over) for how, ratios in measured.ratios.items()}, cutoff, row_col)


def decide(measured: Measured, ratios: Mapping[Reduction, float], cutoff: float, row_col: bool = True) -> Choice:
    """Return what a weight or part is reduced to where each reduction has this one ratio."""
    if measured.ndim < 2 or _NORM.search(measured.name):
        return None
    left_out = (HEAD,) if row_col else (HEAD, ROW_COL)
    above = [how for how, ratio in ratios.items() if ratio > cutoff and how not in left_out]  # NaN is not above
    return max(above, key=lambda how: ratios[how], default=None)


def combined(ratios: Mapping[int, float], over: Over) -> float:
    """Return the mean or the smallest of the ratios of all steps, NaN without any."""
    if not ratios:
        return math.nan
    return min(ratios.values()) if over == "min" else math.fsum(ratios.values()) / len(ratios)


def kept_entries(measured: Measured, choice: Choice) -> int:
    """Return the number of entries of the second moment that `choice` leaves of a weight or part."""
    if choice is None:
        return measured.numel
    if choice == ROW_COL:
        *stack, rows, columns = measured.shape
        if stack and (0,) in measured.ratios:  # axis 0 counts no experts, so this is a convolution
            return measured.shape[0] + math.prod(measured.shape[1:])
        return math.prod(stack) * (rows + columns)
    return math.prod(size for axis, size in enumerate(measured.shape) if axis not in choice)


def saved_share(measured: Mapping[str, Measured], choices: Mapping[str, Choice]) -> float:
    """Return the share of all second moments' entries that the choices save."""
    kept = sum(kept_entries(each, choices[key]) for key, each in measured.items())
    return 1 - kept / max(sum(each.numel for each in measured.values()), 1)


def cutoff_for(
    measured: Mapping[str, Measured], bytes_budget: float, over: Over = "mean", row_col: bool = True
) -> float:
    """Return the highest cut-off whose choices keep at most `bytes_budget` bytes of second moment per parameter.

    Raises:
        ValueError: none does.
    """

    def bytes_at(cutoff: float) -> float:
        choices = {key: choose(each, cutoff, over, row_col) for key, each in measured.items()}
        return ENTRY_BYTES * (1 - saved_share(measured, choices))

    ratios = {combined(each, over) for every in measured.values() for each in every.ratios.values()}
    # A ratio must exceed its cut-off, so the ones to try lie right below the ratios.
    cutoffs = [*sorted(math.nextafter(ratio, 0) for ratio in ratios if ratio > 0), math.inf]
    low, high = 0, len(cutoffs)
    while low < high:  # a higher cut-off never keeps fewer bytes
        middle = (low + high) // 2
        low, high = (middle + 1, high) if bytes_at(cutoffs[middle]) <= bytes_budget else (low, middle)
    if not low:
        raise ValueError(
            f"bytes_budget={bytes_budget} is too small: these second moments need at least {bytes_at(cutoffs[0]):.4f} "
            "bytes per parameter; raise it."
        )
    return cutoffs[low - 1]


def as_rules(measured: Mapping[str, Measured], choices: Mapping[str, Choice]) -> dict[str, Any]:
    """Return choices by key as rules by name, ready for JSON."""
    rules: dict[str, Any] = {}
    for key, choice in choices.items():
        each = measured[key]
        value = list(choice) if isinstance(choice, tuple) else choice
        if each.part:
            rules.setdefault(each.name, {})[each.part] = value
        else:
            rules[each.name] = value
    return rules


def write_rules(path: str | Path, rules: Mapping[str, Any]) -> None:
    """Write rules as the JSON file that the option `rules` reads, a name a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rule)}" for name, rule in rules.items())
    Path(path).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
