"""The step of a bucket: what surrounds the backend's own for weights that are projected or that wrap other tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from hf_lowmem.dense import densified, is_plain
from hf_lowmem.kernels import COMPILED, Backend
from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.registry import find_backend
from hf_lowmem.state import FULL_SPACE


def step_bucket(bucket: Bucket, hyper: Hyper) -> None:
    """Step all parameters of a bucket whose idle calls are over, and change the bases that are due."""
    if bucket.pieces:
        bucket.backend.apply(bucket, hyper)
    elif not is_plain(bucket.params[0]):
        step_dense_copy(bucket, hyper)
    elif any(plan.projection is not FULL_SPACE for plan in bucket.plans):
        step_projected(bucket.rule, list(bucket), bucket.backend, hyper)
    elif bucket.backend is COMPILED or not all(map(is_due, bucket.steps)):
        step_these(bucket.rule, list(bucket), bucket.backend, hyper)
    else:
        bucket.backend.step(bucket, hyper)


def is_due(step: float | Tensor) -> bool:
    """Return whether a step updates the weight; under `capturable` all do."""
    return isinstance(step, Tensor) or step > 0


def step_these(rule: str, steps: Sequence[ParamStep], backend: Backend, hyper: Hyper) -> None:
    """Step those parameters that are due, which may be clipped or not."""
    by_clip: dict[bool, list[ParamStep]] = defaultdict(list)
    for step in steps:
        if is_due(step.step):
            by_clip[step.clip is not None].append(_in_one_dtype(step) if backend is COMPILED else step)
    for same in by_clip.values():
        backend.step(Bucket.of(same, rule, backend), hyper)


def _in_one_dtype(step: ParamStep) -> ParamStep:
    """Return a step whose gradient has the dtype of the arithmetic where it is not the weight's.

    Products and compiled steps take one dtype; kernels and rules read any.
    """
    return step if step.grad.dtype == step.param.dtype else step._replace(grad=step.grad.to(step.plan.arithmetic))


def step_projected(rule: str, steps: Sequence[ParamStep], backend: Backend, hyper: Hyper) -> None:
    """Step parameters of which some are projected, and change their bases before or after it."""
    steps = [_in_one_dtype(step) if step.plan.projection is not FULL_SPACE else step for step in steps]
    steps = [step.clipped() if step.plan.projection.takes_gradient(step.state) else step for step in steps]
    # A basis is found from numbers, which a gradient on the meta device does not have.
    projected = [step for step in steps if step.plan.projection is not FULL_SPACE and not step.grad.is_meta]
    for step in projected:
        moments = step.plan.bind(step.state, tuple(step.grad.shape))
        step.plan.projection.before_step(step.grad, step.state, moments)
    step_these(rule, steps, backend, hyper)
    for step in projected:
        moments = step.plan.bind(step.state, tuple(step.grad.shape))
        step.plan.projection.after_step(step.grad, step.state, moments, hyper.beta2)


def step_dense_copy(bucket: Bucket, hyper: Hyper) -> None:
    """Step a weight that is a wrapper subclass, whose entries only its own functions can read and write."""
    (step,) = bucket
    # A weight that rounds to nearest keeps float32's digits for the wrapper's own rounding.
    dtype = step.plan.arithmetic if step.plan.rounding.kind == "nearest" else step.param.dtype
    dense = step._replace(param=densified(step.param, dtype), grad=step.grad.to(dtype))
    backend = COMPILED if bucket.backend is COMPILED else find_backend(bucket.rule, dense)
    step_projected(bucket.rule, [dense], backend, hyper)
    step.param.copy_(dense.param)
