"""FAdam: Adam as a natural gradient step, with a clipped gradient and a weight decay by the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import POSITIVE, Options, decided_by_role, flag
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Moments, StatePlan
from hf_lowmem.update_rules import (
    SMALLEST,
    BoundProjection,
    Number,
    finite_root_mean_square,
    root_mean_square,
    unbiased_decay,
    update_rule,
)


@update_rule("fadam", elementwise=False)
def fadam_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    clip_threshold: float,
    mask_decay: bool,
) -> Tensor:
    """FAdam (arXiv:2405.12807, algorithm 1), in which a gradient that is all zero decays nothing."""
    f = moments["fim"].ema(grad.square(), unbiased_decay(beta2, step))
    rms = finite_root_mean_square(grad, space.stacked)
    scale = f.sqrt() + (eps * rms.clamp(max=1.0)).clamp(min=SMALLEST)
    n = grad / scale
    n = n / (finite_root_mean_square(n, space.stacked) / clip_threshold).clamp(min=1.0)
    m = moments["exp_avg"].ema(n, beta1)
    decays = param.isfinite() & f.isfinite() & (rms > 0)
    w = torch.where(decays & (f > 0) if mask_decay else decays, param / scale, 0.0)
    w = w / (root_mean_square(w, space.stacked) / clip_threshold).clamp(min=1.0)  # by infinity where that overflows
    new_param: Tensor = param - lr * (m + weight_decay * w)
    return new_param


@dataclass(frozen=True)
class FAdamOptions(Options):
    """The options of FAdam."""

    clip_threshold: float = flag(
        1.0, "largest root mean square of the natural gradient, and of the natural weight decay.", POSITIVE
    )
    mask_decay: bool = flag(
        True,
        "do not decay entries whose Fisher information is zero, as that of tokens and experts that no batch had is; "
        "false erases them within some hundred steps, as the public code does.",
    )
    stacked: bool = decided_by_role(
        False, "take the first axis as a stack of weights, each with root mean squares of its own."
    )


class FAdam(LowMemOptimizer):
    """Adam as a natural gradient step by the diagonal of the empirical Fisher information f.

        f <- b2(t) f + (1 - b2(t)) g^2,     b2(t) = b2 (1 - b2^(t - 1)) / (1 - b2^t)
        d <- sqrt(f) + max(eps min(1, rms(g)), 1e-30)
        n <- g / d;  n <- n / max(1, rms(n) / clip_threshold)
        m <- b1 m + (1 - b1) n
        r <- w / d;  r <- r / max(1, rms(r) / clip_threshold)
        w <- w - lr (m + weight_decay r)

    Source: arXiv:2405.12807, algorithm 1; checked against lessw2020/FAdam_PyTorch@93666b5, as there is no code of the
    author's. FAdam is for quality, not for memory: its state is as large as AdamW's.
    It departs from them: r is 0 where f is 0 and where all of a weight's gradient is, so that entries without a
    gradient are not erased; d is never 0, so that LoRA's first gradients, which are 0, do not turn its weights to NaN;
    a gradient that is not finite spoils its own entry only; each expert of a stack has its own rms.

    `weight_decay` is not on AdamW's scale: r has an rms of about clip_threshold however small w is, so that a step
    moves w by lr weight_decay towards zero where AdamW moves it by lr weight_decay w. The paper decays by 0.001, the
    public code by 0.1. m is not corrected for bias, so the first steps are small.

    The state of a weight is exp_avg (the momentum m) and fim (f) of its shape, and step. In 8 bits both are as the
    moments of `LowMemAdamW`, where the codes of f hold its root.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = FAdam([weight], lr=1e-3, weight_decay=1e-3)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> print(optimizer)
    FAdam(weight_decay=0.001): groups: 1, parameters: 1 of 8,192 entries, state: 64.00 KiB
    """

    algorithm = "fadam"
    rule = "fadam"
    options_cls = FAdamOptions

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        moments = {"exp_avg": Full(), "fim": Full(signed=False)}
        return StatePlan(moments, codec_of(shape, options), stacked=options["stacked"] and len(shape) > 1)


@dataclass(frozen=True)
class FAdamRecipe(Recipe, FAdamOptions):
    """FAdam, which keeps every entry of both moments."""

    optimizer_cls = FAdam
    caution = (
        "FAdam is for quality, not for memory: its state takes {bytes:.2f} bytes per parameter here, where AdamW's "
        "takes about {adamw} in the same storage. Its weight decay is not on AdamW's scale: see docs/fadam.md."
    )

    def options_of(self, role: ParamRole) -> RoleOptions:
        if role.expert_axis == 0:
            return {"stacked": True}, "the Fisher information of every entry, clipped by expert"
        return {}, "the Fisher information of every entry"
