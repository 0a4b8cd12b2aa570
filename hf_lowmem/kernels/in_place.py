"""SOAP, Adafactor, and AdamW in a subspace: rules with sums or products over whole weights, in tiles between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.means import Index, scaled_grad, tile_size, tiles
from hf_lowmem.kernels.registry import Backend, find_backend
from hf_lowmem.kernels.rule import RULE
from hf_lowmem.kernels.scalars import transformers_adamw_scalars
from hf_lowmem.kernels.tiles import full_moments, tiles_of
from hf_lowmem.kernels.triton import launch
from hf_lowmem.moments import Full, RowColMean
from hf_lowmem.scratch import Scratch
from hf_lowmem.state import FULL_SPACE, StatePlan, Subspace


class InPlace(Backend):
    """Steps of the rules that are not elementwise, and of `transformers_adamw` in a subspace.

    A product with a basis needs one temporary of the weight's size.
    """

    name = "in_place"

    def covers(self, rule: str, step: ParamStep) -> bool:
        plan = step.plan
        if plan.arithmetic != torch.float32 or isinstance(step.step, Tensor) or plan.moments.keys() != _MOMENTS:
            return False
        if type(plan.moments["exp_avg"]) is not Full:
            return False
        second = type(plan.moments["exp_avg_sq"])
        if rule == "adafactor":
            return second is RowColMean or (second is Full and step.param.ndim < 2)
        return second is Full and (rule == "soap" or (rule == SUBSPACE_RULE and plan.projection is not FULL_SPACE))

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        self.step(bucket, hyper)  # none of its rules has means of groups

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        if bucket.rule == SUBSPACE_RULE:
            subspace_adamw(bucket, hyper)
            return
        for step in bucket:
            if bucket.rule == "soap":
                soap(step, hyper)
            elif type(step.plan.moments["exp_avg_sq"]) is RowColMean:
                adafactor(step, hyper)
            else:  # a vector, which is small
                RULE.step(Bucket.of([step], bucket.rule, RULE), hyper)


_MOMENTS = {"exp_avg", "exp_avg_sq"}
SUBSPACE_RULE = "transformers_adamw"


def subspace_adamw(bucket: Bucket, hyper: Hyper) -> None:
    """Take `transformers_adamw_rule` in the space of a projection, by the backends of weights that are not projected.

    As many weights are taken at once as make a tile of projected entries, so that small ones share their launches.
    """
    decay = 1 - hyper.lr * hyper.weight_decay
    inner_hyper = replace(hyper, lr=hyper.lr * decay, weight_decay=0.0)  # an update decays as its weight does
    for outer in batches(bucket):
        inner = [in_subspace(step) for step in outer]
        by_backend: dict[Backend, list[ParamStep]] = defaultdict(list)
        for step in inner:
            by_backend[find_backend(bucket.rule, step)].append(step)
        for backend, steps in by_backend.items():
            backend.step(Bucket.of(steps, bucket.rule, backend), inner_hyper)
        for step, projected in zip(outer, inner, strict=True):
            add_back(step, projected.param, decay)


def batches(bucket: Bucket) -> Iterator[list[ParamStep]]:
    """Divide a bucket of projected weights into runs of about a tile of projected entries each."""
    limit, entries, batch = tile_size(bucket.device), 0, list[ParamStep]()
    for step in bucket:
        batch.append(step)
        entries += step.state["exp_avg"].numel()
        if entries >= limit:
            yield batch
            entries, batch = 0, []
    if batch:
        yield batch


@lru_cache(maxsize=1 << 12)
def unprojected(plan: StatePlan) -> StatePlan:
    """Return the plan by which an update in the space of a projection is stepped."""
    return replace(plan, projection=FULL_SPACE)


def in_subspace(step: ParamStep) -> ParamStep:
    """Return the step of an update that starts at zero, by the projected gradient."""
    grad = step.plan.projection.project(step.state, step.grad).contiguous()
    return step._replace(param=torch.zeros_like(grad), grad=grad, plan=unprojected(step.plan))


def add_back(step: ParamStep, update: Tensor, decay: float | Tensor) -> None:
    """Multiply the parameter by `decay` and add an update of the subspace to it."""
    projection = cast(Subspace, step.plan.projection)
    if step.plan.rounding.kind == "nearest" and not isinstance(decay, Tensor):
        if projection.add_back(step.state, step.param, update, decay):
            return
    add(step, projection.project_back(step.state, update), 1.0, decay)


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


def soap(step: ParamStep, hyper: Hyper) -> None:
    """Take `soap_rule` in tiles, and its rotations as whole products."""
    step, projection = step.clipped(), step.plan.projection
    scalars, indices = transformers_adamw_scalars(step.step, hyper), list(tiles_of(step))
    in_float32 = step.state["exp_avg"].dtype == torch.float32
    average = step.state["exp_avg"]
    if not in_float32:
        average = torch.empty(step.param.shape, dtype=torch.float32, device=step.param.device)
    for index in indices:
        exp_avg = full_moments(step, index)["exp_avg"]
        averaged = exp_avg.load().lerp_(scaled_grad(step, index), 1 - hyper.beta1)
        if not in_float32:
            average[index] = averaged  # the update takes the average before it is rounded
        exp_avg.store(averaged)
    update = projection.project(step.state, average)
    update = update.clone() if projection is FULL_SPACE else update
    del average
    rotated = projection.project(step.state, step.grad).float()
    for index in indices:
        exp_avg_sq, grad = full_moments(step, index)["exp_avg_sq"], rotated[index]
        second = exp_avg_sq.load().mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
        update[index] = update[index] / (second.sqrt() + hyper.eps)
        exp_avg_sq.store(second)
    del rotated
    update = projection.project_back(step.state, update)
    if hyper.flags["normalize_grads"]:
        dims = matrix_dims(step)
        norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True) if update.ndim else update.abs()
        update = update / (1e-30 + norm / math.sqrt(update.numel() / norm.numel()))
    add(step, update, -scalars.step_size, scalars.decay)


def adafactor(step: ParamStep, hyper: Hyper) -> None:
    """Take `adafactor_rule` with row and column means, in the space of a projection if there is one."""
    step_size: float | Tensor = hyper.lr
    if hyper.flags["scale_parameter"]:
        norm = torch.linalg.vector_norm(step.weight().load(), dim=matrix_dims(step), keepdim=step.plan.stacked)
        count = step.param.numel() / norm.numel()
        step_size = hyper.lr * (norm / math.sqrt(count)).clamp(min=1e-3)
    decay = 1 - step_size * hyper.weight_decay
    if step.plan.projection is FULL_SPACE:
        adafactor_passes(step, hyper, step_size, decay)
    else:
        inner = in_subspace(step)
        adafactor_passes(inner, hyper, step_size, 1.0)
        add_back(step, inner.param, decay)


def adafactor_passes(step: ParamStep, hyper: Hyper, step_size: float | Tensor, decay: float | Tensor) -> None:
    """Take param <- decay * param - exp_avg: one pass for the means, one for the clipping, one for the update."""
    row, col = step.state["exp_avg_sq_row"].unsqueeze(-1), step.state["exp_avg_sq_col"].unsqueeze(-2)
    indices, shape, weight, scratch = list(tiles_of(step)), step.param.shape, step.weight(), Scratch(row.device)

    row_sum, col_sum = torch.zeros_like(row), torch.zeros_like(col)
    for index in indices:
        grad = scaled_grad(step, index)
        square = torch.mul(grad, grad, out=scratch.get("square", grad.shape)).add_(1e-30)
        broadcast_tile(row_sum, index).add_(square.sum(-1, keepdim=True))
        broadcast_tile(col_sum, index).add_(square.sum(-2, keepdim=True))
    beta2 = 1 - step.step ** hyper.flags["decay_rate"]
    row.mul_(beta2).add_(row_sum, alpha=(1 - beta2) / shape[-1])
    col.mul_(beta2).add_(col_sum, alpha=(1 - beta2) / shape[-2])
    row_factor, col_factor = (row / row.mean(-2, keepdim=True)).rsqrt(), col.rsqrt()

    def unclipped_update(index: Index) -> Tensor:
        grad = scaled_grad(step, index)
        scaled = torch.mul(grad, broadcast_tile(row_factor, index), out=scratch.get("square", grad.shape))
        return scaled.mul_(broadcast_tile(col_factor, index))

    dims = matrix_dims(step)
    energy = torch.zeros_like(row.sum(dims, keepdim=True))
    for index in indices:
        broadcast_tile(energy, index).add_(unclipped_update(index).square_().sum(dims, keepdim=True))
    rms = (energy / (step.param.numel() / energy.numel())).sqrt()
    factor = step_size / (rms / hyper.flags["clip_threshold"]).clamp(min=1.0)
    for index in indices:
        tile, update = weight[index], unclipped_update(index).mul_(broadcast_tile(factor, index))
        exp_avg = full_moments(step, index)["exp_avg"]
        averaged = exp_avg.load().lerp_(update, 1 - hyper.beta1)
        shrink = broadcast_tile(decay, index) if isinstance(decay, Tensor) else decay
        tile.store(tile.load(scratch).mul_(shrink).sub_(averaged))
        exp_avg.store(averaged)


IN_PLACE = InPlace()
