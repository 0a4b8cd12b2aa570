"""Where the entries of a contiguous weight that share a second moment are: groups x rows x columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from hf_lowmem.moments import GroupMean


class Geometry(NamedTuple):
    """groups x rows x columns entries, of which groups and rows are each two nested loops and columns are contiguous.

    The entries of a group are averaged: all of them, or, `per_column`, those of each column. Strides, and the `start`
    in the weight, are in entries.
    """

    groups: int
    inner_groups: int
    outer_group_stride: int
    inner_group_stride: int
    rows: int
    inner_rows: int
    outer_row_stride: int
    inner_row_stride: int
    columns: int
    per_column: bool
    start: int


@cache
def elementwise(entries: int, row: int | None = None) -> Geometry:
    """A whole weight: as one run, or by runs of a `row` of 8-bit blocks each."""
    columns = row or entries
    rows = entries // columns if columns else 1
    return Geometry(1, 1, 0, 0, rows, rows, 0, columns if row else 0, columns, False, 0)


@cache
def geometries(
    moment: GroupMean, shape: tuple[int, ...], block_size: int, row: int | None = None
) -> list[Geometry] | None:
    """Each segment of a contiguous weight, if two nested loops do and all its runs can hold whole blocks.

    Args:
        row: the entries of a row whose last block is short: then each run must be one.
    """
    weight, found = torch.empty(shape, device="meta"), []
    for segment in moment.segments:
        view = segment.view(weight)
        one = geometry(view.shape, view.stride(), int(view.storage_offset()), segment.mean_dims, row)
        if one is None or any(value % (row or block_size) for value in (one.columns, one.start)):
            return None
        found.append(one)
    return found


def geometry(
    shape: Sequence[int], strides: Sequence[int], start: int, mean_dims: Sequence[int], row: int | None = None
) -> Geometry | None:
    """The loops over a view whose entries are averaged over `mean_dims`; None where two nested ones do not do.

    The averages are in the row-major order of the other dimensions. Runs that make a `row` are not joined further.
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
    """(all, inner size, outer stride, inner stride) of at most two loops; those that follow each other are one."""
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
