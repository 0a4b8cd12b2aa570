"""Writes the rows of a session as Markdown: first what went wrong, then tables for each stage.

It can be imported without torch.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
TEXT = "text"  # the key of a row that is printed as it is
LISTED = ("settings", "machine")  # rows with a line for each figure
LEGENDS = {
    "smoke": "Steps by the kernels against the rules that they follow, and against themselves.",
    "compilation": "Kernels compiled ahead of what is timed, while `smoke` and `tests` run.",
    "core": "A step's time on the device (median of the pairs); its ratio to fused AdamW with bfloat16 weights and "
    "state, and with float32 ones, in the same pairs; both again with clipping before the step. Below 1 is faster. "
    "The share is of a copy's bandwidth, for the bytes that a step cannot but move. Host ms: until the call returns.",
    "kernels": "The time of each kernel by itself, of a step.",
    "sweep": "A step's time by the tile's entries, those of a thread, and the largest group in one tile.",
    "offload": "The state to the host and back.",
    "train-8b": "Supervised fine-tuning, batches of 1 x 2,048 tokens on a GPU. The peak is of the whole run, on a CPU "
    "of the process.",
    "graphs": "A step's time on the device, launched by the host and replayed as a CUDA graph.",
    "rlhf": "TRL's trainers; then from the checkpoint in the middle, with the largest difference of a weight at the "
    "end. On a GPU, backward passes differ by themselves.",
    "quality": "The held-out loss of a new model after equal steps; one seed.",
}
LEGENDS["step-8b-8layers"] = LEGENDS["core"]
LEGENDS["passes"] = LEGENDS["core"]
LEGENDS["coap"] = f"{LEGENDS['core']} Then fine-tuning, batches of 4 x 2,048 tokens on a GPU."
NAMES = {
    "to_bf16": "ratio to AdamW bf16",
    "to_fp32": "ratio to AdamW fp32",
    "to_bf16_quartiles": "quartiles",
    "to_fp32_quartiles": "quartiles",
    "adamw_bf16_ms": "AdamW bf16, ms",
    "adamw_fp32_ms": "AdamW fp32, ms",
    "gb_per_s": "GB/s",
    "copy_gb_per_s": "copy GB/s",
    "copy_share": "share of copy",
    "extra_mib": "extra MiB",
    "state_bytes_per_parameter": "state B/param",
}


def render(rows: list[Row]) -> str:
    """Return all rows of a session as Markdown."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append({key: value for key, value in row.items() if key != "stage"})
    found = ["# Results of `benchmarks/gpu_session.py`", "", *verdict(rows)]
    for stage, of_stage in stages.items():
        found += ["", f"## {stage}", ""]
        found += [LEGENDS[stage], ""] if stage in LEGENDS else []
        if any([row.pop("unverified", False) for row in of_stage]):
            found += ["**Unverified: the smoke tests before it have not all passed.**", ""]
        found += [f"- {row['row']}: {row['status']}, {row['seconds']:.1f} s" for row in of_stage if "status" in row]
        for row in of_stage:
            if row["row"] in LISTED:
                found += [f"- {name(key)}: {shown(value)}" for key, value in row.items() if key != "row" and value]
        figures = [r for r in of_stage if "status" not in r and TEXT not in r and r["row"] not in LISTED]
        for columns in kinds(figures):
            found += ["", *table([row for row in figures if columns == numbers(row)])]
        for row in of_stage:
            found += ["", f"{row['row']}:", "", "```", row[TEXT].rstrip(), "```"] if TEXT in row else []
    return "\n".join(found) + "\n"


def verdict(rows: list[Row]) -> list[str]:
    """Return lines about what has not been done."""
    failed = [
        f"- {row['stage']}, {row['row']}: {row['status']}" for row in rows if row.get("status", "done") != "done"
    ]
    failed += [f"- {row['stage']}: {row['remark']}" for row in rows if row["row"] == "settings" and "remark" in row]
    return ["Not done:", "", *failed] if failed else ["All that was to be done has been done."]


def numbers(row: Row) -> frozenset[str]:
    """Return what the rows of one table have in common; rows with a remark go into any table."""
    return frozenset() if "remark" in row and len(row) == 2 else frozenset(row) - {"remark"}


def kinds(rows: list[Row]) -> list[frozenset[str]]:
    return list(dict.fromkeys(map(numbers, rows)))


def table(rows: list[Row]) -> list[str]:
    """Return a table with a column for each figure that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(map(name, columns))} |", "|---|" + "---:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows]


def name(column: str) -> str:
    """Return the title of a column."""
    return NAMES.get(column, column.replace("_", " "))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "/")
