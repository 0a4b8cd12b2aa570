"""This file knows which piece of a weight a process holds, and how processes exchange pieces and add up sums.

A weight of which each process holds a piece is a DTensor, as FSDP2, HSDP and tensor parallelism make it. A process
holds a `Tile` of it; `state_place.py` says which part of the state goes with it. Plans, 8-bit blocks and the noise of
stochastic rounding depend on the whole weight alone, so that any number of processes takes the same steps.

Below `trainer/`, only `sharding.py`, `state_place.py` and `replicas.py` use torch.distributed.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def places(
    shape: Sequence[int], mesh: Any, placements: Sequence[Any], coordinates: Iterable[Sequence[int]]
) -> list[tuple[slice, ...]]:
    """Return the pieces of a tensor, as slices of it, that the processes at some coordinates of a mesh hold."""
    found = []
    for coordinate in coordinates:
        starts, sizes = starts_and_shape(tuple(shape), tuple(mesh.shape), tuple(placements), tuple(coordinate))
        found.append(tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True)))
    return found


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


def placed_like(param: Any, piece: Tensor) -> Tensor:
    """Return the tensor that is cut as `param` is, and of which this process has `piece`; or `piece` itself."""
    if not is_sharded(param):
        return piece
    shape, stride = param.shape, param.stride()
    return as_dtensor(piece, param.device_mesh, param.placements, shape, stride)  # type: ignore[no-any-return]


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
