"""What the means of a second moment take from a gradient: sums of squares, found some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.moments import GroupMean

Index = tuple[slice, ...]  # of the leading axes; those after them are whole
TILE = 1 << 16  # entries of a tile on the CPU, which stays in the cache with its temporaries
ACCELERATOR_TILE = 1 << 24  # on an accelerator, which that many keep busy


def tile_size(device: torch.device) -> int:
    """Return how many entries a step in plain torch takes at a time."""
    return TILE if device.type == "cpu" else ACCELERATOR_TILE


def tiles(shape: Sequence[int], limit: int, depth: int) -> Iterator[Index]:
    """Cover `shape` with tiles of at most `limit` entries, cutting only the first `depth` axes."""
    if math.prod(shape) <= limit or depth == 0:
        yield ()
        return
    row = math.prod(shape[1:])
    if shape[0] > 1 and (row <= limit or depth == 1):
        rows = max(limit // row, 1)
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])),)
        return
    for start in range(shape[0]):
        for rest in tiles(shape[1:], limit, depth - 1):
            yield (slice(start, start + 1), *rest)


def square_sums(step: ParamStep) -> dict[str, Tensor]:
    """Return the sums of the squared gradient by the name of the state that averages them, of the state's shape."""
    found: dict[str, Tensor] = {}
    for name, moment in step.plan.moments.items():
        if isinstance(moment, GroupMean):
            totals = [torch.zeros_like(stored) for stored in moment.stored(step.state, name)]
            for index in tiles(step.grad.shape, tile_size(step.grad.device), step.grad.ndim):
                moment.add_squares(totals, squared(step, index), index)
            found |= dict(zip(moment.state_names(name), totals, strict=True))
    return found


def squared(step: ParamStep, index: Index) -> Tensor:
    grad = scaled_grad(step, index)
    return grad * grad


def scaled_grad(step: ParamStep, index: Index) -> Tensor:
    """Return a tile of the gradient in the plan's arithmetic, clipped; it may be the gradient's own memory."""
    grad = step.grad[index].to(step.plan.arithmetic)
    return grad if step.clip is None else grad * step.clip.scale


def average(step: ParamStep, sums: dict[str, Tensor], beta2: float) -> None:
    """Average sums of squares over whole weights into the stored means."""
    for name, moment in step.plan.moments.items():
        if isinstance(moment, GroupMean):
            totals = [sums[key] for key in moment.state_names(name)]
            moment.average(moment.stored(step.state, name), totals, step.grad.numel(), beta2)
