"""A moment with one number per group of entries: rows, columns, heads, whole tensors, and parts of fused weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowmem.state import Codec, State, TensorSpec


@dataclass(frozen=True)
class Segment:
    """A part of a weight and the groups in it.

    The split axis, of size n, is viewed as (outer, n // outer), of which the part is `[:, start:stop]`; its entries
    are averaged over `axes`, and over `rows_per_block` consecutive entries of the split axis where that is kept.
    Axes are the weight's own. `view` gives the part with the split axis as (outer, blocks, rows_per_block).
    """

    name: str
    axis: int
    outer: int
    start: int
    stop: int
    axes: tuple[int, ...]
    rows_per_block: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """Strided view (..., outer, blocks, rows_per_block, ...) of a tensor with the weight's whole split axis."""
        if tensor.ndim == 0:
            tensor = tensor.view(1)
        repeats: Tensor = tensor.unflatten(self.axis, (self.outer, -1))
        part: Tensor = repeats.narrow(self.axis + 1, self.start, self.stop - self.start)
        view: Tensor = part.unflatten(self.axis + 1, (-1, self.rows_per_block))
        return view

    @property
    def mean_dims(self) -> tuple[int, ...]:
        """The axes of `view` that are averaged over."""
        split = range(self.axis if self.axis in self.axes else self.axis + 2, self.axis + 3)
        others = [a if a < self.axis else a + 2 for a in self.axes if a != self.axis]
        return tuple(sorted((*split, *others)))

    def spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """One number per group: averaged axes have size 1, the split axis one entry per block."""
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
        """The stored numbers as a view that broadcasts against `view`."""
        if stored.ndim == 0:
            stored = stored.view(1)
        outer = 1 if self.axis in self.axes else self.outer
        repeats: Tensor = stored.unflatten(self.axis, (outer, -1))
        return repeats.unsqueeze(self.axis + 2)


@dataclass(frozen=True)
class GroupMean:
    """One float32 number per group of entries, whatever the codec: it is small, and bfloat16 averages stall.

    State: `name` for a single segment; `name_<segment>` for each part of a fused weight.
    """

    segments: tuple[Segment, ...]

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
            if segment.start != end or (segment.stop - segment.start) % segment.rows_per_block:
                raise ValueError(f"segment {segment.name!r} leaves a gap, overlaps, or is not whole blocks of rows.")
            if any(not 0 <= axis < len(shape) for axis in segment.axes):
                raise ValueError(f"segment {segment.name!r}: axes={segment.axes} does not fit shape {shape}.")
            end = segment.stop
        covered, size = end * first.outer, shape[first.axis]
        if covered != size:
            raise ValueError(f"segments cover {covered} of {size} entries of axis {first.axis}.")

    def state_name(self, name: str, segment: Segment) -> str:
        return f"{name}_{segment.name}" if segment.name else name

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        return {self.state_name(name, segment): segment.spec(shape) for segment in self.segments}

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        finite = value.nan_to_num(0.0, 0.0, 0.0)
        estimate = value.new_empty(value.shape)
        for segment in self.segments:
            stored = segment.broadcast(state[self.state_name(name, segment)])
            mean = segment.view(finite).mean(segment.mean_dims, keepdim=True)
            stored.copy_(beta * stored + (1 - beta) * mean)
            segment.view(estimate).copy_(stored)
        return estimate


def whole(shape: tuple[int, ...], axes: tuple[int, ...], rows_per_block: int = 1) -> GroupMean:
    """The mean over `axes` of a whole weight, and over runs of `rows_per_block` entries of its last kept axis.

    Raises:
        ValueError: an axis that the weight does not have, or a kept axis that the blocks do not divide.
    """
    ndim = max(len(shape), 1)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(f"axes={axes} does not fit a parameter of shape {shape}: axes go from 0 to {ndim - 1}.")
    averaged = tuple(sorted({axis % ndim for axis in axes}))
    kept = [axis for axis in range(ndim) if axis not in averaged]
    axis = kept[-1] if kept else 0
    size = shape[axis] if shape else 1
    blocks = rows_per_block if kept else 1
    if size % blocks:
        raise ValueError(
            f"rows_per_block={rows_per_block} does not divide axis {axis} of a parameter of shape {shape}: "
            f"use a divisor of {size}."
        )
    return GroupMean((Segment("", axis, 1, 0, size, averaged, blocks),))
