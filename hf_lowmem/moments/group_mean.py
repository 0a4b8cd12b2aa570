"""A moment with one number per group of entries: a row, a column, a head, a tensor, or a segment of a fused weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hf_lowmem.scratch import known_finite
from hf_lowmem.state import Codec, State, TensorSpec

Index = tuple[slice, ...]  # a tile of a weight: slices of its leading axes


@dataclass(frozen=True)
class Segment:
    """A segment of a weight, such as the query rows of a fused QKV weight, and the groups of its entries.

    The split axis `axis`, of size n, is viewed as (outer, n // outer), and the segment is `[:, start:stop]` of that
    view. Its entries are averaged over `axes`, which are axes of the weight, and, where `axis` is not one of them,
    over each run of `rows_per_block` consecutive entries of the split axis.

    With `cross_axes`, a segment is factored: it keeps a second mean, over those axes, and an entry's estimate is

        row * col / mean(row)

    where `row` is the mean over `axes` and `col` the one over `cross_axes` (arXiv:1804.04235, algorithm 4).
    """

    name: str
    axis: int
    outer: int
    start: int
    stop: int
    axes: tuple[int, ...]
    rows_per_block: int = 1
    cross_axes: tuple[int, ...] = ()

    def check_cross_axes(self) -> None:
        """Raise ValueError if the two means of a factored segment share an axis, or are by blocks."""
        if self.cross_axes and (self.rows_per_block > 1 or set(self.axes) & set(self.cross_axes)):
            raise ValueError(
                f"axes={self.axes}, cross_axes={self.cross_axes}, rows_per_block={self.rows_per_block}: the two means "
                "of a factored weight must be over different axes, and its rows_per_block must be 1."
            )

    @property
    def means(self) -> tuple[Segment, ...]:
        """Return the segment as plain means: itself, or the row mean and the column mean of a factored one."""
        if not self.cross_axes:
            return (self,)
        prefix = f"{self.name}_" if self.name else ""
        row = replace(self, name=f"{prefix}row", cross_axes=())
        return row, replace(row, name=f"{prefix}col", axes=self.cross_axes)

    def factors(self, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors of the shapes of both stored means whose product is the estimate.

        Both means have the same mean themselves, that of the whole matrix, so a shard may take it from either one.
        """
        total = row.mean(self.cross_axes, keepdim=True, dtype=torch.float64)  # whose sum may not fit float32
        return row, (col / total.clamp(min=torch.finfo(row.dtype).tiny)).to(row.dtype)  # all rows are zero where it is

    def view(self, tensor: Tensor) -> Tensor:
        """Return the segment of a tensor of the weight's shape as a view (..., outer, blocks, rows_per_block, ...)."""
        if tensor.ndim == 0:
            tensor = tensor.view(1)
        repeats: Tensor = tensor.unflatten(self.axis, (self.outer, -1))
        part: Tensor = repeats.narrow(self.axis + 1, self.start, self.stop - self.start)
        view: Tensor = part.unflatten(self.axis + 1, (-1, self.rows_per_block))
        return view

    @property
    def mean_dims(self) -> tuple[int, ...]:
        """Return the axes of `view` that are averaged over."""
        split = range(self.axis if self.axis in self.axes else self.axis + 2, self.axis + 3)
        others = [a if a < self.axis else a + 2 for a in self.axes if a != self.axis]
        return tuple(sorted((*split, *others)))

    def spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """Return the declaration of the means: averaged axes have size 1, and the split axis one entry per block."""
        stored: list[int] = []
        dims: list[int | None] = []
        for axis, size in enumerate(shape):
            kept = axis not in self.axes
            whole = (self.outer, self.start, self.stop, self.rows_per_block) == (1, 0, size, 1)
            blocks = self.outer * (self.stop - self.start) // self.rows_per_block
            stored.append((blocks if axis == self.axis else size) if kept else 1)
            dims.append(axis if kept and (axis != self.axis or whole) else None)
        return TensorSpec(tuple(stored), tuple(dims), signed=False)

    def broadcast(self, stored: Tensor) -> Tensor:
        """Return the stored means as a view that broadcasts against `view`."""
        if stored.ndim == 0:
            stored = stored.view(1)
        outer = 1 if self.axis in self.axes else self.outer
        repeats: Tensor = stored.unflatten(self.axis, (outer, -1))
        return repeats.unsqueeze(self.axis + 2)


@dataclass(frozen=True)
class GroupMean:
    """A moment with one number per group of entries, or two whose product is the estimate.

    The means are float32 under every codec: they take little memory, and in bfloat16 an average of squares stalls.

    State: `name` for a weight of one segment; `name_<segment>` for each segment of a fused weight; with `_row` and
    `_col` at the end for a segment that is factored.
    """

    segments: tuple[Segment, ...]

    @cached_property
    def means(self) -> tuple[Segment, ...]:
        """Return the plain means that are stored, in the order of the segments."""
        return tuple(mean for segment in self.segments for mean in segment.means)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the segments cover each entry of a weight of `shape` exactly once."""
        first = self.segments[0]
        if len({s.name for s in self.segments}) < len(self.segments):
            raise ValueError(f"segments must have different names, not {[s.name for s in self.segments]}.")
        layouts = {(s.axis, s.outer) for s in self.segments}
        if len(layouts) > 1 or not 0 <= first.axis < len(shape):
            raise ValueError(f"segments must share one axis of a weight of shape {shape} and one `outer`.")
        end = 0
        for segment in sorted(self.segments, key=lambda s: s.start):
            size = segment.stop - segment.start
            if segment.start != end or size < 1 or size % segment.rows_per_block:
                raise ValueError(
                    f"segment {segment.name!r} leaves a gap, overlaps, is empty, or is not whole blocks of rows."
                )
            for name, axes in (("axes", segment.axes), ("cross_axes", segment.cross_axes)):
                if any(not 0 <= axis < len(shape) for axis in axes):
                    raise ValueError(f"segment {segment.name!r}: {name}={axes} does not fit shape {shape}.")
            segment.check_cross_axes()
            end = segment.stop
        covered, size = end * first.outer, shape[first.axis]
        if covered != size:
            raise ValueError(f"segments cover {covered} of {size} entries of axis {first.axis}.")

    def keep_estimates(self, before: State, after: State, name: str) -> None:
        """Scale column means of factored segments so that the rows of `before` keep their estimates in `after`.

        An estimate is divided by the mean of all rows, which changes where rows are added or removed.
        """
        for segment in self.segments:
            if segment.cross_axes:
                row, col = (self.state_name(name, mean) for mean in segment.means)
                if before[row].shape != after[row].shape:
                    old, new = (each[row].double().mean(segment.cross_axes, keepdim=True) for each in (before, after))
                    scale = new / old.clamp(min=torch.finfo(torch.float32).tiny)
                    after[col] = (after[col] * scale).to(after[col].dtype)

    def state_name(self, name: str, segment: Segment) -> str:
        return f"{name}_{segment.name}" if segment.name else name

    def state_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the state tensors, in the order of the segments."""
        return tuple(self.state_name(name, mean) for mean in self.means)

    def stored(self, state: State, name: str) -> list[Tensor]:
        """Return the stored means, in the order of the segments."""
        return [state[key] for key in self.state_names(name)]

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        return {self.state_name(name, mean): mean.spec(shape) for mean in self.means}

    def describe(self, name: str) -> str:
        means = []
        for segment in self.segments:
            run = f" and {segment.rows_per_block} rows" if segment.rows_per_block > 1 else ""
            axes, cross = (",".join(map(str, axes)) for axes in (segment.axes, segment.cross_axes))
            times = f" times that over axis {cross}" if cross else ""
            means.append(f"{segment.name + ': ' if segment.name else ''}axis {axes}{run}{times}")
        return f"{name} mean over {'; '.join(means)}"

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        finite = value.nan_to_num(0.0, 0.0, 0.0)
        for mean in self.means:
            stored = mean.broadcast(state[self.state_name(name, mean)])
            new = mean.view(finite).mean(mean.mean_dims, keepdim=True, dtype=torch.float64)
            stored.copy_(_finite(beta * stored + (1 - beta) * new, stored))
        estimate = value.new_empty(value.shape)
        for segment, factors in zip(self.segments, self._factors(self.stored(state, name)), strict=True):
            parts = [mean.broadcast(each) for mean, each in zip(segment.means, factors, strict=True)]
            segment.view(estimate).copy_(parts[0] if len(parts) == 1 else parts[0] * parts[1])
        return estimate

    # -- a tile at a time -------------------------------------------------------------------------------------------

    def uncrossed_axes(self, ndim: int) -> int:
        """Return the number of leading axes of a weight along which a tile can be cut without splitting a group."""
        crossed = {axis for mean in self.means for axis in mean.axes}
        if len(self.segments) > 1 or self.segments[0].rows_per_block > 1:
            crossed.add(self.segments[0].axis)
        return next((axis for axis in range(ndim) if axis in crossed), ndim)

    def add_squares(self, totals: Sequence[Tensor], square: Tensor, index: Index) -> None:
        """Add the sums of a tile's squared gradient to `totals`, float64 of the shapes of the stored means.

        A square that is not finite counts as zero, so that it affects its own entry only.
        """
        square = square.view(1) if square.ndim == 0 else square
        for segment, total in zip(self.means, totals, strict=True):
            total = total.view(1) if total.ndim == 0 else total
            entries, groups = self._rows(segment, index, square.shape, square.device)
            if entries is not None and not len(entries):
                continue
            part = square if entries is None else square.index_select(segment.axis, entries)
            others = [axis for axis in segment.axes if axis != segment.axis or groups is None]
            sums = part.sum(others, keepdim=True, dtype=total.dtype) if others else part
            if not known_finite(sums):
                finite = part.nan_to_num(0.0, 0.0, 0.0)
                sums = finite.sum(others, keepdim=True, dtype=total.dtype) if others else finite
            target = _tile_of(total, index, None if groups is None else segment.axis)
            if groups is None:
                target.add_(sums)
            else:
                target.index_add_(segment.axis, groups, sums.to(total.dtype))

    def ema_of_tile(
        self, stored: Sequence[Tensor], totals: Sequence[Tensor], square: Tensor, index: Index, beta: float | Tensor
    ) -> Tensor:
        """Average the squared gradient of a tile into `stored`, and return the estimate, broadcastable to the tile.

        Args:
            stored: the stored means.
            totals: tensors of the shapes of `stored` that are zero for the groups of this tile.
            square: the squared gradient of the tile, which splits no group.
            index: the place of the tile in the weight.
            beta: the decay rate.
        """
        self.add_squares(totals, square, index)
        means, sums = ([_tile_of(each, index, None) for each in tensors] for tensors in (stored, totals))
        self.average(means, sums, square.numel(), beta)
        return self.estimate(stored, index, square.shape)

    def average(self, stored: Sequence[Tensor], totals: Sequence[Tensor], entries: int, beta: float | Tensor) -> None:
        """Average sums of squares over `entries` entries, a weight or a tile that splits no group, into the means."""
        average_by(stored, totals, self.group_sizes(entries, [total.numel() for total in totals]), beta)

    def group_sizes(self, entries: int, groups: Sequence[int]) -> list[int]:
        """Return how many entries each mean is taken over, of so many `entries` in as many `groups` for each mean."""
        length = self.length * self.segments[0].outer
        shares = [entries * mean.outer * (mean.stop - mean.start) // length for mean in self.means]
        return [share // number for share, number in zip(shares, groups, strict=True)]

    def estimate(self, stored: Sequence[Tensor], index: Index, shape: Sequence[int]) -> Tensor:
        """Return the stored means for a tile of `shape`, broadcastable to the tile."""
        if not shape:
            return stored[0]
        split = self.segments[0].axis
        found = stored[0].new_empty(shape if len(self.segments) > 1 else 0)
        # Factors are those of whole matrices, so the stack that a tile is from is cut first.
        depth = min(
            len(index), *(axis for segment in self.segments for axis in (split, *segment.axes, *segment.cross_axes))
        )
        stored = [_tile_of(mean, index[:depth], None) for mean in stored]
        index = (*(slice(0, size) for size in shape[:depth]), *index[depth:])
        for segment, factors in zip(self.segments, self._factors(stored), strict=True):
            parts = []
            for plain, mean in zip(segment.means, factors, strict=True):
                entries, groups = self._rows(plain, index, shape, mean.device)
                part = _tile_of(mean, index, None if groups is None else split)
                parts.append(part if groups is None else part.index_select(split, groups))
            part = parts[0] if len(parts) == 1 else parts[0] * parts[1]
            if entries is None:
                return part
            found.index_copy_(split, entries, part.expand([*shape[:split], len(entries), *shape[split + 1 :]]))
        return found

    def _factors(self, stored: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return, for each segment, the tensors whose product is its estimate, of the shapes of the stored means."""
        each = iter(stored)
        return [
            segment.factors(next(each), next(each)) if segment.cross_axes else (next(each),)
            for segment in self.segments
        ]

    @property
    def length(self) -> int:
        """Return the number of entries of the split axis in one of its `outer` repeats."""
        return max(segment.stop for segment in self.segments)

    def _rows(
        self, segment: Segment, index: Index, shape: Sequence[int], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the result of `_entries` for a tile of `shape`."""
        axis = segment.axis
        start = index[axis].start if axis < len(index) else 0
        return _entries(segment, self.length, (start, start + shape[axis]), device)


def average_by(
    stored: Sequence[Tensor], totals: Sequence[Tensor], sizes: Sequence[int | Tensor], beta: float | Tensor
) -> None:
    """Average sums of squares into means, of which each is taken over so many entries."""
    for mean, total, size in zip(stored, totals, sizes, strict=True):
        mean.copy_(_finite(beta * mean + (1 - beta) * (total / size), mean))


def whole(
    shape: tuple[int, ...], axes: tuple[int, ...], rows_per_block: int = 1, cross_axes: tuple[int, ...] = ()
) -> GroupMean:
    """Return the mean of a whole weight over `axes` and over each `rows_per_block` entries of its last kept axis.

    With `cross_axes`, the weight is factored: see `Segment`.

    Raises:
        ValueError: the weight lacks one of the axes, `rows_per_block` does not divide the kept axis, or the axes of
            both means overlap.
    """
    ndim = max(len(shape), 1)
    for name, given in (("axes", axes), ("cross_axes", cross_axes)):
        if any(not -ndim <= axis < ndim for axis in given):
            legal = f"axes go from 0 to {ndim - 1}"
            raise ValueError(f"{name}={given} does not fit a parameter of shape {shape}: {legal}.")
    averaged, cross = (tuple(sorted({axis % ndim for axis in given})) for given in (axes, cross_axes))
    kept = [axis for axis in range(ndim) if axis not in averaged]
    axis = kept[-1] if kept else 0
    size = shape[axis] if shape else 1
    blocks = rows_per_block if kept else 1
    if size % blocks:
        raise ValueError(
            f"rows_per_block={rows_per_block} does not divide axis {axis} of a parameter of shape {shape}: "
            f"use a divisor of {size}."
        )
    segment = Segment("", axis, 1, 0, size, averaged, blocks, cross)
    segment.check_cross_axes()
    return GroupMean((segment,))


def _finite(means: Tensor, stored: Tensor) -> Tensor:
    """Return new means that are no larger than the largest number of the dtype they are stored in.

    Sums of squares that do not fit that dtype then stop their group, as an infinite square stops an entry of AdamW,
    and make nothing NaN.
    """
    return means.clamp(max=torch.finfo(stored.dtype).max)


@lru_cache(maxsize=1 << 12)
def _entries(
    segment: Segment, length: int, span: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return which entries in `span` of the split axis belong to the segment, and the indices of their stored means.

    The entries are None if all of them belong to the segment. The indices are None if the axis is averaged, or if each
    entry has its own mean, which `_tile_of` then selects.
    """
    averaged = segment.axis in segment.axes
    if (segment.start, segment.stop) == (0, length) and (averaged or segment.rows_per_block == 1):
        return None, None
    along = torch.arange(*span, device="cpu")
    repeat, offset = along // length, along % length
    mine = (offset >= segment.start) & (offset < segment.stop)
    blocks = (segment.stop - segment.start) // segment.rows_per_block
    group = repeat * blocks + (offset - segment.start) // segment.rows_per_block
    entries = None if bool(mine.all()) else mine.nonzero().flatten().to(device)
    return entries, None if averaged else group[mine].to(device)


def _tile_of(stored: Tensor, index: Index, whole_axis: int | None) -> Tensor:
    """Return the stored means of a tile, which are not cut along `whole_axis` and averaged axes."""
    sizes = zip(index, stored.shape, strict=False)
    return stored[tuple(slice(None) if n == 1 or a == whole_axis else cut for a, (cut, n) in enumerate(sizes))]
