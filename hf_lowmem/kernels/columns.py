"""The columns of the tables that the compiled kernels read, declared once for C, Triton and Python.

`setup.py` runs this file to compile the C kernels, so it imports nothing of the package.
"""

from __future__ import annotations

from typing import NamedTuple

# These are the addresses of the whole tensors that a part belongs to, and 0 for those that it does not have. A
# factored part has the means of its columns at `exp_avg_sq` and those of its rows at `exp_avg_sq_rows`.
ADDRESSES = (
    *("param", "grad", "kahan_comp", "exp_avg", "exp_avg_absmax"),
    *("exp_avg_sq", "exp_avg_sq_absmax", "exp_avg_sq_rows"),
)


class Geometry(NamedTuple):
    """The entries of a part: groups x rows x columns, of which groups and rows are each two nested loops.

    Columns are contiguous. The entries of a group share a mean: all of them, or, `per_column`, those of each column. A
    group of a factored part is a matrix, and is `per_column`.
    Strides, and the `start` in the weight, are in entries.
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


# The C kernels also need dtypes and kinds by number, and the entries of an 8-bit block and of a row of blocks.
CPU_PART = (
    *ADDRESSES,
    *Geometry._fields,
    *("dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "rule", "rounding", "block_size", "row"),
)

# The Triton kernels also need how a part is cut: it has `reductions`, which share no mean, and each of those has
# `tiles` tiles and `sums` partial sums. Each kind is numbered through all parts of a launch, from the part's `first_`
# on, as are the groups, and, after all partial sums, those of the rows of factored parts. `weight` is the row of its
# scalars.
TRITON_PART = (
    *ADDRESSES,
    *Geometry._fields,
    "weight",
    "first_tile",
    "tiles",
    "first_sum",
    "sums",
    "first_reduction",
    "reductions",
    "first_row_sum",
    "first_group",
)

# The numbers of one step of a part, float64: see `scalars.py`. `new_1` and `new_2` are the new gradient's shares in
# the moments; `grad_scale` is what clipping multiplies the gradient by, which the Triton kernels read from elsewhere.
SCALARS = ("decay", "step_size", "eps", "momentum", "new_1", "beta2", "new_2", "noise_key", "grad_scale")
