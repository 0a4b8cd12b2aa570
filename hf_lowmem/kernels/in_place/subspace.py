"""AdamW in the space of a projection, by the backends of weights that are not projected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.in_place.updates import add, has_moments
from hf_lowmem.kernels.means import tile_size
from hf_lowmem.kernels.registry import Backend, find_backend
from hf_lowmem.moments import Full
from hf_lowmem.state import FULL_SPACE, StatePlan, Subspace

SUBSPACE_RULE = "transformers_adamw"


def is_in_subspace(step: ParamStep) -> bool:
    """Return whether a parameter is projected, with moments that can be stepped there."""
    return step.plan.projection is not FULL_SPACE and has_moments(step, Full)


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
