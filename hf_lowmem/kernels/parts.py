"""The loops by which the compiled kernels visit the entries that share a second moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from hf_lowmem.codecs import BFloat16, Float32, Int8Blockwise
from hf_lowmem.kernels.columns import Geometry
from hf_lowmem.moments import Full, GroupMean, Segment
from hf_lowmem.state import FULL_SPACE, KAHAN_COMP, State, StatePlan


@lru_cache(maxsize=1 << 12)
def second_moment(rule: str, plan: StatePlan) -> str | None:
    """Return the kind of second moment that the compiled kernels know: "none" (Signum), "full" or "mean", of which any
    part may be factored.

    None says that they do not step such a plan: they know the first moment as `exp_avg`, one number per entry, and the
    second as `exp_avg_sq`, both in float32 arithmetic and in the space of the weight.
    """
    moments = dict(plan.moments)
    first, second = moments.pop("exp_avg", None), moments.pop("exp_avg_sq", None)
    storage = type(plan.codec) in (Float32, BFloat16, Int8Blockwise)
    if moments or first != Full() or not storage or plan.projection is not FULL_SPACE:
        return None
    if plan.arithmetic != torch.float32:
        return None
    if second is None:
        return "none" if rule == "signum" else None
    if rule not in ("adamw", "limited_adamw", "transformers_adamw"):
        return None
    if second == Full(signed=False) and rule != "limited_adamw":
        return "full"
    return "mean" if type(second) is GroupMean else None


@lru_cache(maxsize=1 << 12)
def geometries_of(plan: StatePlan, shape: tuple[int, ...], by_row: bool = False) -> tuple[Geometry, ...] | None:
    """Return the parts of a contiguous weight, or None where the compiled kernels cannot go over them.

    Args:
        by_row: whether each row of 8-bit blocks is a run of its own, even where all of its blocks are whole.
    """
    moment, codec, block, row = plan.moments.get("exp_avg_sq"), plan.codec, 1, None
    if isinstance(codec, Int8Blockwise):
        block, row = codec.block_size, codec.row(shape) if by_row else codec.ragged_row(shape)
    if not isinstance(moment, GroupMean):
        return (elementwise(math.prod(shape), row),)
    found = geometries(moment, shape, block, row)
    return None if found is None else tuple(found)


@lru_cache(maxsize=1 << 12)
def state_names(plan: StatePlan, shape: tuple[int, ...]) -> tuple[dict[str, str], ...]:
    """Return the state tensors of each part of a weight whose addresses the kernels are given, by address column."""
    moment = plan.moments.get("exp_avg_sq")
    shared = {name: name for name in (KAHAN_COMP, "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")}
    if not isinstance(moment, GroupMean):
        return (shared,)
    found = []
    for segment in moment.segments:
        names = [moment.state_name("exp_avg_sq", mean) for mean in columns_first(segment, shape)]
        found.append({**shared, **dict(zip(("exp_avg_sq", "exp_avg_sq_rows"), names, strict=False))})
    return tuple(found)


def addresses_of(param: Tensor, grad: Tensor, state: State, plan: StatePlan) -> list[dict[str, int]]:
    """Return the address columns of each part of a weight."""
    given = {"param": param.data_ptr(), "grad": grad.data_ptr()}
    return [
        given | {column: state[name].data_ptr() for column, name in names.items() if name in state}
        for names in state_names(plan, tuple(param.shape))
    ]


@cache
def elementwise(entries: int, row: int | None = None) -> Geometry:
    """Return the geometry of a whole weight: one run, or runs of a `row` of 8-bit blocks each."""
    columns = row or entries
    rows = entries // columns if columns else 1
    return Geometry(1, 1, 0, 0, rows, rows, 0, columns if row else 0, columns, False, 0)


@cache
def geometries(
    moment: GroupMean, shape: tuple[int, ...], block_size: int, row: int | None = None
) -> list[Geometry] | None:
    """Return the geometry of each segment of a contiguous weight; None where two nested loops cannot go over it, or
    where a run cuts a block.

    Args:
        row: the entries of a row whose last block is short: then each run must be one.
    """
    weight, found = torch.empty(shape, device="meta"), []
    for segment in moment.segments:
        view, (mean, *of_rows) = segment.view(weight), columns_first(segment, shape)
        one = geometry(view.shape, view.stride(), int(view.storage_offset()), mean.mean_dims, row)
        if one is None or any(value % (row or block_size) for value in (one.columns, one.start)):
            return None
        if of_rows:
            if not _is_stack(view.shape, {*mean.mean_dims, *of_rows[0].mean_dims}, one.groups):
                return None
            one = one._replace(per_column=True)
        found.append(one)
    return found


def columns_first(segment: Segment, shape: tuple[int, ...]) -> tuple[Segment, ...]:
    """Return the means of a segment; of a factored one, those of the columns of `Geometry`, then those of its rows.

    Columns run along the last axis, over which the means of rows are taken.
    """
    view = segment.view(torch.empty(shape, device="meta"))
    last = max((dim for dim, size in enumerate(view.shape) if size > 1), default=0)
    return tuple(sorted(segment.means, key=lambda mean: last in mean.mean_dims))


def _is_stack(shape: Sequence[int], averaged: set[int], groups: int) -> bool:
    """Return whether a factored view is a stack of matrices, each one of the `groups` of its geometry.

    It is not where a run along the last axis is a part of a matrix's row, or where other axes come before those of the
    stack, as the means are in the order of the axes.
    """
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    stack = [dim for dim in dims if dim not in averaged]
    return groups == math.prod(shape[dim] for dim in stack) and stack == dims[: len(stack)]


def geometry(
    shape: Sequence[int], strides: Sequence[int], start: int, mean_dims: Sequence[int], row: int | None = None
) -> Geometry | None:
    """Return the loops over a view whose entries are averaged over `mean_dims`; None where it takes more than two.

    The means are in the row-major order of the other dimensions. Runs that make a `row` are not joined further.
    """
    dims = [(size, stride, dim in mean_dims) for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))]
    dims = [dim for dim in dims if dim[0] != 1]
    columns, averaged = 1, True
    if dims:
        columns, stride, averaged = dims.pop()
        if stride != 1:
            return None
        while dims and dims[-1][1:] == (columns, averaged) and columns != row:
            columns *= dims.pop()[0]
    groups = _nested([dim[:2] for dim in dims if not dim[2]])
    rows = _nested([dim[:2] for dim in dims if dim[2]])
    return Geometry(*groups, *rows, columns, not averaged, start) if groups and rows else None


def _nested(dims: list[tuple[int, int]]) -> tuple[int, int, int, int] | None:
    """Return (size, inner size, outer stride, inner stride) of at most two loops, joining those that can be one."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [*[(1, 0)] * (2 - len(merged)), *merged]
    return outer * inner, inner, outer_stride, inner_stride
