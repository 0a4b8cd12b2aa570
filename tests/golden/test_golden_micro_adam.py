"""MicroAdam against trajectories of a transcription that equals the authors' code bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_lowmem.algorithms import MicroAdam

GOLDEN = Path(__file__).parent
TOLERANCES = {"microadam_bf16_m10": 0.0, "microadam_fp32_m4": 1e-6}


@pytest.mark.parametrize("backends", [(), ("in_place",), ("rule",)], ids=["kernels", "in_place", "rule"])
@pytest.mark.parametrize("case", TOLERANCES)
def test_micro_adam(case: str, backends: tuple[str, ...], device: str, force: Any) -> None:
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    given = load_file(GOLDEN / f"{case}.safetensors", device=device)
    used = meta["hyperparameters"]
    params = {name: torch.nn.Parameter(given[f"param0/{name}"].clone()) for name in meta["tensors"]}
    optimizer = MicroAdam(
        params.values(),
        betas=tuple(used["betas"]),
        eps=used["eps"],
        weight_decay=used["wd"],
        m=used["m"],
        density=used["density"],
        top_k_block_size=used["tblock"],
        quant_block_size=used["qblock"],
        alpha=used.get("alpha", 0.0),
        state_bits=16 if used["vals"] == "bfloat16" else 32,
    )
    if backends:
        force(*backends)
    worst = 0.0
    for step, lr in enumerate(meta["lr_schedule"], 1):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            param.grad = given[f"grad/{step}/{name}"].to(param.dtype)
        optimizer.step()
        for name, param in params.items():
            worst = max(worst, (param - given[f"param/{step}/{name}"]).abs().max().item())
    assert worst <= TOLERANCES[case]
