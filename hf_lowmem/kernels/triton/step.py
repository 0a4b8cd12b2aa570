"""The Triton kernels: AdamW with a full, averaged or factored second moment, and Signum; `launch.py` launches them.

One launch steps many parts of weights; `columns.py` says what a row of its table holds. A program steps one tile, or
one group. What is compiled is in `Variant`, which has no number that changes from step to step. The squares of a mean
are added in an order that its shape and the tiles of `tuning.py` decide, so a step is the same at every run.
"""

import triton
import triton.language as tl

from hf_lowmem.kernels.triton.codes import decoded, encoded
from hf_lowmem.kernels.triton.memory import (
    BETA_2,
    COLUMNS,
    DECAY,
    DTYPES,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    FIRST_GROUP,
    FIRST_REDUCTION,
    FIRST_ROW_SUM,
    FIRST_SUM,
    FIRST_TILE,
    GRAD,
    GROUPS,
    INFINITY,
    KAHAN_COMP,
    LARGEST,
    MOMENTUM,
    NEW_1,
    NEW_2,
    NOISE_KEY,
    PARAM,
    ROWS,
    SCALARS,
    STEP_SIZE,
    SUMS,
    TILES,
    TINY,
    WEIGHT,
    columns_of,
    grad_of,
    loaded,
    means_of,
    pointer,
    reciprocal,
    reduction_of,
    row_means_of,
    rows_of,
    scalar,
    scale_of,
    store,
    tile_of,
)
from hf_lowmem.kernels.triton.rounding import take

__all__ = [
    "DTYPES",
    "add",
    "combine",
    "decoded",
    "encoded",
    "mean_of_rows",
    "step",
    "sum_squares",
    "tl",
    "write_grads",
]


@triton.jit
def step(parts, all_scalars, grad_scale, group_means, part_numbers, v: tl.constexpr):
    """Step one tile, or one group where its means are found by "loop", of the part that `part_numbers` has for it.

    `group_means` has the mean of each group of a factored part.
    """
    part_number = tl.load(part_numbers + tl.program_id(0)).to(tl.int64)
    part = parts + part_number * FIELDS
    scalars = all_scalars + tl.load(part + WEIGHT) * SCALARS
    number = tl.program_id(0) - tl.load(part + FIRST_TILE).to(tl.int32)
    tiles, scale = tl.load(part + TILES).to(tl.int32), scale_of(grad_scale, v)
    if v.means == "none":
        tile = tile_of(part, 0, number, v)
        step_tile(part, scalars, tile, grad_of(part, tile, scale, v), 0.0, v)
    elif v.means == "before":
        reduction, at_tile = reduction_of(part, number, tiles, v)
        tile = tile_of(part, reduction, at_tile, v)
        if v.second == "column":
            where, own = columns_of(part, reduction, v)
            root = tl.sqrt(tl.load(means_of(part) + where, mask=own, other=0.0))[None, :]
            if v.factored:
                group = group_of(part, reduction, v)
                row, own = rows_of(part, at_tile, v)
                first = row_means_of(part) + group.to(tl.int64) * tl.load(part + ROWS)
                mean = tl.load(group_means + tl.load(part + FIRST_GROUP) + group)
                root *= tl.sqrt(tl.load(first + row, mask=own, other=0.0) / tl.maximum(mean, TINY))[:, None]
        else:
            root = tl.sqrt(tl.load(means_of(part) + reduction))
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
            total = tl.zeros([v.blocks, v.block], tl.float32)
            for at_tile in range(tiles):
                total += squares(grad_of(part, tile_of(part, number, at_tile, v), scale, v))
        if v.groups > 1:
            total = tl.reshape(total, [v.groups, v.blocks // v.groups * v.block])
            mean = averaged(part, scalars, mean, tl.sum(total, 1), v)
            root = tl.broadcast_to(tl.sqrt(mean)[:, None], [v.groups, v.blocks // v.groups])
            root = tl.reshape(root, [v.blocks, 1])
        else:
            mean = averaged(part, scalars, mean, tl.sum(total), v)
            root = tl.sqrt(mean)
        tl.store(means, mean, mask=own)
        if v.means == "tile":
            step_tile(part, scalars, tile, grad, root, v)
        else:
            for at_tile in range(tiles):
                tile = tile_of(part, number, at_tile, v)
                step_tile(part, scalars, tile, grad_of(part, tile, scale, v), root, v)


@triton.jit
def step_tile(part, scalars, tile, grad, root, v: tl.constexpr):
    """param <- decay * param - step_size * exp_avg / (sqrt(exp_avg_sq) + eps); of means, `root` is the square root.

    Where updates are limited, (momentum * exp_avg)^2 is added to exp_avg_sq.
    """
    if v.second == "full":
        CODES: tl.constexpr = tl.uint8 if v.moment == tl.uint8 else tl.float32
        exp_avg_sq = loaded(part, EXP_AVG_SQ, CODES, tile, False, v)
        exp_avg_sq = tl.fma(grad * grad, scalar(scalars, NEW_2), exp_avg_sq * scalar(scalars, BETA_2))
        root = tl.sqrt(exp_avg_sq)
        store(part, EXP_AVG_SQ, CODES, tile, root if CODES == tl.uint8 else exp_avg_sq, False, v)
    exp_avg = loaded(part, EXP_AVG, v.moment, tile, True, v)
    exp_avg = tl.fma(grad - exp_avg, scalar(scalars, NEW_1), exp_avg)
    if v.second == "none":
        sign = (exp_avg > 0).to(tl.float32) - (exp_avg < 0).to(tl.float32)
        update = tl.fma(exp_avg, 0.0, sign) * scalar(scalars, STEP_SIZE)  # NaN where exp_avg is not finite
    else:
        if v.limited:
            momentum = exp_avg * scalar(scalars, MOMENTUM)
            root = tl.sqrt(tl.fma(momentum, momentum, root * root))
        update = exp_avg * (scalar(scalars, STEP_SIZE) * reciprocal(root + scalar(scalars, EPS)))
    store(part, EXP_AVG, v.moment, tile, exp_avg, True, v)

    weights, comps = pointer(part, PARAM, v.weight, v.align), pointer(part, KAHAN_COMP, tl.int16, v.align)
    key = tl.load(scalars + NOISE_KEY).to(tl.int32)
    take(weights, comps, tile[0], tile[1], scalar(scalars, DECAY), -update, key, v.weight, v.rounding)


@triton.jit
def averaged(part, scalars, mean, total, v: tl.constexpr):
    """Return the new means, from the old ones and the sums of squares."""
    count = tl.load(part + ROWS)
    if v.second == "group":
        count *= tl.load(part + COLUMNS)
    new = scalar(scalars, BETA_2) * mean + scalar(scalars, NEW_2) / count.to(tl.float32) * total
    return tl.minimum(new, LARGEST)  # sums that do not fit stop their group, and make nothing NaN


@triton.jit
def squares(grad):
    """Return the squares; one that is not finite counts as zero, as it concerns its own entry only."""
    square = grad * grad
    return tl.where(square < INFINITY, square, 0.0)


@triton.jit
def sum_squares(parts, sums, totals, part_numbers, TOTALS: tl.constexpr, v: tl.constexpr):
    """Write a partial sum of a reduction's squares, or those per column and, of a factored part, per row; `totals` get
    the sums that count what is not finite too."""
    part = parts + tl.load(part_numbers + tl.program_id(0)).to(tl.int64) * FIELDS
    first, count = tl.load(part + FIRST_SUM), tl.load(part + SUMS).to(tl.int32)
    reduction, number = reduction_of(part, tl.program_id(0) - first.to(tl.int32), count, v)
    total = tl.zeros([v.blocks, v.block], tl.float32)
    every = tl.zeros([v.blocks, v.block], tl.float32)
    tiles = tl.load(part + TILES).to(tl.int32)
    span = tl.cdiv(tiles, count)
    for at_tile in range(number * span, tl.minimum(number * span + span, tiles)):
        grad = grad_of(part, tile_of(part, reduction, at_tile, v), 1.0, v)
        square = squares(grad)
        total += square
        if v.factored:
            row, own = rows_of(part, at_tile, v)
            tl.store(row_sums_of(part, sums, reduction) + row, tl.sum(square, 1), mask=own)
        if TOTALS:
            every += grad * grad
    place = first + reduction * count + number
    if TOTALS:
        tl.store(totals + place, tl.sum(tl.sum(every, 1), 0))
    if v.second == "column":
        tl.store(sums + place * v.block + tl.arange(0, v.block), tl.sum(total, 0))
    else:
        tl.store(sums + place, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def combine(parts, all_scalars, grad_scale, sums, part_numbers, v: tl.constexpr):
    """Average the partial sums of a reduction into its means and, of a factored part, into those of its share of the
    group's rows; one warp does it, so that no barrier is needed between loading and storing them."""
    part_number = tl.load(part_numbers + tl.program_id(0)).to(tl.int64)
    part = parts + part_number * FIELDS
    reduction = tl.program_id(0) - tl.load(part + FIRST_REDUCTION).to(tl.int32)
    WIDTH: tl.constexpr = v.block if v.second == "column" else 1
    if v.second == "column":
        where, own = columns_of(part, reduction, v)
    else:
        where, own = reduction + tl.arange(0, 1), tl.full([1], True, tl.int1)
    mean = tl.load(means_of(part) + where, mask=own, other=0.0)
    count = tl.load(part + SUMS).to(tl.int32)
    first = tl.load(part + FIRST_SUM) + reduction * count
    total = tl.zeros([4, WIDTH], tl.float32)
    for number in range(0, count, 4):
        each = number + tl.arange(0, 4)[:, None]
        total += tl.load(sums + (first + each) * WIDTH + tl.arange(0, WIDTH)[None, :], mask=each < count, other=0.0)
    scalars = all_scalars + tl.load(part + WEIGHT) * SCALARS
    mean = averaged(part, scalars, mean, clipped(tl.sum(total, 0), grad_scale, v), v)
    tl.store(means_of(part) + where, mean, mask=own)
    if v.factored:
        combine_rows(part, scalars, grad_scale, sums, reduction, v)


@triton.jit
def combine_rows(part, scalars, grad_scale, sums, reduction, v: tl.constexpr):
    """Average the sums of squares of a share of a group's rows, one of as many as it has reductions, into their
    means."""
    AT_ONCE: tl.constexpr = 128
    group, rows = group_of(part, reduction, v), tl.load(part + ROWS).to(tl.int32)
    across = blocks_across(part, v)
    share = tl.cdiv(rows, across)
    begin = (reduction - group * across) * share
    end = tl.minimum(begin + share, rows)
    means = row_means_of(part) + group.to(tl.int64) * rows
    weight = scalar(scalars, NEW_2) / tl.load(part + COLUMNS).to(tl.float32)
    for first in range(begin, end, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        total = tl.zeros([AT_ONCE], tl.float32)
        for block in range(0, across):
            total += tl.load(row_sums_of(part, sums, group * across + block) + row, mask=row < end, other=0.0)
        mean = tl.load(means + row, mask=row < end, other=0.0)
        mean = scalar(scalars, BETA_2) * mean + weight * clipped(total, grad_scale, v)
        tl.store(means + row, mean, mask=row < end)


@triton.jit
def clipped(sums, grad_scale, v: tl.constexpr):
    """Return sums of squares as those of clipped gradients."""
    if v.clip:
        scale = scale_of(grad_scale, v)
        sums *= scale * scale
        sums = tl.where(sums < INFINITY, sums, 0.0)  # a norm that is not finite leaves no finite square
    return sums


@triton.jit
def mean_of_rows(parts, group_means, part_numbers):
    """Write the mean of a factored group, which is that of its rows' means."""
    AT_ONCE: tl.constexpr = 4096
    part = parts + tl.load(part_numbers + tl.program_id(0)).to(tl.int64) * FIELDS
    rows = tl.load(part + ROWS).to(tl.int32)
    means = row_means_of(part) + (tl.program_id(0) - tl.load(part + FIRST_GROUP)) * rows
    share = 1.0 / rows.to(tl.float32)  # before the sum, which may not fit
    total = tl.zeros([AT_ONCE], tl.float32)
    for first in range(0, rows, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        total += tl.load(means + row, mask=row < rows, other=0.0) * share
    tl.store(group_means + tl.program_id(0), tl.minimum(tl.sum(total, 0), LARGEST))


@triton.jit
def blocks_across(part, v: tl.constexpr):
    """Return how many blocks a row has, and so how many reductions a group whose columns have means."""
    return tl.cdiv(tl.load(part + COLUMNS).to(tl.int32), v.block)


@triton.jit
def group_of(part, reduction, v: tl.constexpr):
    """Return the group of a reduction where columns have means."""
    return reduction // blocks_across(part, v)


@triton.jit
def row_sums_of(part, sums, reduction):
    """Return where the sums of each row's squares in a reduction are."""
    return sums + tl.load(part + FIRST_ROW_SUM) + reduction.to(tl.int64) * tl.load(part + ROWS)


@triton.jit(do_not_specialize=["key"])
def add(weights, comps, updates, decays, scale, key, entries, ROUNDING: tl.constexpr, TILE: tl.constexpr):
    """param <- decay * param + scale * update, for matrices of `entries` entries that have a decay each."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < entries
    at += tl.program_id(1).to(tl.int64) * entries
    update = scale * tl.load(updates + at, mask=mask, other=0.0)
    decay = tl.load(decays + tl.program_id(1))
    take(weights, comps, at, mask, decay, update, key, weights.dtype.element_ty, ROUNDING)


@triton.jit(do_not_specialize=["first", "last"])
def write_grads(parts, first, last, grads):
    """Write the addresses of some gradients, each of which comes with one added, into the rows from `first` on.

    What is beyond the last row is the last gradient again.
    """
    for number in tl.static_range(len(grads)):
        tl.store(parts + tl.minimum(first + number, last) * FIELDS + GRAD, grads[number] - 1)
