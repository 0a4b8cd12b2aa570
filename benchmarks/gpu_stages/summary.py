"""The rows of a session as Markdown: a table for each stage. Importable without torch."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
ENDING = ("status", "seconds")  # of a call, which has no other figures
TEXT = "text"  # printed as it is


def render(lines: str) -> str:
    """Markdown of results.jsonl; a last line that was cut off is left out."""
    stages: dict[str, list[Row]] = {}
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        stages.setdefault(row.pop("stage"), []).append(row)
    found = ["# A session on a GPU, by `benchmarks/gpu_session.py`"]
    for stage, rows in stages.items():
        found += ["", f"## {stage}", ""]
        if any([row.pop("unverified", False) for row in rows]):
            found += ["**Unverified: the smoke tests before it have failed.**", ""]
        found += [f"- {row['row']}: {row['status']}, {row['seconds']:.1f} s" for row in rows if "status" in row]
        figures = [row for row in rows if "status" not in row and TEXT not in row]
        found += ["", *table(figures)] if figures else []
        for row in rows:
            found += ["", f"{row['row']}:", "", "```", row[TEXT].rstrip(), "```"] if TEXT in row else []
    return "\n".join(found) + "\n"


def table(rows: list[Row]) -> list[str]:
    """A column for each figure that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    heads = " | ".join(column.replace("_", " ") for column in columns)
    lines = [f"| {heads} |", "|---|" + "---:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "/")
