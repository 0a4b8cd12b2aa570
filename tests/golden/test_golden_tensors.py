"""The algorithms that need no roles against recorded trajectories, tensor by tensor.

SMMF's are of its authors' code, MicroAdam's of a transcription that equals it bit for bit, FAdam's of a public port,
and H-Fac's of a transcription of the printed equations, as there is no author's code of the last two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Parameter

from hf_lowmem.algorithms import FAdam, HFac, MicroAdam, Smmf
from hf_lowmem.optimizer import LowMemOptimizer

GOLDEN = Path(__file__).parent
Used = dict[str, Any]  # the hyperparameters of a recorded run


def smmf(params: list[Parameter], used: Used) -> LowMemOptimizer:
    own = {name: used[name] for name in ("eps", "weight_decay", "growth_rate", "decay_rate", "vector_reshape")}
    return Smmf(params, betas=(used["beta"], 0.999), **own)


def micro_adam(params: list[Parameter], used: Used) -> LowMemOptimizer:
    names = {"wd": "weight_decay", "tblock": "top_k_block_size", "qblock": "quant_block_size"}
    own = {names.get(name, name): used[name] for name in ("betas", "eps", "wd", "m", "density", "tblock", "qblock")}
    return MicroAdam(params, **own, state_bits=16 if used["vals"] == "bfloat16" else 32)


def fadam(params: list[Parameter], used: Used) -> LowMemOptimizer:
    own = {name: used[name] for name in ("betas", "eps", "weight_decay")}
    return FAdam(params, **own, clip_threshold=used["clip"], mask_decay=False)


def h_fac(params: list[Parameter], used: Used) -> LowMemOptimizer:
    return HFac(params, **{name: used[name] for name in ("betas", "weight_decay", "clip_threshold")})


CASES = {
    "smmf_default": smmf,
    "smmf_decay08": smmf,
    "smmf_novecreshape": smmf,
    "smmf_bf16": smmf,
    "microadam_bf16_m10": micro_adam,
    "microadam_fp32_m4": micro_adam,
    "fadam_min": fadam,
    "fadam_min_wd0": fadam,
    "hfac_unofficial": h_fac,
}
GIVEN = {"smmf_decay08": "smmf_default", "smmf_novecreshape": "smmf_default"}  # whose weights and gradients are shared
TOLERANCES = {"microadam_bf16_m10": {"rtol": 0.0, "atol": 0.0}, "microadam_fp32_m4": {"rtol": 0.0, "atol": 1e-6}}
BACKENDS = {"kernels": (), "in_place": ("in_place", "tiles"), "rule": ("rule",)}


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, backends: str, device: str, force: Any) -> None:
    if BACKENDS[backends]:
        force(*BACKENDS[backends])
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    expected = load_file(GOLDEN / f"{case}.safetensors", device=device)
    given = load_file(GOLDEN / f"{GIVEN.get(case, case)}.safetensors", device=device)
    params = {name: Parameter(given[f"param0/{name}"].clone()) for name in meta["tensors"]}
    optimizer = CASES[case](list(params.values()), meta["hyperparameters"])
    tolerance = TOLERANCES.get(case, meta["suggested_tolerance"])
    compared = 0
    for step, lr in enumerate(meta["lr_schedule"], 1):
        optimizer.param_groups[0]["lr"] = lr
        for name, param in params.items():
            param.grad = given[f"grad/{step}/{name}"].to(param.dtype)
        optimizer.step()
        for name, param in params.items():
            if (recorded := expected.get(f"param/{step}/{name}")) is not None:
                torch.testing.assert_close(param.data, recorded, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
                compared += 1
    assert compared >= 3 * len(params)
