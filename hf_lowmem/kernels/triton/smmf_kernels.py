"""The Triton kernels of SMMF; `smmf.py` launches them.

A program goes over rows of one block of columns of a square. It writes partial sums, which are added up in an order
that the square's sides alone decide, so a step is the same at every run.
"""

import triton
import triton.language as tl

from hf_lowmem.kernels.triton.memory import INFINITY, scalar, widened
from hf_lowmem.kernels.triton.rounding import take

# The numbers of a step, float64.
NUMBERS = ("decay", "lr", "eps", "beta1", "beta2", "new_1", "new_2", "noise_key")
DECAY = tl.constexpr(NUMBERS.index("decay"))
LR = tl.constexpr(NUMBERS.index("lr"))
EPS = tl.constexpr(NUMBERS.index("eps"))
BETA_1 = tl.constexpr(NUMBERS.index("beta1"))
BETA_2 = tl.constexpr(NUMBERS.index("beta2"))
NEW_1 = tl.constexpr(NUMBERS.index("new_1"))
NEW_2 = tl.constexpr(NUMBERS.index("new_2"))
NOISE_KEY = tl.constexpr(NUMBERS.index("noise_key"))


@triton.jit
def go_over(
    weights,
    comps,
    grads,
    grad_scale,
    signs,
    positives,
    row,
    col,
    row_sq,
    col_sq,
    row_sums,
    col_sums,
    row_sums_sq,
    col_sums_sq,
    numbers,
    n,
    m,
    rows_each,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
    MASK_ZEROS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Step `rows_each` rows of a block of columns by the old factors, and write partial sums of both new moments.

    Signs are written where no byte crosses rows, `WHOLE_BYTES`, and else to `positives`, a byte for each entry.
    """
    block, group, square = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, groups = tl.num_programs(0), tl.num_programs(1)
    own_signs = signs + square * ((n.to(tl.int64) * m + 7) // 8)
    along = block * COLUMNS + tl.arange(0, COLUMNS)
    in_row = along < m
    factor = tl.load(col + square * m + along, mask=in_row, other=0.0)[None, :]
    factor_sq = tl.load(col_sq + square * m + along, mask=in_row, other=0.0)[None, :]
    scale = tl.load(grad_scale) if CLIP else 1.0
    key = tl.load(numbers + NOISE_KEY).to(tl.int32)
    total = tl.zeros([COLUMNS], tl.float32)
    total_sq = tl.zeros([COLUMNS], tl.float32)
    for first in range(group * rows_each, tl.minimum(group * rows_each + rows_each, n), ROWS):
        number = first + tl.arange(0, ROWS)
        own = number < n
        mask = own[:, None] & in_row[None, :]
        bit = number.to(tl.int64)[:, None] * m + along[None, :]
        at = square * n * m + bit
        grad = widened(tl.load(grads + at, mask=mask, other=0))
        if CLIP:
            grad = grad * scale
        if WHOLE_BYTES:
            byte_in_row = block * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            byte = number.to(tl.int64)[:, None] * (m // 8) + byte_in_row[None, :]
            in_bytes = own[:, None] & (byte_in_row < m // 8)[None, :]
            packed = tl.load(own_signs + byte, mask=in_bytes, other=0).to(tl.int32)
            positive = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [ROWS, COLUMNS])
        else:
            packed = tl.load(own_signs + bit // 8, mask=mask, other=0).to(tl.int32)
            positive = (packed >> (bit % 8).to(tl.int32)) & 1
        size = tl.load(row + square * n + number, mask=own, other=0.0)[:, None] * factor
        old = tl.where(positive != 0, size, -size)
        if MASK_ZEROS:
            old = tl.where(grad == 0, 0.0, old)
        exp_avg = tl.fma(grad, scalar(numbers, NEW_1), old * scalar(numbers, BETA_1))
        old_sq = tl.load(row_sq + square * n + number, mask=own, other=0.0)[:, None] * factor_sq
        exp_avg_sq = tl.fma(grad * grad, scalar(numbers, NEW_2), old_sq * scalar(numbers, BETA_2))
        update = -scalar(numbers, LR) * (exp_avg / (tl.sqrt(exp_avg_sq) + scalar(numbers, EPS)))
        update = tl.where(mask, update, 0.0)
        take(weights, comps, at, mask, scalar(numbers, DECAY), update, key, weights.dtype.element_ty, ROUNDING)

        if WHOLE_BYTES:
            flags = tl.reshape((exp_avg > 0).to(tl.int32), [ROWS, COLUMNS // 8, 8])
            packed = tl.sum(flags << tl.arange(0, 8)[None, None, :], 2)
            tl.store(own_signs + byte, packed.to(tl.uint8), mask=in_bytes)
        else:
            tl.store(positives + at, (exp_avg > 0).to(tl.uint8), mask=mask)
        # What is not finite counts as zero, as it concerns its own entry only.
        counts = mask & (exp_avg_sq < INFINITY)
        size = tl.where(counts, tl.abs(exp_avg), 0.0)
        squared = tl.where(counts, exp_avg_sq, 0.0)
        tl.store(row_sums + (square * n + number) * blocks + block, tl.sum(size, 1), mask=own)
        tl.store(row_sums_sq + (square * n + number) * blocks + block, tl.sum(squared, 1), mask=own)
        total += tl.sum(size, 0)
        total_sq += tl.sum(squared, 0)
    place = (square * groups + group) * m + along
    tl.store(col_sums + place, total, mask=in_row)
    tl.store(col_sums_sq + place, total_sq, mask=in_row)


@triton.jit
def pack(positives, signs, entries, BYTES: tl.constexpr):
    """Pack a byte for each entry of a square into its bits."""
    square, held = tl.program_id(1).to(tl.int64), (entries + 7) // 8
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    flags = tl.load(positives + square * entries + bit, mask=bit < entries, other=0).to(tl.int32)
    packed = tl.sum(flags << tl.arange(0, 8)[None, :], 1)
    tl.store(signs + square * held + byte, packed.to(tl.uint8), mask=byte < held)
