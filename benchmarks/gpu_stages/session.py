"""The session, which a stage gets its settings from and writes its figures to. It can be imported without torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from processes import seconds_since_boot

RESULTS = "results.jsonl"


class Session(NamedTuple):
    """What every call of a stage gets.

    Args:
        out: the folder of the results.
        scratch: a folder that is deleted at the end.
        device: "cuda" or "cpu".
        preset: the preset of `presets.py` for all models; with None each stage has its own.
        commit: the commit that is measured, if git does not tell.
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

    def wait_for_memory(self) -> None:
        """Wait for some seconds until the memory that an earlier process held on the GPU is free."""
        import torch

        until = seconds_since_boot() + 5
        while self.on_gpu and seconds_since_boot() < until:
            free, total = torch.cuda.mem_get_info()
            if free > 0.95 * total:
                return
            time.sleep(0.1)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def row(self, name: str, **figures: Any) -> None:
        """Append a row to the results at once, in one write, because other processes also write there."""
        row = {"stage": self.stage, "row": name, **figures}
        if not self.verified:
            row["unverified"] = True
        descriptor = os.open(self.out / RESULTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            was_cut_off = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (("\n" if was_cut_off else "") + json.dumps(row, default=str) + "\n").encode())
        finally:
            os.close(descriptor)

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows so far, without lines that were cut off."""
        path, found = self.out / RESULTS, []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "stage" in row and "row" in row:
                    found.append(row)
        return found
