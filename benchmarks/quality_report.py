"""The table and the picture of the quality study."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from paired import in_percent, mean_and_error

BASELINE = "adamw_torch"
TITLES = {"scratch": "A new Llama on Python source", "encoder": "A pretrained encoder, fine-tuned"}
SHOWN_ABOVE, SHOWN_BELOW = 3.0, -3.0  # percent; the picture has an arrow for what is further away
Row = dict[str, Any]


class Result(NamedTuple):
    """What the runs of one optimizer at one beta2 have found.

    Args:
        losses: the held-out loss by seed at the best learning rate.
        change: the mean over seeds of the loss relative to AdamW's at its own best learning rate, less 1: infinite if
            a run diverged, None if AdamW was not run with these seeds.
        error: the standard error of `change`, or None where there is one seed or a run diverged.
        rates: the learning rates that were tried, with the first seed's losses.
    """

    optim: str
    beta2: float
    lr: float
    losses: dict[int, float]
    change: float | None
    error: float | None
    rates: dict[float, float]
    state: float
    accuracy: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())


def results_of(rows: Iterable[Row]) -> list[Result]:
    """Return a result per optimizer and beta2, the smaller beta2 first, and then by loss.

    An optimizer without a beta2 is compared with AdamW at its best beta2.
    """
    rows = list(rows)
    beta2_of_adamw = best_beta2(rows)
    by_optim: dict[tuple[float, str], list[Row]] = defaultdict(list)
    for row in rows:
        beta2 = row["run"]["beta2"]
        if beta2 is not None or beta2_of_adamw is not None:
            by_optim[beta2_of_adamw if beta2 is None else beta2, row["run"]["optim"]].append(row)
    best = {key: at_best_rate(found) for key, found in by_optim.items()}
    found = []
    for (beta2, optim), (lr, losses, rates) in best.items():
        baseline = best.get((beta2, BASELINE), (0.0, dict[int, float](), {}))[1]
        changes = [loss / baseline[seed] - 1 for seed, loss in losses.items() if seed in baseline]
        change, error = mean_and_error(changes) if changes else (None, None)
        own = [row for row in by_optim[beta2, optim] if row["run"]["lr"] == lr]
        accuracies = [row["accuracy"] for row in own if "accuracy" in row]
        accuracy = statistics.mean(accuracies) if accuracies else None
        state = own[0]["state_bytes_per_parameter"]
        found.append(Result(optim, beta2, lr, losses, change, error, rates, state, accuracy))
    return sorted(found, key=lambda result: (result.beta2, result.mean))


def best_beta2(rows: Iterable[Row]) -> float | None:
    """Return the beta2 at which AdamW has the lowest loss, or None if it was not run."""
    losses: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row["run"]["optim"] == BASELINE:
            losses[row["run"]["beta2"]].append(row)
    return min(losses, key=lambda beta2: statistics.mean(at_best_rate(losses[beta2])[1].values()), default=None)


def at_best_rate(rows: list[Row]) -> tuple[float, dict[int, float], dict[float, float]]:
    """Return the best learning rate, its losses by seed, and all rates with the first seed's loss.

    The best has the lowest mean loss of those that were run with the most seeds.
    """
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        loss = row["held_out_loss"]
        losses[row["run"]["lr"]][row["run"]["seed"]] = math.inf if loss is None else loss
    most, first = max(map(len, losses.values())), min(seed for by_seed in losses.values() for seed in by_seed)
    best = min((lr for lr in losses if len(losses[lr]) == most), key=lambda lr: statistics.mean(losses[lr].values()))
    rates = {lr: by_seed[first] for lr, by_seed in losses.items() if first in by_seed}
    return best, dict(sorted(losses[best].items())), rates


def write_report(rows: list[Row], path: Path) -> None:
    """Write the table to `path` with the suffix .md, and the picture with .png."""
    lines = ["# Held-out loss of all optimizers, each at its best learning rate", ""]
    for title, own in studies_of(rows).items():
        lines += [*table_of(title, own), ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    draw(rows, path.with_suffix(".png"))


def studies_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each task and scale by its title."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[f"{TITLES[row['run']['task']]}, {row['parameters'] / 1e6:.1f} M parameters"].append(row)
    return dict(sorted(found.items()))


def table_of(title: str, rows: list[Row]) -> list[str]:
    results = results_of(rows)
    accuracy = any(result.accuracy is not None for result in results)
    commits = sorted({row["commit"][:7] for row in rows})
    lines = [
        f"## {title}",
        "",
        f"{len(rows)} runs; {', '.join(sorted({row['cpu'] for row in rows}))}; "
        f"torch {', '.join(sorted({row['torch'] for row in rows}))}; commits {', '.join(commits)}; how to run it: "
        "`benchmarks/quality.py`.",
        "State in bytes per parameter of this model. The loss is the mean over seeds. Against AdamW: the mean of the",
        "differences to AdamW with the same seed, each at its own best learning rate, and its standard error.",
        "",
        f"| `optim` | beta2 | state | lr | seeds | loss |{' accuracy |' if accuracy else ''} against AdamW |",
        "|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if accuracy else ""),
    ]
    for result in results:
        share = f" {result.accuracy:.1%} |" if result.accuracy is not None else " |" if accuracy else ""
        lines.append(
            f"| `{result.optim}` | {result.beta2} | {result.state:.3f} | {result.lr:.2g}{edge(result)} "
            f"| {len(result.losses)} "
            f"| {result.mean:.4f} |{share} {against(result)} |"
        )
    return lines


def summary_of(rows: Iterable[Row], task: str, scale: str, column: str) -> list[str]:
    """Return a short table of one task and scale: the change of the loss against AdamW by optimizer and beta2.

    Args:
        column: the head of the first column.
    """
    own = [row for row in rows if (row["run"]["task"], row["run"]["scale"]) == (task, scale)]
    found: dict[str, dict[float, Result]] = defaultdict(dict)
    for result in results_of(own):
        if result.change is not None:
            found[result.optim][result.beta2] = result
    decays = sorted({beta2 for by_beta2 in found.values() for beta2 in by_beta2})
    heads = [column, "state", *(f"beta2 {beta2}" for beta2 in decays)]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(decays)]
    for optim, by_beta2 in sorted(found.items(), key=lambda item: min(each.change for each in item[1].values())):
        state = next(iter(by_beta2.values())).state
        cells = [cell(by_beta2[beta2]) if beta2 in by_beta2 else "" for beta2 in decays]
        lines.append(f"| `{named(optim)}` | {state:.3f} | {' | '.join(cells)} |")
    return lines


def cell(result: Result) -> str:
    return f"{result.mean:.3f}" if result.optim == BASELINE else against(result)


def named(optim: str) -> str:
    """Return an optimizer with its options as a reader writes them, without folders."""
    return " ".join(re.sub("=.*/", "=", option) for option in optim.split())


def edge(result: Result) -> str:
    """Return a mark where the best learning rate is the lowest or the highest that was tried."""
    inside = min(result.rates) < result.lr < max(result.rates)
    return "" if inside or len(result.rates) == 1 else " (end of the range)"


def against(result: Result) -> str:
    if result.optim == BASELINE or result.change is None:
        return ""
    return in_percent(result.change, result.error)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the change of the loss against the bytes of state, a panel for each task and scale."""
    from matplotlib.figure import Figure  # the tables alone do not need it

    studies = studies_of(rows)
    figure = Figure(figsize=(8, 5 * len(studies)), layout="constrained")
    axes = figure.subplots(len(studies), squeeze=False)[:, 0]
    for (title, own), panel in zip(studies.items(), axes, strict=True):
        results = results_of(own)
        beta2 = best_beta2(own) or min(result.beta2 for result in results)
        panel.axhline(0, color="#4c566a", linewidth=1)
        for result in results:
            unknown = result.change is None or math.isinf(result.change)
            if result.beta2 != beta2 or unknown or " " in result.optim:
                continue
            percent, error = 100 * result.change, 100 * (result.error or 0)
            place = min(max(percent, SHOWN_BELOW), SHOWN_ABOVE)
            inside = place == percent
            color = "#4c566a" if result.optim == BASELINE else "#1b7f9e" if percent < 0.5 else "#d95f02"
            panel.errorbar(
                result.state, place, error if inside else 0, fmt="o" if inside else "^", color=color, capsize=2
            )
            label = result.optim if inside else f"{result.optim} ({percent:+.1f} %)"
            panel.annotate(label, (result.state, place), xytext=(5, 4), textcoords="offset points", fontsize=8)
        panel.set_xscale("log")
        panel.set_title(f"{title}: lower and further left is better")
        panel.set_xlabel("optimizer state, bytes per parameter")
        panel.set_ylabel("held-out loss against AdamW, %")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
