"""The Triton kernels of FAdam; `fadam.py` launches them, and the letters are those of `FAdam`.

A program takes a tile of one weight of a stack. It writes a partial sum, and those of a weight are added up in an
order that the shape alone decides, so a step is the same at every run.
"""

import triton
import triton.language as tl

from hf_lowmem.kernels.triton.codes import decoded
from hf_lowmem.kernels.triton.memory import (
    INFINITY,
    finite_and_scale,
    from_codes,
    reciprocal,
    scalar,
    to_codes,
    widened,
)
from hf_lowmem.kernels.triton.rounding import held, take

# The numbers of a step, float64. A mean of squares is over `entries` of a whole weight.
NUMBERS = ("lr", "decay", "new_1", "keep", "new_2", "eps", "clip_threshold", "entries", "noise_key")
LR = tl.constexpr(NUMBERS.index("lr"))
DECAY = tl.constexpr(NUMBERS.index("decay"))
NEW_1 = tl.constexpr(NUMBERS.index("new_1"))
KEEP = tl.constexpr(NUMBERS.index("keep"))
NEW_2 = tl.constexpr(NUMBERS.index("new_2"))
EPS = tl.constexpr(NUMBERS.index("eps"))
CLIP_THRESHOLD = tl.constexpr(NUMBERS.index("clip_threshold"))
ENTRIES = tl.constexpr(NUMBERS.index("entries"))
NOISE_KEY = tl.constexpr(NUMBERS.index("noise_key"))


@triton.jit
def tile_of(entries, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the offsets, mask, numbers of the blocks and their mask of a program's tile."""
    start = tl.program_id(1).to(tl.int64) * entries
    row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    within = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return start + within, within < entries, start // BLOCK + row, row * BLOCK < entries


@triton.jit
def grad_of(grads, grad_scale, tile, CLIP: tl.constexpr):
    grad = widened(tl.load(grads + tile[0], mask=tile[1], other=0))
    return grad * tl.load(grad_scale) if CLIP else grad


@triton.jit
def loaded(moment, scales, tile, SIGNED: tl.constexpr):
    """Return a tile of a moment as float32; unsigned codes stand for a root, whose square is returned."""
    if moment.dtype.element_ty != tl.uint8:
        return widened(tl.load(moment + tile[0], mask=tile[1], other=0))
    codes = tl.load(moment + tile[0], mask=tile[1], other=127 if SIGNED else 0)  # of zero
    values = decoded(tl.arange(0, 256), SIGNED)
    return from_codes(codes, values, tl.load(scales + tile[2], mask=tile[3], other=0.0), SIGNED)


@triton.jit
def store(moment, scales, tile, value, SIGNED: tl.constexpr):
    if moment.dtype.element_ty != tl.uint8:
        tl.store(moment + tile[0], value.to(moment.dtype.element_ty), mask=tile[1])
    else:
        value, scale = finite_and_scale(value)
        tl.store(scales + tile[2], scale, mask=tile[3])
        tl.store(moment + tile[0], to_codes(value, scale, SIGNED), mask=tile[1])


@triton.jit
def write_sum(sums, values):
    tl.store(sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(values, 1), 0))


@triton.jit
def finite_squares(value):
    """Return the squares; one that is not finite counts as zero, as it concerns its own entry only."""
    square = value * value
    return tl.where(square < INFINITY, square, 0.0)


@triton.jit
def rms_of(sums, numbers):
    return tl.sqrt(tl.load(sums + tl.program_id(1)) / scalar(numbers, ENTRIES))


@triton.jit
def clipping_of(sums, numbers):
    """Return what a quotient is multiplied by so that its root mean square is not above the threshold."""
    return 1.0 / tl.maximum(rms_of(sums, numbers) / scalar(numbers, CLIP_THRESHOLD), 1.0)


@triton.jit
def fisher_of(held_fim, grad, energies, numbers):
    """Return the new f, 1 / d, and 1.0 if the weight has a gradient, or else 0.0."""
    fim = tl.fma(grad * grad, scalar(numbers, NEW_2), held_fim * scalar(numbers, KEEP))
    rms = rms_of(energies, numbers)
    eps = tl.maximum(scalar(numbers, EPS) * tl.minimum(rms, 1.0), 1e-30)
    return fim, reciprocal(tl.sqrt(fim) + eps), tl.where(rms > 0, 1.0, 0.0)


@triton.jit
def decays_by(fim, MASK_DECAY: tl.constexpr):
    """Return which entries the Fisher information lets decay."""
    return (fim < INFINITY) & (fim > 0) if MASK_DECAY else fim < INFINITY


@triton.jit
def sum_gradient(grads, grad_scale, sums, entries, CLIP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the partial sums of g^2."""
    write_sum(sums, finite_squares(grad_of(grads, grad_scale, tile_of(entries, BLOCKS, BLOCK), CLIP)))


@triton.jit
def sum_quotients(
    weights,
    comps,
    grads,
    grad_scale,
    fims,
    fim_scales,
    numbers,
    energies,
    natural_sums,
    decay_sums,
    entries,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
    DECAYS: tl.constexpr,
    MASK_DECAY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the partial sums of n^2 and, if the weight decays, of r^2, by the sum of g^2."""
    tile = tile_of(entries, BLOCKS, BLOCK)
    grad = grad_of(grads, grad_scale, tile, CLIP)
    fim, inverse, has_grad = fisher_of(loaded(fims, fim_scales, tile, False), grad, energies, numbers)
    write_sum(natural_sums, finite_squares(grad * inverse))
    if DECAYS:
        param = held(weights, comps, tile[0], tile[1], weights.dtype.element_ty, ROUNDING)
        decays = (tl.abs(param) < INFINITY) & decays_by(fim, MASK_DECAY)
        shrunk = tl.where(decays, param * inverse, 0.0) * has_grad
        write_sum(decay_sums, shrunk * shrunk)


@triton.jit
def update(
    weights,
    comps,
    grads,
    grad_scale,
    fims,
    fim_scales,
    averages,
    average_scales,
    numbers,
    energies,
    natural_sums,
    decay_sums,
    entries,
    ROUNDING: tl.constexpr,
    CLIP: tl.constexpr,
    DECAYS: tl.constexpr,
    MASK_DECAY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write weight and moments, by all sums."""
    tile = tile_of(entries, BLOCKS, BLOCK)
    grad = grad_of(grads, grad_scale, tile, CLIP)
    fim, inverse, has_grad = fisher_of(loaded(fims, fim_scales, tile, False), grad, energies, numbers)
    store(fims, fim_scales, tile, tl.sqrt(fim) if fims.dtype.element_ty == tl.uint8 else fim, False)
    exp_avg = loaded(averages, average_scales, tile, True)
    natural = grad * inverse * clipping_of(natural_sums, numbers)
    exp_avg = tl.fma(natural - exp_avg, scalar(numbers, NEW_1), exp_avg)
    store(averages, average_scales, tile, exp_avg, True)
    shrink = tl.full(exp_avg.shape, 1.0, tl.float32)
    if DECAYS:
        factor = scalar(numbers, DECAY) * clipping_of(decay_sums, numbers) * has_grad
        shrink = tl.where(decays_by(fim, MASK_DECAY), 1.0 - factor * inverse, 1.0)
    key = tl.load(numbers + NOISE_KEY).to(tl.int32)
    step = -scalar(numbers, LR) * exp_avg
    take(weights, comps, tile[0], tile[1], shrink, step, key, weights.dtype.element_ty, ROUNDING)
