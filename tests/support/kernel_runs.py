"""A few steps of one parameter, by the backend that covers it or by the rule."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import AdamMini, FactoredAdamW, LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.codecs.dynamic_map import decode_table
from hf_lowmem.kernels import forced
from hf_lowmem.rounding import StoredWeight


def run(
    cls: type,
    options: dict[str, Any],
    start: Tensor,
    steps: int = 3,
    bad: float | None = None,
    clip: float | None = None,
    norm_by: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and the state, both as float32, after a few steps; full moments decoded.

    Each gradient has one entry of `bad`, and is clipped to a norm of `clip`, which the backends `norm_by` find.
    """
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(start.clone())
    optimizer = cls([param], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)
    for _ in range(steps):
        grad = torch.randn(start.shape, generator=generator).to(start.dtype)
        if bad is not None:
            grad.view(-1)[grad.numel() // 2] = bad
        param.grad = grad.to(start.device)
        if clip is not None:
            with forced(*norm_by) if norm_by else nullcontext():
                optimizer.clip_grad_norm_(clip)
        optimizer.step()
    (state,), group = optimizer.state.values(), optimizer.param_groups[0]
    plan = optimizer.plan(group, tuple(start.shape), start.dtype)
    decoded = {name: value.float() for name, value in state.items() if value.dtype != torch.uint8}
    for name, codes in state.items():
        if codes.dtype == torch.uint8:
            values = decode_table(name == "exp_avg", codes.device)[codes.int()]
            scales = state[f"{name}_absmax"].repeat_interleave(plan.codec.block_size, -1)
            rows = values.view(*scales.shape[:-1], -1)
            decoded[name] = (rows * scales[..., : rows.shape[-1]]).view(values.shape)
    weight = StoredWeight.of(param.detach(), plan.rounding, state, 0)
    return (weight.load() if plan.rounding.kind == "kahan" else param.detach().float()), decoded


def by_rule(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with forced("rule"):
        return run(*args)


# What the GPU kernels are tested on: all of them, with tiles that are not full, and groups that are not one tile.
CASES: list[tuple[type, dict[str, Any], tuple[int, ...]]] = [
    (LowMemAdamW, {}, (7, 768)),
    (Signum, {}, (7, 768)),
    (SlimAdamW, {"axes": (1,)}, (5, 768)),
    *((SlimAdamW, {"axes": (1,)}, (rows, columns)) for rows, columns in ((70, 64), (35, 96), (33, 128), (17, 256))),
    (SlimAdamW, {"axes": (0,)}, (37, 512)),
    (SlimAdamW, {"axes": (1,)}, (2, 3, 2, 256)),
    (AdamMini, {"axes": (1,), "rows_per_block": 8}, (16, 512)),
    (AdamMini, {"axes": (0, 1)}, (40, 256)),
    (FactoredAdamW, {"axes": (1,), "cross_axes": (0,)}, (37, 512)),
    (FactoredAdamW, {"axes": (1,), "cross_axes": (2,)}, (3, 20, 96)),
]
# Rows whose last 8-bit block is short, that are one block, and that take several axes.
RAGGED: list[tuple[type, dict[str, Any], tuple[int, ...]]] = [
    (LowMemAdamW, {}, (2, 4304)),
    (LowMemAdamW, {}, (1031,)),
    (Signum, {}, (3, 5, 257)),
    (Signum, {}, (40, 16)),
    (LowMemAdamW, {}, (9, 30, 3, 3)),
    (SlimAdamW, {"axes": (1,)}, (5, 1076)),
    (SlimAdamW, {"axes": (0,)}, (19, 513)),
    (SlimAdamW, {"axes": (0,)}, (11, 2)),
    (SlimAdamW, {"axes": (1,)}, (2, 3, 259)),
    (SlimAdamW, {"axes": (1,)}, (300, 7)),
    (SlimAdamW, {"axes": (1, 2, 3)}, (6, 29, 3, 3)),
    (AdamMini, {"axes": (1, 2)}, (12, 1, 4)),
    (AdamMini, {"axes": (1,), "rows_per_block": 8}, (16, 521)),
    (AdamMini, {"axes": (0, 1)}, (40, 255)),
    (AdamMini, {"axes": (0,)}, (300, 1)),
    (FactoredAdamW, {"axes": (0,), "cross_axes": (1,)}, (19, 513)),
    (FactoredAdamW, {"axes": (2,), "cross_axes": (1,)}, (2, 3, 259)),
]
WEIGHTS = [
    *((dtype, "nearest") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((dtype, rounding) for dtype in (torch.bfloat16, torch.float16) for rounding in ("stochastic", "kahan")),
]
FEW_WEIGHTS = [WEIGHTS[0], (torch.bfloat16, "stochastic"), (torch.float16, "kahan")]
VARIANTS = [
    pytest.param(case, *weight, id=f"{case[0].__name__}-{case[1]}-{case[2]}-{weight[0]}-{weight[1]}".replace(" ", ""))
    for number, case in enumerate(CASES)
    for weight in (FEW_WEIGHTS if number else WEIGHTS)
]


def check_gpu_kernel(
    case: tuple, bits: int, dtype: torch.dtype, rounding: str, device: str = "cpu", clip: float | None = None
) -> None:
    """The GPU kernel against the rule on the same device."""
    (cls, options, shape), on_device = case, torch.device(device)
    options = {**options, "state_bits": bits, "rounding": rounding, **({"min_8bit_size": 0} if bits == 8 else {})}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(on_device, dtype)
    backends = ("triton", "in_place")  # the latter for what is projected, whose updates the former steps
    with forced(*backends):
        mine, state = run(cls, options, start, steps=2, clip=clip)
    # torch's norm is less exact than the kernels': by 2e-6 for 20,000 entries.
    theirs, expected = by_rule(cls, options, start, 2, None, clip, backends)
    # A code, or a narrow number's neighbour, may fall to either side of a boundary in a few places.
    flips = bits < 32 or rounding == "stochastic" or (rounding == "nearest" and dtype != torch.float32)
    for name, value in {"param": mine, **state}.items():
        reference = theirs if name == "param" else expected[name]
        if name == "kahan_comp":
            continue  # in units of the weight's last place: compared with the weight
        off, largest = (value - reference).abs(), float(reference.abs().max())
        exact = off <= 1e-6 * largest + 1e-6 * reference.abs()
        if not flips and not (cls is Signum and name == "param"):  # a sign may flip
            assert exact.all(), (name, off.max())
        # A code of a projected moment moves a whole row or column of the weight.
        share = 0.99 if bits == 32 else 0.9 if name == "param" and "rank" in options else 0.95
        assert exact.sum() >= share * exact.numel() - (bits == 8), (name, exact.float().mean())
        assert off.max() <= 2.0**-5 * largest, (name, off.max())  # a code more at each step
