"""How the Triton kernels address and read what a launch's table points to: tiles of weights, gradients and moments.

A tile has (blocks, block) entries. A block is a run of consecutive entries of one row, and an 8-bit block where the
moments are codes.
"""

import torch
import triton
import triton.language as tl

from hf_lowmem.kernels.columns import SCALARS as SCALAR_NAMES
from hf_lowmem.kernels.columns import TRITON_PART
from hf_lowmem.kernels.triton.codes import decoded, encoded

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

# The columns of a launch's table.
PARAM = tl.constexpr(TRITON_PART.index("param"))
GRAD = tl.constexpr(TRITON_PART.index("grad"))
KAHAN_COMP = tl.constexpr(TRITON_PART.index("kahan_comp"))
EXP_AVG = tl.constexpr(TRITON_PART.index("exp_avg"))
EXP_AVG_SQ = tl.constexpr(TRITON_PART.index("exp_avg_sq"))
EXP_AVG_SQ_ROWS = tl.constexpr(TRITON_PART.index("exp_avg_sq_rows"))
FIRST_TILE = tl.constexpr(TRITON_PART.index("first_tile"))
TILES = tl.constexpr(TRITON_PART.index("tiles"))
FIRST_SUM = tl.constexpr(TRITON_PART.index("first_sum"))
SUMS = tl.constexpr(TRITON_PART.index("sums"))
FIRST_REDUCTION = tl.constexpr(TRITON_PART.index("first_reduction"))
REDUCTIONS = tl.constexpr(TRITON_PART.index("reductions"))
FIRST_ROW_SUM = tl.constexpr(TRITON_PART.index("first_row_sum"))
FIRST_GROUP = tl.constexpr(TRITON_PART.index("first_group"))
GROUPS = tl.constexpr(TRITON_PART.index("groups"))
INNER_GROUPS = tl.constexpr(TRITON_PART.index("inner_groups"))
OUTER_GROUP_STRIDE = tl.constexpr(TRITON_PART.index("outer_group_stride"))
INNER_GROUP_STRIDE = tl.constexpr(TRITON_PART.index("inner_group_stride"))
ROWS = tl.constexpr(TRITON_PART.index("rows"))
INNER_ROWS = tl.constexpr(TRITON_PART.index("inner_rows"))
OUTER_ROW_STRIDE = tl.constexpr(TRITON_PART.index("outer_row_stride"))
INNER_ROW_STRIDE = tl.constexpr(TRITON_PART.index("inner_row_stride"))
COLUMNS = tl.constexpr(TRITON_PART.index("columns"))
START = tl.constexpr(TRITON_PART.index("start"))
WEIGHT = tl.constexpr(TRITON_PART.index("weight"))
ABSMAX = tl.constexpr(1)  # the column of the scales comes after that of the codes
FIELDS = tl.constexpr(len(TRITON_PART))

# The columns of the table of scalars.
DECAY = tl.constexpr(SCALAR_NAMES.index("decay"))
STEP_SIZE = tl.constexpr(SCALAR_NAMES.index("step_size"))
EPS = tl.constexpr(SCALAR_NAMES.index("eps"))
MOMENTUM = tl.constexpr(SCALAR_NAMES.index("momentum"))
NEW_1 = tl.constexpr(SCALAR_NAMES.index("new_1"))
BETA_2 = tl.constexpr(SCALAR_NAMES.index("beta2"))
NEW_2 = tl.constexpr(SCALAR_NAMES.index("new_2"))
NOISE_KEY = tl.constexpr(SCALAR_NAMES.index("noise_key"))
SCALARS = tl.constexpr(len(SCALAR_NAMES))

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
TINY = tl.constexpr(2.0**-126)
PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)  # whether it can be written


@triton.jit
def pointer(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(part + FIELD).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def size(part, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(part + FIELD), ALIGN)


@triton.jit
def scalar(scalars, INDEX: tl.constexpr):
    return tl.load(scalars + INDEX).to(tl.float32)


@triton.jit
def widened(x):
    """Return a narrow float as float32; a bfloat16 by a shift, for which the compiler takes up to two instructions."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def as_index(codes):
    """Return codes as int32; the move costs nothing, but it keeps the compiler from a 16-bit product with a mask."""
    index = codes.to(tl.int32)
    if PTX:
        index = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], tl.int32, is_pure=True, pack=1)
    return index


@triton.jit
def reciprocal(x):
    """Return 1 / x in one instruction, where a quotient takes six; an x below the normal floats counts as zero."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def loaded(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, tile, SIGNED: tl.constexpr, v: tl.constexpr):
    """Return a tile of a full moment as float32; unsigned codes stand for a root, whose square is returned."""
    at, mask, block, block_mask = tile
    CODE_OF_ZERO: tl.constexpr = 127 if SIGNED else 0
    if DTYPE != tl.uint8:
        return widened(tl.load(pointer(part, FIELD, DTYPE, v.align) + at, mask=mask, other=0))
    # An entry past the end of a row must not count in the scale that is stored.
    found = tl.load(pointer(part, FIELD, DTYPE, v.align) + at, mask=mask, other=CODE_OF_ZERO)
    # The lines are cheaper for 256 codes than for all entries, which then look theirs up in shared memory.
    values = decoded(tl.arange(0, 256), SIGNED)
    scale = tl.load(pointer(part, FIELD + ABSMAX, tl.float32, 4) + block, mask=block_mask, other=0.0)
    return from_codes(found, values, scale, SIGNED)


@triton.jit
def store(part, FIELD: tl.constexpr, DTYPE: tl.constexpr, tile, value, SIGNED: tl.constexpr, v: tl.constexpr):
    """Write what `loaded` gave; as codes, NaN and Inf become zero, so that they never reach their block's absmax."""
    at, mask, block, block_mask = tile
    if DTYPE != tl.uint8:
        tl.store(pointer(part, FIELD, DTYPE, v.align) + at, value.to(DTYPE), mask=mask)
    else:
        value, scale = finite_and_scale(value)
        tl.store(pointer(part, FIELD + ABSMAX, tl.float32, 4) + block, scale, mask=block_mask)
        tl.store(pointer(part, FIELD, DTYPE, v.align) + at, to_codes(value, scale, SIGNED), mask=mask)


@triton.jit
def from_codes(codes, values, scale, SIGNED: tl.constexpr):
    """Return a tile of codes as float32, by the values of all 256; unsigned codes give the square."""
    if not SIGNED:
        values, scale = values * values, scale * scale
    values = tl.gather(values, tl.reshape(as_index(codes), [codes.numel]), 0)
    return tl.reshape(values, codes.shape) * scale[:, None]


@triton.jit
def finite_and_scale(value):
    """Return a tile with zeros for NaN and Inf, and the scale of each block, which these never reach."""
    value = tl.where(tl.abs(value) < INFINITY, value, 0.0)
    return value, tl.max(tl.abs(value), 1)


@triton.jit
def to_codes(value, scale, SIGNED: tl.constexpr):
    """Return the codes of a tile of finite values."""
    return encoded(value * (1.0 / tl.maximum(scale, TINY))[:, None], SIGNED).to(tl.uint8)


@triton.jit
def grad_of(part, tile, scale, v: tl.constexpr):
    grad = widened(tl.load(pointer(part, GRAD, v.weight, v.align) + tile[0], mask=tile[1], other=0))
    return grad * scale if v.clip else grad


@triton.jit
def scale_of(grad_scale, v: tl.constexpr):
    """Return what clipping multiplies each gradient by."""
    return tl.load(grad_scale) if v.clip else 1.0


@triton.jit
def means_of(part):
    return tl.load(part + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))


@triton.jit
def row_means_of(part):
    return tl.load(part + EXP_AVG_SQ_ROWS).to(tl.pointer_type(tl.float32))


@triton.jit
def rows_of(part, at_tile, v: tl.constexpr):
    """Return which rows of its group the blocks of a tile are in, where columns have means, and their mask."""
    row = at_tile * v.blocks + tl.arange(0, v.blocks)
    return row, row < tl.load(part + ROWS).to(tl.int32)


@triton.jit
def tile_of(part, reduction, at_tile, v: tl.constexpr):
    """Return the offsets of a tile's entries and their mask, (blocks, block), and the numbers of its 8-bit blocks and
    their mask, (blocks,).

    A reduction is the set of entries whose means one sum finds: a group, or `block` columns of one, or all groups of a
    tile that holds several. It is cut into tiles, of which this is number `at_tile`.
    """
    rows, columns = tl.load(part + ROWS).to(tl.int32), size(part, COLUMNS, v.align)
    across = ((columns + (v.block - 1)) // v.block).to(tl.int32)
    BLOCKS: tl.constexpr = v.blocks // v.groups
    number = at_tile * BLOCKS + tl.arange(0, v.blocks) % BLOCKS
    if v.second == "column":
        group, row, column = reduction // across, number, tl.full([v.blocks], 0, tl.int32) + reduction % across
    elif v.nest == 0:
        group, row, column = reduction * v.groups, tl.full([v.blocks], 0, tl.int32), number
    else:
        group, row, column = reduction * v.groups, number // across, number % across
    begin = tl.full([v.blocks], 0, tl.int64) + size(part, START, v.align)
    if v.groups > 1:  # the groups of a tile are evenly spaced
        group += tl.arange(0, v.blocks) // BLOCKS
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
    left = tl.minimum(columns - column.to(tl.int64) * v.block, v.block).to(tl.int32)
    left = tl.multiple_of(tl.where(row < rows, left, 0), v.align)
    along = tl.arange(0, v.block)[None, :]
    if v.ragged:
        block = begin // columns * across + column
        begin += column.to(tl.int64) * v.block
    else:
        begin += column.to(tl.int64) * v.block
        block = begin // v.block
    return begin[:, None] + along, along < left[:, None], block, left > 0


@triton.jit
def reduction_of(part, number, count, v: tl.constexpr):
    """Return the reduction that a program works for, and which of the reduction's `count` programs it is.

    Consecutive programs read what lies side by side: the next blocks of a group or, for columns, the columns beside
    them.
    """
    if v.second == "column":
        reductions = tl.load(part + REDUCTIONS).to(tl.int32)
        return number % reductions, number // reductions
    else:
        return number // count, number % count


@triton.jit
def columns_of(part, reduction, v: tl.constexpr):
    """Return the offsets of a reduction's means, one per column, and their mask."""
    columns = tl.load(part + COLUMNS).to(tl.int32)
    across = tl.cdiv(columns, v.block)
    column = reduction % across * v.block + tl.arange(0, v.block)
    return (reduction // across).to(tl.int64) * columns + column, column < columns
