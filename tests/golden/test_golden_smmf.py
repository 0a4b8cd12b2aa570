"""SMMF against trajectories of its authors' code.

That code rounds a bfloat16 weight twice, after the decay, which is lost there, and after the update; ours rounds it
once. The case in bfloat16 therefore decays and rounds the weights itself, before each step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_lowmem.algorithms import Smmf

GOLDEN = Path(__file__).parent
CASES = ["smmf_default", "smmf_decay08", "smmf_novecreshape", "smmf_bf16"]


@pytest.mark.parametrize("backends", [(), ("in_place", "tiles"), ("rule",)], ids=["kernels", "tiles", "rule"])
@pytest.mark.parametrize("case", CASES)
def test_smmf(case: str, backends: tuple[str, ...], device: str, force: Any) -> None:
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    expected = load_file(GOLDEN / f"{case}.safetensors", device=device)
    given = expected if case == "smmf_bf16" else load_file(GOLDEN / "smmf_default.safetensors", device=device)
    used, tolerance = meta["hyperparameters"], meta["suggested_tolerance"]
    if backends:
        force(*backends)
    decay = used["weight_decay"]
    params = {name: torch.nn.Parameter(given[f"param0/{name}"].clone()) for name in meta["tensors"]}
    optimizer = Smmf(
        params.values(),
        betas=(used["beta"], 0.999),
        weight_decay=0.0 if case == "smmf_bf16" else decay,
        **{name: used[name] for name in ("eps", "growth_rate", "decay_rate", "vector_reshape")},
    )
    for step, lr in enumerate(meta["lr_schedule"], 1):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            if case == "smmf_bf16":
                param.data.mul_(1 - lr * decay)
            param.grad = given[f"grad/{step}/{name}"].to(param.dtype)
        optimizer.step()
        for name, param in params.items():
            if f"param/{step}/{name}" in expected:
                torch.testing.assert_close(
                    param.data, expected[f"param/{step}/{name}"], **tolerance, msg=lambda m, n=name: f"{n}, {m}"
                )
