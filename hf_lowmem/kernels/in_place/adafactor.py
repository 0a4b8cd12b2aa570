"""Adafactor in plain torch, in tiles: one pass for the means, one for the clipping, one for the update."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.in_place.subspace import add_back, in_subspace
from hf_lowmem.kernels.in_place.updates import (
    broadcast_tile,
    dims_of_matrix,
    entries_of_matrix,
    has_moments,
    matrix_dims,
    sum_of_squares,
)
from hf_lowmem.kernels.means import Index, scaled_grad
from hf_lowmem.kernels.passes import Passes, RulePasses, Sum
from hf_lowmem.kernels.rule import RULE
from hf_lowmem.kernels.tiles import full_moments, tiles_of
from hf_lowmem.moments import Full, RowColMean
from hf_lowmem.scratch import Scratch
from hf_lowmem.state import FULL_SPACE


def covers(step: ParamStep) -> bool:
    """Return whether a parameter is a matrix with row and column means, or a vector with a full second moment."""
    return has_moments(step, RowColMean) or (step.param.ndim < 2 and has_moments(step, Full))


def adafactor(step: ParamStep, hyper: Hyper) -> Passes:
    """Take `adafactor_rule`, in the space of a projection if there is one."""
    if not isinstance(step.plan.moments["exp_avg_sq"], RowColMean):  # a vector, which is small
        RULE.step(Bucket.of([step], "adafactor", RULE), hyper)
        return
    step_size: float | Tensor = hyper.lr
    if hyper.flags["scale_parameter"]:
        squares = sum_of_squares(step.weight().load(), step)
        yield [squares]
        step_size = hyper.lr * (squares.values / entries_of_matrix(step)).sqrt().clamp(min=1e-3)
    decay = 1 - step_size * hyper.weight_decay
    if step.plan.projection is FULL_SPACE:
        yield from factored(step, hyper, step_size, decay)
    else:
        inner = in_subspace(step)
        yield from factored(inner, hyper, step_size, 1.0)
        add_back(step, inner.param, decay)


def factored(step: ParamStep, hyper: Hyper, step_size: float | Tensor, decay: float | Tensor) -> Passes:
    """Take param <- decay * param - exp_avg: one pass for the means, one for the clipping, one for the update."""
    row, col = step.state["exp_avg_sq_row"].unsqueeze(-1), step.state["exp_avg_sq_col"].unsqueeze(-2)
    indices, shape, weight, scratch = list(tiles_of(step)), step.shape, step.weight(), Scratch(row.device)

    row_sum, col_sum = torch.zeros_like(row), torch.zeros_like(col)
    for index in indices:
        grad = scaled_grad(step, index)
        square = torch.mul(grad, grad, out=scratch.get("square", grad.shape)).add_(1e-30)
        broadcast_tile(row_sum, index).add_(square.sum(-1, keepdim=True))
        broadcast_tile(col_sum, index).add_(square.sum(-2, keepdim=True))
    axes = tuple(range(len(shape)))
    yield [Sum(row_sum, (*axes[:-1], None)), Sum(col_sum, (*axes[:-2], None, axes[-1]))]
    beta2 = 1 - step.step ** hyper.flags["decay_rate"]
    row.mul_(beta2).add_(row_sum, alpha=(1 - beta2) / shape[-1])
    col.mul_(beta2).add_(col_sum, alpha=(1 - beta2) / shape[-2])
    row_factor, col_factor = (row / col.mean(-1, keepdim=True)).rsqrt(), col.rsqrt()  # both have one mean

    def unclipped_update(index: Index) -> Tensor:
        grad = scaled_grad(step, index)
        scaled = torch.mul(grad, broadcast_tile(row_factor, index), out=scratch.get("square", grad.shape))
        return scaled.mul_(broadcast_tile(col_factor, index))

    dims = matrix_dims(step)
    energy = torch.zeros_like(row.sum(dims, keepdim=True))
    for index in indices:
        broadcast_tile(energy, index).add_(unclipped_update(index).square_().sum(dims, keepdim=True))
    yield [Sum(energy, dims_of_matrix(step, energy.ndim))]
    rms = (energy / entries_of_matrix(step)).sqrt()
    factor = step_size / (rms / hyper.flags["clip_threshold"]).clamp(min=1.0)
    for index in indices:
        tile, update = weight[index], unclipped_update(index).mul_(broadcast_tile(factor, index))
        exp_avg = full_moments(step, index)["exp_avg"]
        averaged = exp_avg.load().lerp_(update, 1 - hyper.beta1)
        shrink = broadcast_tile(decay, index) if isinstance(decay, Tensor) else decay
        tile.store(tile.load(scratch).mul_(shrink).sub_(averaged))
        exp_avg.store(averaged)


ADAFACTOR = RulePasses(covers, adafactor)
