"""SOAP in plain torch: its moments in tiles, and its rotations as whole products."""

from __future__ import annotations

import torch

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.in_place.updates import add, entries_of_matrix, has_moments, sum_of_squares
from hf_lowmem.kernels.means import scaled_grad
from hf_lowmem.kernels.passes import Passes, RulePasses
from hf_lowmem.kernels.scalars import transformers_adamw_scalars
from hf_lowmem.kernels.tiles import full_moments, tiles_of
from hf_lowmem.moments import Full
from hf_lowmem.state import FULL_SPACE


def soap(step: ParamStep, hyper: Hyper) -> Passes:
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
        squares = sum_of_squares(update, step)
        yield [squares]
        update = update / (1e-30 + (squares.values / entries_of_matrix(step)).sqrt())
    add(step, update, -scalars.step_size, scalars.decay)


SOAP = RulePasses(lambda step: has_moments(step, Full), soap)
