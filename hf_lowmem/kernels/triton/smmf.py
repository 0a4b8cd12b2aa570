"""SMMF by Triton kernels: one launch goes over a weight, whose partial sums are added up after it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.in_place.smmf import Numbers, Square, Sums, first_moment, in_one_pass, is_contiguous_square
from hf_lowmem.kernels.passes import RulePasses
from hf_lowmem.kernels.triton.launch import numbers_on_device
from hf_lowmem.kernels.triton.variants import WEIGHTS

TILE, COLUMNS = 1 << 11, 1 << 9  # entries that a program steps at a time, and columns of them at most
PROGRAMS = 1 << 10  # that a large weight is divided among, if its rows are enough
PACKED = 1 << 9  # bytes of signs that a program packs


@cache
def smmf_kernels() -> Any:
    """Return the module of the kernels, which imports Triton."""
    from hf_lowmem.kernels.triton import smmf_kernels

    return smmf_kernels


def covers(step: ParamStep) -> bool:
    """Return whether the kernels step a parameter: one whose gradient has its dtype."""
    if step.param.dtype not in WEIGHTS or step.grad.dtype != step.param.dtype:
        return False
    return step.plan.arithmetic == torch.float32 and is_contiguous_square(step)


def by_kernels(step: ParamStep, numbers: Numbers, sums: Sums) -> None:
    """Go over a weight in one launch, and pack the signs in another where bytes of them cross its rows."""
    (count, n, m), state, weight, device = Square.of(step), step.state, step.weight(), step.param.device
    key = 0 if weight.noise_key is None else weight.noise_key
    columns = min(max(power_of_two(m), 8), COLUMNS)
    rows = min(TILE // columns, power_of_two(n))
    blocks = -(-m // columns)
    groups = min(max(PROGRAMS // (count * blocks), 1), -(-n // rows))
    rows_each = -(-n // groups // rows) * rows
    groups = -(-n // rows_each)
    row_sums = torch.empty(2, count, n, blocks, dtype=torch.float32, device=device)
    col_sums = torch.empty(2, count, groups, m, dtype=torch.float32, device=device)
    signs, in_bytes = state["exp_avg_sign"], m % 8 == 0
    positives = signs if in_bytes else torch.empty(count * n * m, dtype=torch.uint8, device=device)
    factors = [state[name] for name in sums]
    with torch.cuda.device(device if device.type == "cuda" else -1):
        smmf_kernels().go_over[(blocks, groups, count)](
            weight.data,
            weight.data if weight.kahan_comp is None else weight.kahan_comp,
            step.grad,
            factors[0] if step.clip is None else step.clip.scale,  # not read where nothing is clipped
            signs,
            positives,
            *factors,
            row_sums[0],
            col_sums[0],
            row_sums[1],
            col_sums[1],
            numbers_on_device((*numbers, 1 - numbers.beta1, 1 - numbers.beta2, key), device),
            n,
            m,
            rows_each,
            ROUNDING=step.plan.rounding.kind,
            CLIP=step.clip is not None,
            MASK_ZEROS=first_moment(step).mask_zeros,
            WHOLE_BYTES=in_bytes,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if not in_bytes:
            grid = (-(-n * m // (8 * PACKED)), count)
            smmf_kernels().pack[grid](positives, signs, n * m, BYTES=PACKED, num_warps=4, enable_fp_fusion=True)
    for name, parts in zip(sums, (row_sums[0], col_sums[0], row_sums[1], col_sums[1]), strict=True):
        torch.sum(parts, -1 if name.endswith("_row") else -2, out=sums[name].view(count, -1))


def power_of_two(at_least: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (at_least - 1).bit_length()


SMMF = RulePasses(covers, in_one_pass(by_kernels))
