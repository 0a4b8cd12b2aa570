"""Which part of a weight's state a process holds: all, or, of a DTensor, what runs along its shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.sharding import Tile, along_axis, as_dtensor, cut_axis, is_sharded, local, places, tile_of
from hf_lowmem.state import TensorSpec


@dataclass(frozen=True)
class StatePlace:
    """Which part of a parameter's state this process holds: all, or, of a DTensor, what runs along its shard.

    Args:
        param: the parameter.
        gathered: whether the state of a DTensor cannot be cut along with it. It is then cut along the longest axis of
            each state tensor, and gathered for each step with the weight; see `gathering.py`.
    """

    param: Any
    gathered: bool = False

    @property
    def is_cut(self) -> bool:
        """Return whether state tensors are DTensors."""
        return is_sharded(self.param)

    def index(self, spec: TensorSpec) -> tuple[slice, ...]:
        """Return the part of a state tensor that this process holds, as slices of its axes."""
        if not self.is_cut or spec.on_host:
            return tuple(slice(0, size) for size in spec.shape)
        if self.gathered:
            mesh = self.param.device_mesh
            return places(spec.shape, mesh, self.placements(spec), [mesh.get_coordinate()])[0]
        return state_index(spec, tile_of(self.param))

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the shape of the part of a state tensor that this process holds."""
        return tuple(part.stop - part.start for part in self.index(spec))

    def zeros(self, spec: TensorSpec) -> Tensor:
        """Return a state tensor of zeros: of a DTensor a DTensor that is cut alike."""
        return self.placed(spec.zeros(self.param.device, self.shape(spec)), spec)

    def placed(self, part: Tensor, spec: TensorSpec) -> Tensor:
        """Return this process's part of a state tensor as the optimizer keeps it: as a DTensor beside a DTensor."""
        if not self.is_cut or spec.on_host:
            return part
        placed: Tensor = as_dtensor(part.contiguous(), self.param.device_mesh, self.placements(spec), spec.shape)
        return placed

    def placements(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Return how a state tensor is placed: cut as its parameter, or replicated where it runs along no cut."""
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = []
        for placement in self.param.placements:
            axis = cut_axis(placement)
            if axis is None or not spec.shape:
                found.append(Replicate())
            elif self.gathered:
                found.append(Shard(longest_axis(spec.shape)))
            else:
                place = state_axis(spec, axis)[0]
                found.append(Replicate() if place is None else along_axis(placement, place))
        return tuple(found)

    def part_of(self, value: Any, spec: TensorSpec) -> Any:
        """Return this process's part of a value from a checkpoint: a number, a whole tensor or a DTensor."""
        if is_sharded(value):
            if self.is_cut and not spec.on_host and value.device_mesh == self.param.device_mesh:
                return value.redistribute(placements=self.placements(spec)).to_local()
            value = value.full_tensor()
        return value[self.index(spec)] if isinstance(value, Tensor) and spec.shape else value


def state_index(spec: TensorSpec, tile: Tile) -> tuple[slice, ...]:
    """Return the part of a state tensor that runs along the piece of a weight, as slices of its axes."""
    found = [slice(0, size) for size in spec.shape]
    for axis in tile.cut_axes:
        place, unit = state_axis(spec, axis)
        if place is not None:
            start, stop = tile.starts[axis], tile.starts[axis] + tile.shape[axis]
            found[place] = slice(min(-(-start // unit), spec.shape[place]), -(-stop // unit))
    return tuple(found)


def longest_axis(shape: Sequence[int]) -> int:
    """Return the longest axis of a tensor, the first of several."""
    return list(shape).index(max(shape))


def state_axis(spec: TensorSpec, axis: int) -> tuple[int | None, int]:
    """Return the axis of a state tensor along an axis of the weight, and how many of its entries share one there."""
    if axis in spec.param_dims:
        return spec.param_dims.index(axis), 1
    if spec.block > 1 and spec.param_dims and axis == len(spec.param_dims) - 1:
        return axis, spec.block
    return None, 1


def can_be_cut(spec: TensorSpec, tile: Tile) -> bool:
    """Return whether the pieces of a weight have pieces of this state tensor: no 8-bit block lies in two of them.

    The answer is the same on all processes.
    """
    for axis in tile.cut_axes:
        place, unit = state_axis(spec, axis)
        if place is None or (unit > 1 and any(length % unit for length in _lengths(tile, axis))):
            return False
    return True


def _lengths(tile: Tile, axis: int) -> Iterator[int]:
    """Yield the lengths, but for shorter last ones, of all pieces that an axis is cut into, one group after another.

    Under tensor parallelism with FSDP2 the last group cuts first, so that both orders count.
    """
    for groups in (tile.groups[axis], tile.groups[axis][::-1]):
        size = tile.whole[axis]
        for group in groups:
            size = -(-size // group.size())
            yield size


def as_bytes(tensor: Tensor) -> Tensor:
    """Return int16 numbers as uint8 (..., 2), as checkpoints hold them: collectives do not take int16."""
    part = local(tensor).unsqueeze(-1).view(torch.uint8)
    return with_another_axis(tensor, part) if is_sharded(tensor) else part


def from_bytes(tensor: Tensor) -> Tensor:
    """Return the int16 numbers that `as_bytes` has turned into a plain tensor."""
    return tensor.contiguous().view(torch.int16).squeeze(-1)


def with_another_axis(tensor: Any, part: Tensor) -> Tensor:
    """Return a DTensor that is cut like another one and has an axis more at the end, from what is here of it."""
    found: Tensor = as_dtensor(part, tensor.device_mesh, tensor.placements, (*tensor.shape, part.shape[-1]))
    return found


def held_bytes(specs: Iterable[TensorSpec], tile: Tile, gathered: bool) -> int:
    """Return the bytes of a weight's state that the first of some processes holds, whose piece is `tile`."""
    total = 0
    for spec in specs:
        held = [part.stop - part.start for part in state_index(spec, tile)]
        if gathered and spec.shape and not spec.on_host:
            (group,), axis = tile.groups[0], longest_axis(spec.shape)
            held = list(spec.shape)
            held[axis] = -(-held[axis] // group.size())
        total += math.prod(held) * spec.dtype.itemsize
    return total
