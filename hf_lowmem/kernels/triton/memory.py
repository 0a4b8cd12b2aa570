"""How the Triton kernels address and read what a launch's table points to: tiles of weights, gradients and moments.

A tile is some lines, and a line is some consecutive entries of one row: an 8-bit block where the moments are codes.
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
FIRST_TILE = tl.constexpr(TRITON_PART.index("first_tile"))
CHUNKS = tl.constexpr(TRITON_PART.index("chunks"))
FIRST_SUM = tl.constexpr(TRITON_PART.index("first_sum"))
SUMS = tl.constexpr(TRITON_PART.index("sums"))
FIRST_CELL = tl.constexpr(TRITON_PART.index("first_cell"))
CELLS = tl.constexpr(TRITON_PART.index("cells"))
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
NEW_1 = tl.constexpr(SCALAR_NAMES.index("new_1"))
BETA_2 = tl.constexpr(SCALAR_NAMES.index("beta2"))
NEW_2 = tl.constexpr(SCALAR_NAMES.index("new_2"))
NOISE_KEY = tl.constexpr(SCALAR_NAMES.index("noise_key"))
SCALARS = tl.constexpr(len(SCALAR_NAMES))

INFINITY = tl.constexpr(float("inf"))
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
def grad_of(part, tile, scale, v: tl.constexpr):
    grad = widened(tl.load(pointer(part, GRAD, v.weight, v.align) + tile[0], mask=tile[1], other=0))
    return grad * scale if v.clip else grad


@triton.jit
def scale_of(grad_scale, v: tl.constexpr):
    """What clipping multiplies each gradient by."""
    return tl.load(grad_scale) if v.clip else 1.0


@triton.jit
def means_of(part):
    return tl.load(part + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))


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
