"""What a stage is told, and where it writes its figures. Importable without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from processes import seconds_since_boot

RESULTS = "results.jsonl"


class Session(NamedTuple):
    """What every call of a stage is given.

    Args:
        out: the folder of the results.
        scratch: a folder that is deleted at the end.
        device: "cuda" or "cpu".
        preset: of `presets.py`, for all models; None leaves each stage its own.
        commit: what is measured, where git does not say.
        stage: the stage's name.
        ends: when it should be done, by `seconds_since_boot`.
        verified: whether the smoke tests have passed.
    """

    out: Path
    scratch: Path
    device: str
    preset: str | None
    commit: str | None
    stage: str
    ends: float = float("inf")
    verified: bool = True

    @property
    def seconds_left(self) -> float:
        return self.ends - seconds_since_boot()

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def row(self, name: str, **figures: Any) -> None:
        """Append a row to the results, at once and as a whole, whatever else writes there."""
        row = {"stage": self.stage, "row": name, **figures}
        if not self.verified:
            row["unverified"] = True
        descriptor = os.open(self.out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(row, default=str) + "\n").encode())
        finally:
            os.close(descriptor)

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the session so far."""
        return [json.loads(line) for line in (self.out / RESULTS).read_text().splitlines()]
