"""The Triton kernels of MicroAdam, over a part of a weight that is whole blocks and whole buckets.

A product and a sum are rounded apart, as torch rounds them: launch them without fusion.
"""

import triton
import triton.language as tl

from hf_lowmem.kernels.triton.memory import widened
from hf_lowmem.kernels.triton.rounding import take
from hf_lowmem.moments import top_k_window

LEVELS = tl.constexpr(top_k_window.LEVELS)
LARGEST = tl.constexpr(top_k_window.LARGEST)
MANY = tl.constexpr(1024)  # columns of a row that a program adds up at a time


@triton.jit
def error_of(codes, lows, highs, at, mask, BUCKET: tl.constexpr):
    """Return the error of entries of the part."""
    packed = tl.load(codes + at // 2, mask=mask, other=0)
    code = tl.where(at % 2 == 0, packed >> 4, packed & 15).to(tl.float32)
    low = tl.load(lows + at // BUCKET, mask=mask, other=0).to(tl.float32)
    high = tl.load(highs + at // BUCKET, mask=mask, other=0).to(tl.float32)
    return code * tl.div_rn(high - low, LEVELS * 1.0) + low


@triton.jit
def accumulate(
    grads, grad_scale, codes, lows, highs, sums, entries, CLIP: tl.constexpr, BUCKET: tl.constexpr, SIZE: tl.constexpr
):
    """Add the error to the gradient, in the dtype of `sums`."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < entries
    grad = widened(tl.load(grads + at, mask=mask, other=0))
    if CLIP:
        grad *= tl.load(grad_scale)
    error = error_of(codes, lows, highs, at, mask, BUCKET)
    dtype = sums.dtype.element_ty
    tl.store(sums + at, grad.to(dtype).to(tl.float32) + error.to(dtype).to(tl.float32), mask=mask)


@triton.jit
def encode(errors, codes, lows, highs, entries, BUCKET: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Store the error of ROWS buckets, of which WIDTH, a power of two, is at least half the entries."""
    bucket = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, WIDTH)[None, :]
    first = bucket[:, None] * BUCKET + 2 * pair
    has_first = (2 * pair < BUCKET) & (first < entries)
    has_second = (2 * pair + 1 < BUCKET) & (first + 1 < entries)
    one = tl.load(errors + first, mask=has_first, other=0).to(tl.float32)
    two = tl.load(errors + first + 1, mask=has_second, other=0).to(tl.float32)
    one = tl.where(tl.abs(one) <= LARGEST, one, 0.0)
    two = tl.where(tl.abs(two) <= LARGEST, two, 0.0)
    infinity = float("inf")
    low = tl.minimum(tl.min(tl.where(has_first, one, infinity), 1), tl.min(tl.where(has_second, two, infinity), 1)).to(
        lows.dtype.element_ty
    )
    high = tl.maximum(
        tl.max(tl.where(has_first, one, -infinity), 1), tl.max(tl.where(has_second, two, -infinity), 1)
    ).to(lows.dtype.element_ty)
    held = bucket * BUCKET < entries
    tl.store(lows + bucket, low, mask=held)
    tl.store(highs + bucket, high, mask=held)
    least = low.to(tl.float32)[:, None]
    unit = tl.div_rn(high.to(tl.float32) - low.to(tl.float32), LEVELS * 1.0)[:, None]
    packed = nearest(one, least, unit) << 4
    packed |= tl.where(has_second, nearest(two, least, unit), 0)
    tl.store(codes + first // 2, packed.to(tl.uint8), mask=has_first)


@triton.jit
def nearest(value, low, unit):
    """Return the number of the level that is nearest to each value."""
    level = tl.div_rn(value - low, tl.where(unit > 0, unit, 1.0)) + 0.5
    level = tl.minimum(tl.maximum(tl.floor(level), 0.0), LEVELS * 1.0)
    return tl.where(unit > 0, level, 0.0).to(tl.int32)


@triton.jit
def add_window(index, values, powers, first, second, stride, columns, length, kept, block_size):
    """Add the window's gradients of one block to the sums of both moments, a row after the other."""
    block = tl.program_id(0)
    for row in range(length):
        first_power, second_power = tl.load(powers + row), tl.load(powers + length + row)
        for start in range(0, kept, MANY):
            of_block = start + tl.arange(0, MANY)
            column = block * kept + of_block
            mask = (of_block < kept) & (column < columns)
            at = block * block_size + tl.load(index + row * stride + column, mask=mask, other=0).to(tl.int32)
            value = tl.load(values + row * stride + column, mask=mask, other=0).to(tl.float32)
            tl.store(first + at, tl.load(first + at, mask=mask) + value * first_power, mask=mask)
            tl.store(second + at, tl.load(second + at, mask=mask) + value * second_power * value, mask=mask)
        tl.debug_barrier()  # another thread may add the next row's entry at the same place


@triton.jit(do_not_specialize=["key", "start"])
def update(
    weights, comps, grads, first, second, codes, lows, highs, entries, start,
    decay, lr, eps, first_correction, second_correction, alpha, key,
    FOLLOWS: tl.constexpr, ALPHA: tl.constexpr, BUCKET: tl.constexpr, ROUNDING: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Step the weights by the sums of both moments; `start` is the part's place in the weight."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < entries
    dtype = weights.dtype.element_ty
    root = tl.sqrt_rn(tl.load(second + at, mask=mask, other=0) * second_correction)
    step = tl.div_rn(tl.load(first + at, mask=mask, other=0) * first_correction, root + eps)
    step += widened(tl.load(grads + at, mask=mask, other=0)) * 0.0  # NaN where the gradient is not finite
    if FOLLOWS:
        step = step.to(dtype).to(tl.float32)
    if ALPHA:
        error = error_of(codes, lows, highs, at, mask, BUCKET) * alpha
        step += error.to(dtype).to(tl.float32) if FOLLOWS else error
    if FOLLOWS:
        step = step.to(dtype).to(tl.float32)
        decayed = (tl.load(weights + start + at, mask=mask, other=0).to(tl.float32) * decay).to(dtype)
        tl.store(weights + start + at, (decayed.to(tl.float32) - step * lr).to(dtype), mask=mask)
    else:
        take(weights, comps, start + at, mask, decay, step * -lr, key, dtype, ROUNDING)


@triton.jit
def shrink(codes, lows, highs, errors, share, entries, BUCKET: tl.constexpr, SIZE: tl.constexpr):
    """Return `share` of the error in `errors`, in their dtype."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < entries
    tl.store(errors + at, error_of(codes, lows, highs, at, mask, BUCKET) * share, mask=mask)
