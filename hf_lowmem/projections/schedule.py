"""When a basis is made again (COAP, arXiv:2412.00071, and the schedule of its authors' code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_lowmem.state import State


@dataclass(frozen=True)
class Schedule:
    """Every `update_interval` steps the basis is corrected (Eq. 5); each `reproject_factor`-th time it is recomputed.

    At the first step, and while a gradient has been zero, there is no basis to change.
    """

    update_interval: int
    reproject_factor: int

    def event(self, state: State) -> Literal["recompute", "correct"] | None:
        """What is due before the step that `state["step"]` counts, k steps being completed."""
        k = int(state["step"].item()) - 1
        if k == 0 or k % self.update_interval:
            return None
        return "correct" if k % (self.update_interval * self.reproject_factor) else "recompute"
