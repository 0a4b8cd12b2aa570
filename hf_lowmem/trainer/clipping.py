"""The Trainer's clipping and its backward pass for optimizers with `fused_clip=true` or `release=true`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.release import GradientRelease
from hf_lowmem.trainer.callbacks import unwrapped

REPLICATED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU)
_clip_grad_norm_, _backward = Accelerator.clip_grad_norm_, Accelerator.backward


def clip_grad_norm_(
    self: Accelerator, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2
) -> Any:
    """Clip as `Accelerator.clip_grad_norm_` does, or by `LowMemOptimizer.clip_grad_norm_` where that is possible.

    Gradients that an optimizer has released are clipped by their release. Otherwise it is possible if an optimizer
    with `fused_clip` steps exactly those of these parameters that have a gradient, and every process has all of their
    gradients, or under FSDP2 its shard of each.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if (release := release_of(self)) is not None:
        return release.clip(parameters, max_norm)
    if float(norm_type) == 2 and (self.distributed_type in REPLICATED or getattr(self, "is_fsdp2", False)):
        wanted = {id(param) for param in parameters if param.grad is not None}
        for optimizer in map(unwrapped, self._optimizers):
            if isinstance(optimizer, LowMemOptimizer) and any(group["fused_clip"] for group in optimizer.param_groups):
                stepped = (param for group in optimizer.param_groups for param in group["params"])
                if wanted == {id(param) for param in stepped if param.grad is not None}:
                    self.unscale_gradients()
                    return optimizer.clip_grad_norm_(max_norm)
    return _clip_grad_norm_(self, parameters, max_norm, norm_type=norm_type)


def backward(self: Accelerator, loss: Tensor, **kwargs: Any) -> None:
    """Compute gradients as `Accelerator.backward` does, twice where a release finds their norm by `recompute`."""
    release = release_of(self)
    if release is None or not release.recomputes:
        _backward(self, loss, **kwargs)
    else:
        release.backward(loss, lambda loss, **retains: _backward(self, loss, **kwargs, **retains))


def release_of(accelerator: Accelerator) -> GradientRelease | None:
    """Return what releases the gradients of an optimizer of ours, if it does."""
    for optimizer in map(unwrapped, accelerator._optimizers):
        if isinstance(optimizer, LowMemOptimizer) and optimizer.gradient_release is not None:
            return optimizer.gradient_release
    return None
