"""From measured ratios to the rules that say what is averaged of each weight's second moment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_lowmem.snr.choice import HEAD, ROW_COL, best, mean_ratio
from hf_lowmem.snr.ratios import Measured, Reduction, read_ratios

Over = Literal["mean", "min"]
Choice = Reduction | None  # None keeps every entry
ENTRY_BYTES = 4  # a second moment in float32

_NORM = re.compile(r"(?:^|\.)(?:ln\w*|\w*norm\w*)\.\w+$", re.IGNORECASE)


def rules_from_csv(
    path: str | Path,
    cutoff: float = 1.0,
    over: Over = "mean",
    bytes_budget: float | None = None,
    axes_only: bool = False,
) -> dict[str, Any]:
    """Return the rules that follow from a CSV of ratios, as the option `rules` reads them.

    The ratio of each subset of a weight's axes is averaged over all measurements, and of the subsets above the cut-off
    that with the highest ratio is averaged over. Norms and vectors keep every entry. So far that is the authors' rule,
    which the other options change.

    Source: arXiv:2503.01843; authors' code dayal-kalra/low-memory-adam@bb3652c.

    Args:
        path: a CSV of this package or of SlimAdam's authors.
        cutoff: the ratio that must be exceeded.
        over: "mean" decides by the mean over all measurements, "min" by the smallest of them.
        bytes_budget: in place of `cutoff`, the most bytes of second moment per parameter, in float32; see
            `Criterion.within`.
        axes_only: choose among axes alone, as the authors do. Otherwise the factored estimate, whose ratio is the
            square of the estimate over that of its error, and the means by head compete with them.

    Returns:
        By name: a list of axes, "row_col", "head", None where every entry is kept, or an object of these by part for
        a fused weight that was measured by parts.

    Raises:
        ValueError: the file holds no ratios, `cutoff` is no positive number, or the budget is too small for any rules.
    """
    measured = read_ratios(path)
    if bytes_budget is not None:
        criterion = Criterion.within(bytes_budget, measured, over, axes_only)
    elif 0 < cutoff < math.inf:
        criterion = Criterion(cutoff, over, axes_only)
    else:
        raise ValueError(f"cutoff={cutoff} must be a number above 0.")
    return as_rules(measured, criterion.choices(measured))


class BudgetError(ValueError):
    """The error of a budget that no rules keep; `reason` says why, in a clause."""

    def __init__(self, budget: float, reason: str) -> None:
        super().__init__(f"bytes_budget={budget} is too small: {reason}.")
        self.reason = reason


@dataclass(frozen=True)
class Criterion:
    """The settings by which the ratios of a weight, or of a part of one, decide how it is reduced.

    Args:
        cutoff: the ratio that must be exceeded.
        over: "mean" decides by the mean over all measurements, "min" by the smallest of them.
        axes_only: choose among axes alone, as SlimAdam's authors do.
        fewest: of the reductions above the cut-off, take the one that keeps the fewest entries, and not the one with
            the highest ratio.
    """

    cutoff: float = 1.0
    over: Over = "mean"
    axes_only: bool = False
    fewest: bool = False

    @classmethod
    def within(
        cls, budget: float, measured: Mapping[str, Measured], over: Over = "mean", axes_only: bool = False
    ) -> Criterion:
        """Return the criterion with the highest cut-off that keeps at most `budget` bytes of v per parameter.

        Where the reductions with the highest ratios keep more at any cut-off, those with the fewest entries are taken.

        Raises:
            BudgetError: these keep more, too.
        """
        ratios = {combined(how, each, over) for every in measured.values() for how, each in every.ratios.items()}
        # A ratio must exceed its cut-off, so the ones to try lie right below the ratios.
        cutoffs = [*sorted(math.nextafter(ratio, 0) for ratio in ratios if ratio > 0), math.inf]
        for fewest in (False, True):
            tried = [cls(cutoff, over, axes_only, fewest) for cutoff in cutoffs]
            low, high = 0, len(tried)
            while low < high:  # a higher cut-off never keeps fewer bytes
                middle = (low + high) // 2
                low, high = (middle + 1, high) if tried[middle].nbytes(measured) <= budget else (low, middle)
            if low:
                return tried[low - 1]
        least = tried[0].choices(measured)
        kept = sum(each.numel for key, each in measured.items() if least[key] is None)
        raise BudgetError(
            budget,
            f"{ENTRY_BYTES * (1 - saved_share(measured, least)):.4f} bytes per parameter are the least that these "
            f"ratios allow, because {kept:,} entries are of vectors, norms, and weights without a known ratio, which "
            "keep all of them, and every other weight has its smallest reduction",
        )

    def choose(self, measured: Measured) -> Choice:
        """Return what a weight or part is reduced to by its ratios over all measurements."""
        return self.decide(measured, {how: combined(how, each, self.over) for how, each in measured.ratios.items()})

    def decide(self, measured: Measured, ratios: Mapping[Reduction, float]) -> Choice:
        """Return what a weight or part is reduced to where each reduction has this one ratio."""
        if measured.ndim < 2 or _NORM.search(measured.name):
            return None
        known = {how: ratio for how, ratio in ratios.items() if isinstance(how, tuple) or not self.axes_only}
        if not self.fewest:
            return best(known, self.cutoff)
        above = [how for how, ratio in known.items() if ratio > self.cutoff]
        return min(above, key=lambda how: kept_entries(measured, how), default=None)

    def choices(self, measured: Mapping[str, Measured]) -> dict[str, Choice]:
        """Return what each weight or part is reduced to, by key."""
        return {key: self.choose(each) for key, each in measured.items()}

    def nbytes(self, measured: Mapping[str, Measured]) -> float:
        """Return the bytes of second moment per parameter that the choices keep, in float32."""
        return ENTRY_BYTES * (1 - saved_share(measured, self.choices(measured)))


def combined(how: Reduction, ratios: Mapping[int, float], over: Over) -> float:
    """Return the mean or the smallest of a reduction's ratios of all steps, NaN without any."""
    return min(ratios.values(), default=math.nan) if over == "min" else mean_ratio(how, ratios.values())


def kept_entries(measured: Measured, choice: Choice) -> int:
    """Return the number of entries of the second moment that `choice` leaves of a weight or part."""
    if choice is None:
        return measured.numel
    if choice == HEAD:
        return measured.numel // max(measured.head_entries, 1)
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
