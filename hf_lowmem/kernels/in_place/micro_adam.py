"""MicroAdam in plain torch, in parts of whole blocks or whole buckets: its window, its error, its update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.means import scaled_grad, tile_size
from hf_lowmem.kernels.passes import Passes, RulePasses
from hf_lowmem.moments import TopKWindow

LARGEST_PART = 1 << 22  # entries, whose keys and places take 8 bytes each


def covers(step: ParamStep) -> bool:
    """Return whether weight and gradient are contiguous, so that their entries can be counted in memory order."""
    return step.param.is_contiguous() and step.grad.is_contiguous()


def micro_adam(step: ParamStep, hyper: Hyper) -> Passes:
    """Take `micro_adam_rule` without a temporary of the weight's size; nothing is summed over the weight."""
    window, state, dtype = cast(TopKWindow, step.plan.moments["window"]), step.state, step.plan.arithmetic
    number = step.step.double() if isinstance(step.step, Tensor) else step.step
    flat, weight = step._replace(grad=step.grad.view(-1)), step.weight().map(lambda tensor: tensor.view(-1))
    betas, alpha = (hyper.beta1, hyper.beta2), hyper.flags["alpha"]
    blocks, buckets = (list(parts(step, unit)) for unit in (window.block_size, window.bucket_size))

    def grad_of(part: slice) -> Tensor:
        return scaled_grad(flat, (part,)) + window.error(state, part.start, part.stop, dtype)

    for part in blocks:
        window.push(state, grad_of(part), part.start, number)
    for part in buckets:
        window.set_error(state, grad_of(part), part.start, number)
    for part in blocks:
        ...
    for part in buckets if alpha else ():
        window.encode_error(state, window.error(state, part.start, part.stop, dtype, 1 - alpha), part.start)
    yield from ()
