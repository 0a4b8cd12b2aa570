"""This file knows which piece of a weight a process holds, how its state is cut, and how processes add up sums.

A weight of which each process holds a piece is a DTensor, as FSDP2, HSDP and tensor parallelism make it. A process
holds a `Tile` of it, and the same tile of every state tensor that runs along the cut axes; other state, such as the
mean of a column, is held whole by every process. Plans, 8-bit blocks and the noise of stochastic rounding depend on
the whole weight alone, so that any number of processes takes the same steps.

No other file below `trainer/` imports torch.distributed.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.state import TensorSpec

Groups = tuple[Any, ...]  # process groups, over each of which in turn something is added up
EVERYONE: Groups = (None,)  # all processes


class Tile(NamedTuple):
    """The piece of a weight that this process holds.

    Args:
        whole: the shape of the weight.
        starts: the first entry of the piece along each axis.
        shape: the shape of the piece, which may be empty.
        groups: for each axis, the process groups whose members hold the other pieces along it.
    """

    whole: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    groups: tuple[Groups, ...]

    @property
    def cut_axes(self) -> tuple[int, ...]:
        """Return the axes along which the weight is cut."""
        return tuple(axis for axis, groups in enumerate(self.groups) if groups)

    @property
    def where(self) -> tuple[slice, ...]:
        """Return the piece as slices of the weight."""
        return tuple(slice(start, start + size) for start, size in zip(self.starts, self.shape, strict=True))

    def incomplete_over(self, dims: Sequence[int | None]) -> Groups:
        """Return the groups over which a sum whose axes run along `dims` of the weight must still be added up."""
        return tuple(group for axis in self.cut_axes if axis not in dims for group in self.groups[axis])


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, of which each process holds a piece or a copy."""
    module = sys.modules.get("torch.distributed.tensor")  # whose import takes a second: who has a DTensor has it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Return the piece of a DTensor that this process holds, or any other value itself."""
    if not is_sharded(tensor):
        return tensor
    piece = tensor._local_tensor  # of a parameter, `to_local` returns another tensor at each call
    return piece if type(piece) is Tensor else tensor.to_local()


def whole(tensor: Any) -> Any:
    """Return all of a DTensor, which all processes of its mesh must call, or any other value itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def tile_of(param: Tensor) -> Tile:
    """Return the piece of a DTensor that this process holds.

    Raises:
        ValueError: the process is not on the tensor's mesh, or the pieces must be added up to give the weight.
    """
    tensor: Any = param
    return _tile(tuple(tensor.shape), tensor.device_mesh, tuple(tensor.placements), torch.distributed.group.WORLD)


@lru_cache(maxsize=1 << 12)
def _tile(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], world: Any) -> Tile:
    """Return the piece of a tensor that this process holds; groups are those of `world`, which may be made anew."""
    if any(placement.is_partial() for placement in placements) or mesh.get_coordinate() is None:
        raise ValueError(
            f"A weight of shape {shape} is placed as {placements} on {mesh}, of which this process holds no piece: "
            "give the optimizer weights that are sharded or replicated over processes that step them."
        )
    starts, found = starts_and_shape(shape, tuple(mesh.shape), placements, tuple(mesh.get_coordinate()))
    groups: list[list[Any]] = [[] for _ in shape]
    for dim, placement in enumerate(placements):
        if (axis := cut_axis(placement)) is not None and mesh.size(dim) > 1:
            groups[axis].append(mesh.get_group(dim))
    return Tile(shape, starts, found, tuple(map(tuple, groups)))


@lru_cache(maxsize=1 << 14)
def starts_and_shape(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Any, ...], coordinate: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where the piece of a tensor begins that the process at a coordinate of the mesh holds, and its shape.

    Raises:
        ValueError: the entries of the piece do not follow each other along an axis.
    """
    starts, sizes = [0] * len(shape), list(shape)
    for axis in {axis for placement in placements if (axis := cut_axis(placement)) is not None}:
        cuts = [(dim, placement) for dim, placement in enumerate(placements) if cut_axis(placement) == axis]
        if not any(hasattr(placement, "split_factor") for _, placement in cuts):
            for dim, _ in cuts:  # as torch.chunk cuts
                longest = -(-sizes[axis] // mesh_shape[dim])
                begin = min(longest * coordinate[dim], sizes[axis])
                starts[axis], sizes[axis] = starts[axis] + begin, min(longest, sizes[axis] - begin)
            starts[axis] = starts[axis] if sizes[axis] else shape[axis]
            continue
        entries = torch.arange(shape[axis])
        for dim, placement in cuts:
            along = along_axis(placement, 0)
            entries = along._split_tensor(entries, mesh_shape[dim], with_padding=False)[0][coordinate[dim]]
        sizes[axis], starts[axis] = len(entries), int(entries[0]) if len(entries) else shape[axis]
        if len(entries) and int(entries[-1]) - starts[axis] >= len(entries):
            raise ValueError(
                f"Each process of a mesh {mesh_shape} holds rows of a weight of shape {shape} that do not follow each "
                f"other, as it is placed as {placements}: shard weights by tensor parallelism first, then by FSDP2."
            )
    return tuple(starts), tuple(sizes)


def as_dtensor(
    piece: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], stride: Sequence[int] | None = None
) -> Any:
    """Return the DTensor of a shape and a stride, by default contiguous, of which this process has `piece`.

    The piece stays where it is. `DTensor.from_local` would move it to the devices of the mesh, while FSDP2 keeps the
    shards of offloaded weights on the CPU beside a mesh of GPUs.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = torch.empty(tuple(shape), device="meta").stride() if stride is None else stride
    meta = TensorMeta(torch.Size(shape), tuple(stride), piece.dtype)
    return DTensor(piece, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


class Processes(NamedTuple):
    """A number of processes in place of their group, for plans of what each of them will hold."""

    number: int

    def size(self) -> int:
        return self.number


def first_rows(shape: tuple[int, ...], ranks: int) -> Tile:
    """Return the piece that the first of some processes holds where a weight is cut by rows, as FSDP2 cuts it.

    No other piece is larger.
    """
    if not shape or ranks == 1:
        return Tile(shape, (0,) * len(shape), shape, ((),) * len(shape))
    held = (-(-shape[0] // ranks), *shape[1:])
    return Tile(shape, (0,) * len(shape), held, ((Processes(ranks),), *[()] * (len(shape) - 1)))


def cut_axis(placement: Any) -> int | None:
    """Return the axis that a placement cuts: Shard, or the strided kind that FSDP2 adds to tensor parallelism."""
    return getattr(placement, "dim", None)


def along_axis(placement: Any, axis: int) -> Any:
    """Return a placement that cuts another axis in the same way."""
    factor = getattr(placement, "split_factor", None)
    return type(placement)(axis) if factor is None else type(placement)(axis, split_factor=factor)


# -- state ------------------------------------------------------------------------------------------------------------


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


def places(
    shape: Sequence[int], mesh: Any, placements: Sequence[Any], coordinates: Iterable[Sequence[int]]
) -> list[tuple[slice, ...]]:
    """Return the pieces of a tensor, as slices of it, that the processes at some coordinates of a mesh hold."""
    found = []
    for coordinate in coordinates:
        starts, sizes = starts_and_shape(tuple(shape), tuple(mesh.shape), tuple(placements), tuple(coordinate))
        found.append(tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True)))
    return found


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
    """Return the axis of a state tensor that runs along an axis of the weight, and how many entries one of its has."""
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
        if place is None or (unit > 1 and _longest(tile, axis) % unit):
            return False
    return True


def _longest(tile: Tile, axis: int) -> int:
    """Return the length of all pieces along an axis but the last ones, which may be shorter."""
    size = tile.whole[axis]
    for group in tile.groups[axis]:
        size = -(-size // group.size())
    return size


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


# -- gradients and weights --------------------------------------------------------------------------------------------


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """Return the gradient of this process's piece of a DTensor, from a gradient of any placement."""
    if not is_sharded(param):
        return grad
    placed: Any = grad
    if is_sharded(grad) and placed.placements != param.placements:  # type: ignore[attr-defined]
        placed = placed.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(placed)  # type: ignore[no-any-return]


def is_placed_as(grad: Any, param: Any) -> bool:
    """Return whether a gradient is cut as its parameter is."""
    return not is_sharded(param) or (is_sharded(grad) and grad.placements == param.placements)


class Holders(NamedTuple):
    """The processes that hold the pieces of a weight.

    Args:
        group: their process group.
        rank: the number of this process in it.
        mesh: the mesh of the weight.
        coordinates: where each of them is on the mesh, by its number in the group.
    """

    group: Any
    rank: int
    mesh: Any
    coordinates: tuple[tuple[int, ...], ...]

    def places(self, shape: Sequence[int], placements: Sequence[Any]) -> list[tuple[slice, ...]]:
        """Return the piece of a tensor that each process holds, as slices of it."""
        return places(shape, self.mesh, placements, self.coordinates)

    def exchange(self, like: Tensor, sent: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        """Send each process some bytes, and return those that each has sent here.

        Args:
            like: a tensor on the device of what is sent.
            sent: for each process 1-D tensors of uint8, which follow each other.
            sizes: how many bytes come from each process.
        """
        found = like.new_empty(sum(sizes), dtype=torch.uint8)
        flat = torch.cat([found[:0], *(piece for pieces in sent for piece in pieces)])
        lengths = [sum(map(len, pieces)) for pieces in sent]
        torch.distributed.all_to_all_single(found, flat, list(sizes), lengths, group=self.group)
        return list(found.split(list(sizes)))


def holders_of(param: Any) -> Holders:
    """Return the processes that hold the pieces of a DTensor that this process has one of.

    All of them must call it, as a group of processes that is not known yet is made.
    """
    mesh = param.device_mesh
    cut = tuple(dim for dim, each in enumerate(param.placements) if cut_axis(each) is not None and mesh.size(dim) > 1)
    return _holders(mesh, cut, torch.distributed.group.WORLD)


@lru_cache(maxsize=1 << 8)
def _holders(mesh: Any, cut: tuple[int, ...], world: Any) -> Holders:
    here = mesh.get_coordinate()
    ranges = [range(size) if dim in cut else (here[dim],) for dim, size in enumerate(mesh.shape)]
    ranks = {int(mesh.mesh[coordinate]): coordinate for coordinate in product(*ranges)}
    if len(cut) == 1:
        group = mesh.get_group(cut[0])
    else:
        group = torch.distributed.new_group(sorted(ranks), use_local_synchronization=True)
    inside = torch.distributed.get_process_group_ranks(group)
    return Holders(group, torch.distributed.get_rank(group), mesh, tuple(ranks[rank] for rank in inside))


# -- sums -------------------------------------------------------------------------------------------------------------


def add_up(sums: Iterable[tuple[Tensor, Groups]]) -> None:
    """Add up tensors over process groups, in place and in float64: one collective for all that have the same groups.

    All processes must give as many tensors, of the same shapes and in the same order.
    """
    alike: dict[tuple[Groups, torch.device], list[Tensor]] = defaultdict(list)
    for tensor, groups in sums:
        if groups:
            alike[groups, tensor.device].append(tensor)
    for (groups, _), tensors in alike.items():
        flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        for tensor, found in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(found.view(tensor.shape))
