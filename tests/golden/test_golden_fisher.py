"""FAdam and H-Fac against recorded trajectories, weight by weight.

FAdam's are of a public port, and H-Fac's of a transcription of the printed equations: nobody has their authors' code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_lowmem.algorithms import FAdam, HFac

GOLDEN = Path(__file__).parent
CASES = {"fadam_min": FAdam, "fadam_min_wd0": FAdam, "hfac_unofficial": HFac}
OPTIONS = {
    FAdam: lambda used: {"eps": used["eps"], "clip_threshold": used["clip"], "mask_decay": False},
    HFac: lambda used: {"clip_threshold": used["clip_threshold"]},
}
BACKENDS = {"kernels": (), "in_place": ("in_place", "tiles"), "rule": ("rule",)}


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, backends: str, device: str, force: Any) -> None:
    if BACKENDS[backends]:
        force(*BACKENDS[backends])
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    given = load_file(GOLDEN / f"{case}.safetensors", device=device)
    used, tolerance = meta["hyperparameters"], meta["suggested_tolerance"]
    hyper = {name: used[name] for name in ("betas", "weight_decay")} | OPTIONS[CASES[case]](used)
    weights = {name: torch.nn.Parameter(given[f"param0/{name}"].clone()) for name in meta["tensors"]}
    optimizer = CASES[case](weights.values(), **hyper)
    for step, lr in enumerate(meta["lr_schedule"], 1):
        optimizer.param_groups[0]["lr"] = lr
        for name, weight in weights.items():
            weight.grad = given[f"grad/{step}/{name}"].float()
        optimizer.step()
        for name, weight in weights.items():
            if f"param/{step}/{name}" in given:
                torch.testing.assert_close(weight.data, given[f"param/{step}/{name}"], **tolerance)
