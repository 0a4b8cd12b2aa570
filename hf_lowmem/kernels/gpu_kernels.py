"""The Triton kernels that `gpu.py` launches: AdamW with a full second moment or one number per group, and Signum.

One launch steps many parts of weights; `Part` says where each is. A program steps a tile of lines: a line is some
consecutive entries of one row, an 8-bit block where the moments are codes. `Variant` says what is compiled, and has
no number that changes from step to step. A mean's squares are added in an order that its shape and the tiles of
`tuning.py` decide, so a step is the same at every run.
"""

import torch
import triton
import triton.language as tl

from hf_lowmem import rounding
from hf_lowmem.codecs.dynamic_map import DECADES
from hf_lowmem.kernels.gpu import Part, Scalar

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

(PARAM, GRAD, KAHAN_COMP, EXP_AVG, _, EXP_AVG_SQ, _, FIRST_TILE, CHUNKS, FIRST_SUM, SUMS, FIRST_CELL, CELLS,
 GROUPS, INNER_GROUPS, OUTER_GROUP_STRIDE, INNER_GROUP_STRIDE, ROWS, INNER_ROWS, OUTER_ROW_STRIDE, INNER_ROW_STRIDE,
 COLUMNS, _, START) = map(tl.constexpr, range(len(Part._fields)))  # fmt: skip
ABSMAX = tl.constexpr(1)  # after the codes
FIELDS, SCALARS = tl.constexpr(len(Part._fields)), tl.constexpr(len(Scalar._fields))
DECAY, STEP_SIZE, EPS, NEW_1, BETA_2, NEW_2, NOISE_KEY = map(tl.constexpr, range(len(Scalar._fields)))

SIGNED_TO_VALUE, UNSIGNED_TO_VALUE = tl.constexpr(DECADES[True]), tl.constexpr(DECADES[False])
# The inverse lines, a little high: the last takes 1 to just past the middle between its code and the one before.
ABOVE = 2.0**-14
SIGNED_TO_COUNT = tl.constexpr(tuple((1 / slope, ABOVE - shift / slope) for slope, shift in DECADES[True]))
UNSIGNED_TO_COUNT = tl.constexpr(tuple((1 / slope, ABOVE - 1 - shift / slope) for slope, shift in DECADES[False]))
WEYL, MIX_1, MIX_2 = (tl.constexpr(n) for n in (rounding.WEYL, rounding.MIX_1, rounding.MIX_2))
SIGN_BIT = tl.constexpr(-(2**31))
INFINITY = tl.constexpr(float("inf"))
TINY = tl.constexpr(2.0**-126)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding it leaves no fraction, and an integer in the low bits
PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)  # whether it can be written


# ---------------------------------------------------------------------------------------------------- the 8-bit map


@triton.jit
def decoded(codes, SIGNED: tl.constexpr):
    """float32 values of codes (any integer tensor), as `dynamic_map.decode_lines`."""
    count = codes.to(tl.float32) + (-127.0 if SIGNED else 1.0)
    magnitude = tl.abs(count)
    value = tl.zeros_like(magnitude)
    for e in tl.static_range(7):
        if SIGNED:
            value = tl.maximum(value, tl.fma(magnitude, SIGNED_TO_VALUE[e][0], SIGNED_TO_VALUE[e][1]))
        else:
            value = tl.maximum(value, tl.fma(magnitude, UNSIGNED_TO_VALUE[e][0], UNSIGNED_TO_VALUE[e][1]))
    value = tl.minimum(value, 1.0)
    return tl.where(count < 0, -value, value)


@triton.jit
def encoded(x, SIGNED: tl.constexpr):
    """uint8 codes of x in [-1, 1]: the minimum of the lines that the decades lie on.

    Those are 7 lines instead of the 17 or 19 of `dynamic_map.encode_lines`. Every code's value gets that code, and any
    other number the nearest code or, where two decades meet and just below 1, one beside it: the rms error is 1.006
    (signed) or 1.003 times the nearest code's for Gaussian blocks of 256, and 1.021 or 1.012 times for log-normal ones
    (sigma 2).
    """
    magnitude = tl.abs(x)
    LINES: tl.constexpr = SIGNED_TO_COUNT if SIGNED else UNSIGNED_TO_COUNT
    count = tl.fma(magnitude, LINES[0][0], LINES[0][1])
    for e in tl.static_range(1, 7):
        count = tl.minimum(count, tl.fma(magnitude, LINES[e][0], LINES[e][1]))
    if SIGNED:
        sign = x.to(tl.int32, bitcast=True) & SIGN_BIT
        count = (count.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        count = tl.maximum(count, -127.0)
    return (count + (ROUNDER + (127.0 if SIGNED else 0.0))).to(tl.int32, bitcast=True).to(tl.uint8)


# ------------------------------------------------------------------------------------------------ numbers as stored


@triton.jit
def pointer(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(part + FIELD).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def widened(x):
    """float32 of a narrow float; of bfloat16 by a shift, for which the compiler takes up to two instructions."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def as_index(codes):
    """int32 of codes; the move costs nothing, but keeps the compiler from a 16-bit product that has to be masked."""
    index = codes.to(tl.int32)
    if PTX:
        index = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], tl.int32, is_pure=True, pack=1)
    return index


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, where a quotient takes six; an x below the normal floats counts as zero."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def loaded(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, tile, SIGNED: tl.constexpr, v: tl.constexpr):
    """A tile of a full moment as float32; of codes with `SIGNED=False`, the square of what they stand for."""
    at, inside, line, some = tile
    CODE_OF_ZERO: tl.constexpr = 127 if SIGNED else 0
    if DTYPE != tl.uint8:
        return widened(tl.load(pointer(part, FIELD, DTYPE, v.align) + at, mask=inside, other=0))
    # What is past the end of a row must not count in the scale that is stored.
    found = tl.load(pointer(part, FIELD, DTYPE, v.align) + at, mask=inside, other=CODE_OF_ZERO)
    # The lines are cheaper for 256 codes than for all entries, which then look theirs up in shared memory.
    values = decoded(tl.arange(0, 256), SIGNED)
    scale = tl.load(pointer(part, FIELD + ABSMAX, tl.float32, 4) + line, mask=some, other=0.0)
    if not SIGNED:
        values, scale = values * values, scale * scale
    values = tl.gather(values, tl.reshape(as_index(found), [at.numel]), 0)
    return tl.reshape(values, at.shape) * scale[:, None]


@triton.jit
def store(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, tile, value, SIGNED: tl.constexpr, v: tl.constexpr):
    """Write what `loaded` gave. Of codes, NaN and Inf become zero, so that they never reach their line's scale."""
    at, inside, line, some = tile
    if DTYPE != tl.uint8:
        tl.store(pointer(part, FIELD, DTYPE, v.align) + at, value.to(DTYPE), mask=inside)
    else:
        value = tl.where(tl.abs(value) < INFINITY, value, 0.0)
        scale = tl.max(tl.abs(value), 1)
        tl.store(pointer(part, FIELD + ABSMAX, tl.float32, 4) + line, scale, mask=some)
        codes = encoded(value * (1.0 / tl.maximum(scale, TINY))[:, None], SIGNED)
        tl.store(pointer(part, FIELD, DTYPE, v.align) + at, codes.to(tl.uint8), mask=inside)


@triton.jit
def last_place(value, WEIGHT: tl.constexpr):
    """As `rounding.last_place`."""
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(
        power * (2.0**-7 if WEIGHT == tl.bfloat16 else 2.0**-10), TINY if WEIGHT == tl.bfloat16 else 2.0**-24
    )


@triton.jit
def inverse(power):
    """1 / power of a power of two, exact, by its exponent."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rounded_at_random(value, at, key, WEIGHT: tl.constexpr):
    """`value` on the grid of WEIGHT's dtype, by the noise of `rounding.hashed`."""
    BITS: tl.constexpr = 16 if WEIGHT == tl.bfloat16 else 13
    x = at.to(tl.uint32) * WEYL + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 15)) * MIX_2
    noise = (x >> (32 - BITS)).to(tl.float32)
    unit = last_place(value, WEIGHT)
    units = tl.floor(tl.fma(noise, 2.0**-BITS, tl.abs(value) * inverse(unit))) * unit
    return tl.where(tl.abs(value) < INFINITY, tl.where(value < 0, -units, units), value)


# --------------------------------------------------------------------------------------------------------- the step


@triton.jit
def tile_of(part, cell, chunk, v: tl.constexpr):
    """A tile's places in the weight and which of them are its own, (lines, line), then the same of its lines.

    A cell is what shares its means: a group, or `line` columns of one. Its lines are cut into chunks of `lines`; where
    a tile holds several groups, those are a cell.
    """
    rows, columns = tl.load(part + ROWS).to(tl.int32), size(part, COLUMNS, v.align)
    across = ((columns + (v.line - 1)) // v.line).to(tl.int32)
    LINES: tl.constexpr = v.lines // v.groups
    number = chunk * LINES + tl.arange(0, v.lines) % LINES
    if v.second == "column":
        group, row, column = cell // across, number, tl.full([v.lines], 0, tl.int32) + cell % across
    elif v.nest == 0:
        group, row, column = cell * v.groups, tl.full([v.lines], 0, tl.int32), number
    else:
        group, row, column = cell * v.groups, number // across, number % across
    begin = tl.full([v.lines], 0, tl.int64) + size(part, START, v.align)
    if v.groups > 1:  # the groups of a tile are evenly spaced
        group += tl.arange(0, v.lines) // LINES
        row = tl.where(group < tl.load(part + GROUPS), row, rows)
        begin += group * size(part, INNER_GROUP_STRIDE, v.align)
    else:
        inner = tl.load(part + INNER_GROUPS).to(tl.int32)
        begin += (group // inner) * size(part, OUTER_GROUP_STRIDE, v.align)
        begin += (group % inner) * size(part, INNER_GROUP_STRIDE, v.align)
    if v.nest == 1:
        begin += row * size(part, INNER_ROW_STRIDE, v.align)
    elif v.nest == 2:
        inner = tl.load(part + INNER_ROWS).to(tl.int32)
        begin += (row // inner) * size(part, OUTER_ROW_STRIDE, v.align)
        begin += (row % inner) * size(part, INNER_ROW_STRIDE, v.align)
    left = tl.minimum(columns - column.to(tl.int64) * v.line, v.line).to(tl.int32)
    left = tl.multiple_of(tl.where(row < rows, left, 0), v.align)
    along = tl.arange(0, v.line)[None, :]
    if v.ragged:
        line = begin // columns * across + column
        begin += column.to(tl.int64) * v.line
    else:
        begin += column.to(tl.int64) * v.line
        line = begin // v.line
    return begin[:, None] + along, along < left[:, None], line, left > 0


@triton.jit
def size(part, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(part + FIELD), ALIGN)


@triton.jit
def squares(grad):
    """A square that is not finite counts as zero: it concerns its own entry only."""
    square = grad * grad
    return tl.where(square < INFINITY, square, 0.0)


@triton.jit
def scalar(scalars, INDEX: tl.constexpr):
    return tl.load(scalars + INDEX).to(tl.float32)


@triton.jit
def scale_of(grad_scale, v: tl.constexpr):
    """What clipping multiplies each gradient by."""
    return tl.load(grad_scale) if v.clip else 1.0


@triton.jit
def averaged(part, scalars, mean, total, v: tl.constexpr):
    """The new means, of the old ones and the sums of squares."""
    count = tl.load(part + ROWS)
    if v.second == "group":
        count *= tl.load(part + COLUMNS)
    return scalar(scalars, BETA_2) * mean + scalar(scalars, NEW_2) / count.to(tl.float32) * total


@triton.jit
def means_of(part):
    return tl.load(part + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))


@triton.jit
def grad_of(part, tile, scale, v: tl.constexpr):
    grad = widened(tl.load(pointer(part, GRAD, v.weight, v.align) + tile[0], mask=tile[1], other=0))
    return grad * scale if v.clip else grad


@triton.jit
def step_tile(part, scalars, tile, grad, root, v: tl.constexpr):
    """param <- decay * param - step_size * exp_avg / (sqrt(exp_avg_sq) + eps); of means, `root` is the square root."""
    if v.second == "full":
        CODES: tl.constexpr = tl.uint8 if v.moment == tl.uint8 else tl.float32
        exp_avg_sq = loaded(part, EXP_AVG_SQ, CODES, tile, False, v)
        exp_avg_sq = tl.fma(grad * grad, scalar(scalars, NEW_2), exp_avg_sq * scalar(scalars, BETA_2))
        root = tl.sqrt(exp_avg_sq)
        store(part, EXP_AVG_SQ, CODES, tile, root if CODES == tl.uint8 else exp_avg_sq, False, v)
    exp_avg = loaded(part, EXP_AVG, v.moment, tile, True, v)
    exp_avg = tl.fma(grad - exp_avg, scalar(scalars, NEW_1), exp_avg)
    if v.second == "none":
        update = ((exp_avg > 0).to(tl.float32) - (exp_avg < 0).to(tl.float32)) * scalar(scalars, STEP_SIZE)
    else:
        update = exp_avg * (scalar(scalars, STEP_SIZE) * reciprocal(root + scalar(scalars, EPS)))
    store(part, EXP_AVG, v.moment, tile, exp_avg, True, v)

    weights, comps = pointer(part, PARAM, v.weight, v.align), pointer(part, KAHAN_COMP, tl.int16, v.align)
    key = tl.load(scalars + NOISE_KEY).to(tl.int32)
    take(weights, comps, tile[0], tile[1], scalar(scalars, DECAY), -update, key, v.weight, v.rounding)


@triton.jit
def take(weights, comps, at, inside, decay, update, key, WEIGHT: tl.constexpr, ROUNDING: tl.constexpr):
    """param <- decay * param + update, rounded as `rounding.StoredWeight` does."""
    param = widened(tl.load(weights + at, mask=inside, other=0))
    if ROUNDING == "kahan":
        fraction = tl.load(comps + at, mask=inside, other=0).to(tl.float32) * 2.0**-16
        param = tl.fma(last_place(param, WEIGHT), fraction, param)
    param = tl.fma(param, decay, update)
    if ROUNDING == "stochastic":
        param = rounded_at_random(param, at, key, WEIGHT)
    narrow = param.to(WEIGHT)
    tl.store(weights + at, narrow, mask=inside)
    if ROUNDING == "kahan":
        held = narrow.to(tl.float32)
        fraction = (param - held) * inverse(last_place(held, WEIGHT)) * 2.0**16
        fraction = tl.minimum(tl.maximum(fraction, -(2.0**15)), 2.0**15 - 1)
        tl.store(comps + at, (fraction + ROUNDER - ROUNDER).to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["key"])
def add(weights, comps, updates, decays, scale, key, entries, ROUNDING: tl.constexpr, TILE: tl.constexpr):
    """param <- decay * param + scale * update, for matrices of `entries` entries that have a decay each."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < entries
    at += tl.program_id(1).to(tl.int64) * entries
    update = scale * tl.load(updates + at, mask=inside, other=0.0)
    decay = tl.load(decays + tl.program_id(1))
    take(weights, comps, at, inside, decay, update, key, weights.dtype.element_ty, ROUNDING)


@triton.jit
def step(parts, all_scalars, grad_scale, owners, v: tl.constexpr):
    """Step a tile, or where the means are found by "loop" a group, of the part that `owners` names for the program."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    part, scalars = parts + owner * FIELDS, all_scalars + owner * SCALARS
    number = tl.program_id(0) - tl.load(part + FIRST_TILE).to(tl.int32)
    chunks, scale = tl.load(part + CHUNKS).to(tl.int32), scale_of(grad_scale, v)
    if v.means == "none":
        tile = tile_of(part, 0, number, v)
        step_tile(part, scalars, tile, grad_of(part, tile, scale, v), 0.0, v)
    elif v.means == "before":
        cell, chunk = cell_of(part, number, chunks, v)
        tile = tile_of(part, cell, chunk, v)
        if v.second == "column":
            where, own = columns_of(part, cell, v)
            root = tl.sqrt(tl.load(means_of(part) + where, mask=own, other=0.0))[None, :]
        else:
            root = tl.sqrt(tl.load(means_of(part) + cell))
        step_tile(part, scalars, tile, grad_of(part, tile, scale, v), root, v)
    else:
        groups = number * v.groups
        if v.groups > 1:
            groups += tl.arange(0, v.groups)
        means, own = means_of(part) + groups, groups < tl.load(part + GROUPS)
        mean = tl.load(means, mask=own, other=0.0)  # before the sum, whose barrier keeps the store from overtaking it
        if v.means == "tile":
            tile = tile_of(part, number, 0, v)
            grad = grad_of(part, tile, scale, v)
            total = squares(grad)
        else:
            total = tl.zeros([v.lines, v.line], tl.float32)
            for chunk in range(chunks):
                total += squares(grad_of(part, tile_of(part, number, chunk, v), scale, v))
        if v.groups > 1:
            total = tl.reshape(total, [v.groups, v.lines // v.groups * v.line])
            mean = averaged(part, scalars, mean, tl.sum(total, 1), v)
            root = tl.broadcast_to(tl.sqrt(mean)[:, None], [v.groups, v.lines // v.groups])
            root = tl.reshape(root, [v.lines, 1])
        else:
            mean = averaged(part, scalars, mean, tl.sum(total), v)
            root = tl.sqrt(mean)
        tl.store(means, mean, mask=own)
        if v.means == "tile":
            step_tile(part, scalars, tile, grad, root, v)
        else:
            for chunk in range(chunks):
                tile = tile_of(part, number, chunk, v)
                step_tile(part, scalars, tile, grad_of(part, tile, scale, v), root, v)


@triton.jit
def cell_of(part, number, count, v: tl.constexpr):
    """The cell of a program, and which of the cell's `count` programs it is.

    Consecutive programs read what lies side by side: the next lines of a group or, for columns, the columns beside
    them.
    """
    if v.second == "column":
        cells = tl.load(part + CELLS).to(tl.int32)
        return number % cells, number // cells
    else:
        return number // count, number % count


@triton.jit
def columns_of(part, cell, v: tl.constexpr):
    """The places of a cell's means, one per column, and which of them are its own."""
    columns = tl.load(part + COLUMNS).to(tl.int32)
    across = tl.cdiv(columns, v.line)
    column = cell % across * v.line + tl.arange(0, v.line)
    return (cell // across).to(tl.int64) * columns + column, column < columns


@triton.jit
def sum_squares(parts, sums, totals, owners, TOTALS: tl.constexpr, v: tl.constexpr):
    """The sum of squares, or the sums per column, of some chunks of a cell; `totals` have those not finite in them."""
    part = parts + tl.load(owners + tl.program_id(0)).to(tl.int64) * FIELDS
    first, count = tl.load(part + FIRST_SUM), tl.load(part + SUMS).to(tl.int32)
    cell, number = cell_of(part, tl.program_id(0) - first.to(tl.int32), count, v)
    total = tl.zeros([v.lines, v.line], tl.float32)
    every = tl.zeros([v.lines, v.line], tl.float32)
    chunks = tl.load(part + CHUNKS).to(tl.int32)
    span = tl.cdiv(chunks, count)
    for chunk in range(number * span, tl.minimum(number * span + span, chunks)):
        grad = grad_of(part, tile_of(part, cell, chunk, v), 1.0, v)
        total += squares(grad)
        if TOTALS:
            every += grad * grad
    place = first + cell * count + number
    if TOTALS:
        tl.store(totals + place, tl.sum(tl.sum(every, 1), 0))
    if v.second == "column":
        tl.store(sums + place * v.line + tl.arange(0, v.line), tl.sum(total, 0))
    else:
        tl.store(sums + place, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def combine(parts, all_scalars, grad_scale, sums, owners, v: tl.constexpr):
    """Average into the means of a cell what `sum_squares` has found of it; for one warp, so that no barrier is needed
    between loading and storing them."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    part = parts + owner * FIELDS
    cell = tl.program_id(0) - tl.load(part + FIRST_CELL).to(tl.int32)
    WIDTH: tl.constexpr = v.line if v.second == "column" else 1
    if v.second == "column":
        where, own = columns_of(part, cell, v)
    else:
        where, own = cell + tl.arange(0, 1), tl.full([1], True, tl.int1)
    mean = tl.load(means_of(part) + where, mask=own, other=0.0)
    count = tl.load(part + SUMS).to(tl.int32)
    first = tl.load(part + FIRST_SUM) + cell * count
    total = tl.zeros([4, WIDTH], tl.float32)
    for number in range(0, count, 4):
        each = number + tl.arange(0, 4)[:, None]
        total += tl.load(sums + (first + each) * WIDTH + tl.arange(0, WIDTH)[None, :], mask=each < count, other=0.0)
    summed = tl.sum(total, 0)
    if v.clip:
        scale = scale_of(grad_scale, v)
        summed *= scale * scale
        summed = tl.where(summed < INFINITY, summed, 0.0)  # a norm that is not finite leaves no finite square
    mean = averaged(part, all_scalars + owner * SCALARS, mean, summed, v)
    tl.store(means_of(part) + where, mean, mask=own)


@triton.jit(do_not_specialize=["first", "last"])
def write_grads(parts, first, last, grads):
    """The addresses of some gradients, each plus one, into their rows from row `first`; those too many are the last"""
    for number in tl.static_range(len(grads)):
        tl.store(parts + tl.minimum(first + number, last) * FIELDS + GRAD, grads[number] - 1)
