"""The tables and the drawing of measured signal-to-noise ratios."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hf_lowmem.planner.tables import table, wrapped
from hf_lowmem.snr.choice import FULL, HEAD, ROW_COL, mean_ratio
from hf_lowmem.snr.ratios import Measured, Reduction
from hf_lowmem.snr.rules import Choice, Criterion, combined, saved_share

CUTOFFS = (0.5, 1.0, 2.0, 3.0)
PANELS = 12  # the most weights by layer-name pattern that are drawn

Ratios = Mapping[str, Measured]


def pattern(key: str) -> str:
    """Return a key without its layer numbers: `h.*.attn.c_proj.weight`."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", key)


def by_pattern(found: Ratios) -> dict[str, list[Measured]]:
    """Return the weights that differ in their layer numbers only; vectors, which no rule reduces, are left out."""
    groups: dict[str, list[Measured]] = defaultdict(list)
    for key, measured in found.items():
        if measured.ndim > 1:
            groups[pattern(key)].append(measured)
    return groups


def report(found: Ratios, criterion: Criterion) -> str:
    """Return the tables of ratios and choices by layer-name pattern, and of what each cut-off saves."""
    choices = criterion.choices(found)
    groups = by_pattern(found)
    hows = _reductions([each for group in groups.values() for each in group])
    lines = []
    for name, group in groups.items():
        ratios = [
            mean_ratio(how, (combined(how, each.ratios.get(how, {}), criterion.over) for each in group))
            for how in hows
        ]
        equal, measurements = stability([(each, choices[each.key]) for each in group], criterion)
        rules = Counter(describe(choices[each.key]) for each in group)
        rule = ", ".join(f"{rule} x {n}" if len(rules) > 1 else rule for rule, n in rules.most_common())
        cells = ["" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
        lines.append((name, str(len(group)), *cells, f"{equal} of {measurements}", rule))
    head = ("weights", "tensors", *map(describe, hows), "stable", "rule")
    saved = []
    for each in sorted({*CUTOFFS, criterion.cutoff}):
        chosen = replace(criterion, cutoff=each).choices(found)
        reduced = sum(choice is not None for choice in chosen.values())
        share = saved_share(found, chosen)
        saved.append((f"{each:g}", f"{100 * share:.2f} %", f"{4 * (1 - share):.3f}", f"{reduced} of {len(found)}"))
    fewest = " Of the reductions above it, the one with the fewest entries is taken." if criterion.fewest else ""
    word = "smallest" if criterion.over == "min" else "mean"
    return "\n".join(
        [
            wrapped(
                f"Signal-to-noise ratio of each reduction of the second moment: {word} over all measurements, then "
                f'mean over layers. "stable" counts the measurements that by themselves lead to the rule at '
                f"cut-off {criterion.cutoff:g}.{fewest}"
            ),
            "",
            *table(head, lines, left=(0, len(head) - 1)),
            "",
            *table(("cut-off", "saved of second moments", "bytes/param", "tensors reduced"), saved),
        ]
    )


def stability(choices: Sequence[tuple[Measured, Choice]], criterion: Criterion) -> tuple[int, int]:
    """Return how many measurements of these weights lead to their choice by themselves, and how many there are."""
    equal = count = 0
    for measured, choice in choices:
        for step in sorted(set().union(*measured.ratios.values())):
            ratios = {how: each[step] for how, each in measured.ratios.items() if step in each}
            equal += criterion.decide(measured, ratios) == choice
            count += 1
    return equal, count


def describe(choice: Choice) -> str:
    """Return a reduction as a table names it."""
    if choice is None:
        return FULL
    return choice if isinstance(choice, str) else f"axis {','.join(map(str, choice))}"


def draw(found: Ratios, path: Path, cutoff: float) -> None:
    """Draw the ratios over the steps, a panel per layer-name pattern, with the cut-off, and write them as a PNG.

    A line is the mean over layers. The patterns with the most entries are drawn.
    """
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display and changes no global state

    groups = by_pattern(found)
    largest = sorted(groups, key=lambda name: -sum(each.numel for each in groups[name]))[:PANELS]
    hows = _reductions([each for name in largest for each in groups[name]])
    columns = min(4, len(largest))
    rows = math.ceil(len(largest) / columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows + 0.5), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for panel, name in zip(panels, largest, strict=False):
        for number, how in enumerate(hows):
            steps = sorted(set().union(*(each.ratios.get(how, {}) for each in groups[name])))
            means = [
                mean_ratio(how, (each.ratios.get(how, {}).get(step, math.nan) for each in groups[name]))
                for step in steps
            ]
            panel.plot(steps, means, color=f"C{number}", marker="o", markersize=3, label=describe(how))
        panel.axhline(cutoff, color="black", linewidth=1, linestyle="--", label=f"cut-off {cutoff:g}")
        panel.set(xscale="log", yscale="log")
        panel.set_title(name, fontsize=8)
        panel.grid(alpha=0.25)
    for panel in list(figure.axes)[len(largest) :]:
        panel.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("step")
    figure.supylabel("signal-to-noise ratio")
    figure.savefig(path)


def _reductions(measured: Sequence[Measured]) -> list[Reduction]:
    """Return all reductions that any of the weights was measured for: axes, then heads, then the factored estimate."""
    found = {how for each in measured for how in each.ratios}
    axes = sorted((how for how in found if isinstance(how, tuple)), key=lambda how: (len(how), how))
    return [*axes, *(how for how in (HEAD, ROW_COL) if how in found)]
