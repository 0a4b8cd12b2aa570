"""Steps of SMMF by a backend, and what they are compared on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import Smmf
from hf_lowmem.kernels import forced
from hf_lowmem.rounding import StoredWeight

# Bytes of signs that cross rows and that do not, stacks of both, vectors, and squares of several runs and groups.
CASES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (16, 128)),
    ({"mask_zero_grads": True}, (31, 57)),
    ({"stacked": True, "mask_zero_grads": True}, (3, 9, 15)),
    ({"stacked": True}, (3, 40, 64)),
    ({}, (131,)),
    ({}, ()),
    ({}, (301, 457)),
]
WEIGHTS = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "kahan"),
    (torch.float16, "kahan"),
]


def smmf_steps(
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    clip: float | None = None,
    steps: int = 3,
) -> dict[str, Tensor]:
    """Return weight and state after a few steps, whose gradients have zeros; under Kahan with what is compensated."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
    optimizer = Smmf([param], lr=1e-2, weight_decay=0.1, reference_rounding=False, **options)
    for _ in range(steps):
        grad = torch.randn(shape, generator=generator)
        param.grad = torch.where(grad.abs() < 0.1, 0.0, grad).to(device, dtype)
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
    plan, state = optimizer.plan_of(param), optimizer.state[param]
    weight = StoredWeight.of(param.detach(), plan.rounding, state, 0)
    found = weight.load() if plan.rounding.kind == "kahan" else param.detach().float()
    return {"param": found, **{name: each for name, each in state.items() if name not in ("step", "kahan_comp")}}


def check(
    backend: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rounding: str,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    clip: float | None = None,
) -> None:
    """Check the steps of a backend against those of the rule, up to roundings that fall to the other side."""
    options = {**options, "rounding": rounding}
    with forced(backend):
        found = smmf_steps(options, shape, dtype, device, clip)
    with forced("rule"):
        expected = smmf_steps(options, shape, dtype, device, clip)
    flips = dtype != torch.float32 and rounding != "kahan"
    for name, value in expected.items():
        if name == "exp_avg_sign":
            assert torch.equal(found[name], value)
            continue
        off = (found[name] - value).abs()
        exact = off <= 2e-6 * value.abs().max()
        assert exact.float().mean() >= (0.99 if name == "param" and flips else 1.0), (name, off.max())
        assert off.max() <= 2.0**-6 * value.abs().max(), (name, off.max())
