"""Steps of MicroAdam by a backend, against those of the rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import MicroAdam
from hf_lowmem.kernels import forced
from hf_lowmem.rounding import StoredWeight

# Several blocks with a short one, buckets that cross blocks, rings that come round, odd sizes, a dense update.
CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (60, 130)),
    ({"top_k_block_size": 256}, (97, 101)),
    ({"alpha": 0.1}, (100, 401)),
    ({"m": 3, "alpha": 0.3}, (77,)),
    ({}, ()),
    ({"m": 2, "density": 1.0}, (3, 4, 5, 3, 2)),
    ({"state_bits": 32, "quant_block_size": 50}, (40, 101)),
]
CROSSING = ({"top_k_block_size": 100, "quant_block_size": 64}, (70, 103))
WEIGHTS = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "kahan"),
    (torch.float16, "kahan"),
]


def steps(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return weight and state after steps with zero gradients, with some that are not finite, and with clipping."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
    optimizer = MicroAdam([param], lr=1e-2, weight_decay=0.3, **options)
    for number in range(6):
        grad = torch.randn(shape, generator=generator) / 10
        if number == 1:
            grad.view(-1)[:3], grad.view(-1)[-2:] = float("nan"), float("inf")
        param.grad = (grad * (number != 3)).to(device, dtype)
        if number == 4:
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    state = optimizer.state[param]
    weight = StoredWeight.of(param.detach(), optimizer.plan_of(param).rounding, state, 0).load()
    kept = {name: each for name, each in state.items() if name not in ("step", "kahan_comp")}
    return {"param": weight.float(), **kept}


def check(
    backend: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rounding: str,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> None:
    """Check that a backend keeps what the rule keeps, bit for bit, and steps the weight alike."""
    options = {**options, "rounding": rounding}
    with forced(backend):
        found = steps(options, shape, dtype, device)
    with forced("rule"):
        expected = steps(options, shape, dtype, device)
    in_bfloat16 = dtype == torch.bfloat16 and rounding != "kahan"
    for name, value in expected.items():
        if name != "param":
            assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
        elif in_bfloat16:  # a float32 on the boundary of two may fall to either side
            assert (found[name].nan_to_num() == value.nan_to_num()).float().mean() >= 0.98
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, equal_nan=True)
