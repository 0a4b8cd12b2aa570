"""Functions that the steps in plain torch share: they add updates to weights, look at plans, and take statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.means import Index, tile_size, tiles
from hf_lowmem.kernels.passes import Sum
from hf_lowmem.kernels.triton import launch
from hf_lowmem.moments import Full


def has_moments(step: ParamStep, second: type) -> bool:
    """Return whether a step in float32 has a full first moment, and a second one of the given type, and no others."""
    moments = step.plan.moments
    if step.plan.arithmetic != torch.float32 or isinstance(step.step, Tensor):
        return False
    return {name: type(moment) for name, moment in moments.items()} == {"exp_avg": Full, "exp_avg_sq": second}


def add(step: ParamStep, update: Tensor, scale: float, decay: float | Tensor) -> None:
    """Take param <- decay * param + scale * update, for an update (float32) of the parameter's shape.

    A decay is one number, or one for each matrix of a stack, broadcastable to the parameter.
    """
    if launch.adds(step, update):
        launch.add(step, update, scale, decay)
        return
    weight = step.weight()
    for index in tiles(update.shape, tile_size(update.device), update.ndim):
        tile, factor = weight[index], broadcast_tile(decay, index) if isinstance(decay, Tensor) else decay
        tile.store(tile.load().mul_(factor).add_(update[index], alpha=scale))


def broadcast_tile(stored: Tensor, index: Index) -> Tensor:
    """Return the part of `stored` that broadcasts against a tile of what `stored` broadcasts against."""
    return stored[tuple(cut if size > 1 else slice(None) for cut, size in zip(index, stored.shape, strict=False))]


def matrix_dims(step: ParamStep) -> tuple[int, ...]:
    """Return the axes that statistics are taken over."""
    return tuple(range(1 if step.plan.stacked else 0, step.param.ndim))


def entries_of_matrix(step: ParamStep) -> int:
    """Return the number of entries that a statistic is taken over: those of the weight, or of a matrix of a stack."""
    return math.prod(step.shape[1:] if step.plan.stacked else step.shape)


def sum_of_squares(tensor: Tensor, step: ParamStep) -> Sum:
    """Return the sum of squares of a tensor of the weight's shape, 0-D, or that of each matrix of a stack.

    The latter is broadcastable to the tensor.
    """
    norm = torch.linalg.vector_norm(tensor, dim=matrix_dims(step), keepdim=step.plan.stacked)
    return Sum(norm.square(), dims_of_matrix(step, norm.ndim))


def dims_of_matrix(step: ParamStep, ndim: int) -> tuple[int | None, ...]:
    """Return the `dims` of a statistic that has one number, or one for each matrix of a stack."""
    return tuple(0 if step.plan.stacked and axis == 0 else None for axis in range(ndim))
