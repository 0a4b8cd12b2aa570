"""The table and the chart of a `step_time.py` report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import HORIZON
from peers import BASELINE, PEERS

import hf_lowmem

Row = dict[str, Any]
Cell = Callable[[Row], str]


def title(name: str) -> str:
    """Return the name of a row in tables: the title of a peer, or our optim name as code."""
    if name == BASELINE:
        return f"{PEERS[name].title}, against itself"
    return PEERS[name].title if name in PEERS else f"`{name}`"


def figure(key: str, form: str, scale: float = 1) -> Cell:
    return lambda row: "" if row.get(key) is None else format(row[key] * scale, form)


def with_quartiles(clock: str) -> Cell:
    def cell(row: Row) -> str:
        low, high = row[f"{clock}_ratio_quartiles"]
        return f"{row[f'{clock}_ratio']:.2f} [{low:.2f}-{high:.2f}]"

    return cell


def clipped(cell: Cell) -> Cell:
    """Return the figure for clipping and a step."""
    return lambda row: cell(row["clipped"]) if "clipped" in row else ""


def table(rows: list[Row], columns: dict[str, Cell]) -> list[str]:
    """Return a Markdown table with the optimizer and those of `columns` that any row fills; failed rows say why."""
    cells = [["" if "error" in row else cell(row) for cell in columns.values()] for row in rows]
    kept = [index for index in range(len(columns)) if any(line[index] for line in cells)]
    heads = [list(columns)[index] for index in kept] or ["result"]
    lines = [f"| {' | '.join(['optimizer', *heads])} |", "|---|" + "---:|" * len(heads)]
    for row, line in zip(rows, cells, strict=True):
        shown = [line[index] for index in kept]
        if "error" in row:
            shown = [row["error"].replace("|", "/"), *[""] * (len(heads) - 1)]
        lines.append(f"| {' | '.join([title(row['optim']), *shown])} |")
    return lines


def sections(report: dict[str, Any]) -> dict[tuple[str, int], list[Row]]:
    """Return the rows by (dtype, threads), in the order of the report."""
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in report["rows"]:
        grouped.setdefault((row["dtype"], row["threads"]), []).append(row)
    return grouped


def heading(dtype: str, threads: int, gpu: str | None) -> str:
    return dtype if gpu else f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown, with a table per dtype and number of threads."""
    machine, preset = report["machine"], report["preset"]
    gpu = machine["gpu"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    missing = ", ".join(report["not_installed"])
    busiest = max(row.get("other_cpu_per_own", 0) for row in report["rows"])
    lines = [
        "# Time of one optimizer step, against `torch.optim.AdamW(fused=True)`",
        "",
        f"{preset['parameters']:,} parameters in {preset['tensors']} tensors (preset `{preset['name']}`); "
        "method and columns: `benchmarks/step_time.py`.",
        "",
        f"- machine: {gpu or machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"- versions: Python {machine['python']}, {packages}" + (f"; not installed: {missing}" if missing else ""),
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        f"- other programs used at most {busiest:.0%} of the CPU time that a row's own process used",
    ]
    clock = "device" if gpu else "CPU"
    columns: dict[str, Cell] = {
        f"{clock} ms": figure("cpu_ms", ".1f"),
        f"{clock} ratio [quartiles]": with_quartiles("cpu"),
        **({} if gpu else {"wall ms": figure("wall_ms", ".1f"), "wall ratio": figure("wall_ratio", ".2f")}),
        "state B/param": figure("state_bytes_per_parameter", ".3f"),
        "moved B/param": figure("moved_bytes_per_parameter", ".2f"),
        "of copy bandwidth": figure("copy_share", ".0%"),
        "extra MiB": figure("extra_bytes", ".1f", 2**-20),
        "first step s": figure("first_step_s", ".2f"),
        "host ms": figure("host_ms", ".2f"),
        "graph ms": figure("graph_ms", ".2f"),
        "pairs": figure("pairs", "d"),
        f"clipped {clock} ms": clipped(figure("cpu_ms", ".1f")),
        "clipped ratio [quartiles]": clipped(with_quartiles("cpu")),
    }
    for (dtype, threads), rows in sections(report).items():
        lines += ["", f"## {heading(dtype, threads, gpu)}", ""]
        bandwidths = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
        if bandwidths:
            baseline = next((row["baseline_dtype"] for row in rows if "baseline_dtype" in row), dtype)
            low, high = min(bandwidths), max(bandwidths)
            lines += [f"Copy bandwidth {low:.1f}-{high:.1f} GB/s, fused AdamW's weights in {baseline}.", ""]
        lines += table(rows, columns)
    if changing := [row for row in report["rows"] if "amortised" in row]:
        lines += ["", f"## Changes of basis, and all of the first {HORIZON} steps", ""]
        lines += table(
            changing,
            {
                "on": lambda row: heading(row["dtype"], row["threads"], gpu),
                f"{clock} ms between": figure("cpu_ms", ".0f"),
                "with a change (how many)": described_changes,
                "first step s": figure("first_step_s", ".2f"),
                f"amortised ratio, {clock}": lambda row: f"{row['amortised']['cpu']:.2f}",
                "wall": lambda row: f"{row['amortised']['wall']:.2f}",
            },
        )
    return "\n".join(lines) + "\n"


def described_changes(row: Row) -> str:
    changes = row["change_of_basis"].items()
    return ", ".join(f"{kind} {times['cpu_ms']:.0f} ({row['changes'][kind]})" for kind, times in changes)


def save_png(report: dict[str, Any], path: Path) -> None:
    """Draw bars of the time ratio and of the bytes of state for each dtype and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {key: [row for row in rows if "error" not in row] for key, rows in sections(report).items()}
    done = {key: rows for key, rows in done.items() if rows}
    if not done:
        return
    heights = [len(rows) + 2 for rows in done.values()]
    chart, axes = pyplot.subplots(
        len(done), 2, figsize=(11, 0.28 * sum(heights) + 0.5), squeeze=False, height_ratios=heights, sharey="row"
    )
    ours = set(hf_lowmem.optim_names())
    for ((dtype, threads), rows), (times, state) in zip(done.items(), axes, strict=True):
        names = [title(row["optim"]).strip("`") for row in rows]
        colors = ["tab:blue" if row["optim"].partition(" ")[0] in ours else "tab:gray" for row in rows]
        ratios = [row["cpu_ratio"] for row in rows]
        quartiles = [row["cpu_ratio_quartiles"] for row in rows]
        spread = [
            [ratio - low for ratio, (low, _) in zip(ratios, quartiles, strict=True)],
            [high - ratio for ratio, (_, high) in zip(ratios, quartiles, strict=True)],
        ]
        bars = times.barh(names, ratios, color=colors, xerr=spread, ecolor="black")
        times.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        times.axvline(1, color="black", linewidth=0.8)
        times.set_xscale("log")
        times.set_xlim(min(0.4, *ratios) * 0.8, max(ratios) * 2)
        times.set_title(f"{heading(dtype, threads, report['machine']['gpu'])}: time of a step / fused AdamW's")
        bars = state.barh(names, [row["state_bytes_per_parameter"] for row in rows], color=colors)
        state.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        state.set_title("bytes of state per parameter")
        times.invert_yaxis()
    chart.tight_layout()
    chart.savefig(path, dpi=110)
    pyplot.close(chart)
