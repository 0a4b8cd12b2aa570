"""H-Fac: Adafactor's second moment, and a momentum of the gradient's row and column means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.moments import Full, GroupMean, whole
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import POSITIVE, Options, decided_by_role, flag
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Moment, Moments, StatePlan
from hf_lowmem.update_rules import (
    SMALLEST,
    BoundProjection,
    Number,
    finite_root_mean_square,
    unbiased_decay,
    update_rule,
)


@update_rule("h_fac", elementwise=False)
def h_fac_rule(
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
    momentum_in_correction: str,
) -> Tensor:
    """H-Fac (arXiv:2406.09958) of a matrix, whose columns are all axes but the first; `eps` is not used.

    With the updated momentum, u - mean(g) is beta1 times what it is with the previous one.
    """
    decay1, decay2 = unbiased_decay(beta1, step), unbiased_decay(beta2, step)
    matrix = range(1 if space.stacked else 0, grad.ndim)
    has_square = grad.square().isfinite()
    finite, correction = torch.where(has_square, grad, 0.0), torch.zeros_like(grad)
    factor = torch.where(
        has_square, grad, grad * 0.0
    )  # NaN for NaN and Inf; an infinite second moment stops the others
    for side, axes in (("row", tuple(matrix[1:])), ("col", (matrix[0],))):
        mean = moments[f"exp_avg_{side}"].ema(finite, decay1)
        mean_sq = moments[f"exp_avg_sq_{side}"].ema(finite.square() + SMALLEST, decay2)
        correction = correction + (mean - finite.mean(axes, keepdim=True)) / mean_sq.sqrt()
        factor = factor * mean_sq.rsqrt()
    unclipped = factor * mean_sq.mean(tuple(matrix), keepdim=True).sqrt()  # rows and columns have one mean
    update = unclipped / (finite_root_mean_square(unclipped, space.stacked) / clip_threshold).clamp(min=1.0)
    share = 0.5 if momentum_in_correction == "previous" else 0.5 * decay1
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * (share * correction + update)
    return new_param


@dataclass(frozen=True)
class HFacOptions(Options):
    """The options of H-Fac."""

    clip_threshold: float = flag(
        1.0, "largest root mean square of the normalized gradient; the correction is not clipped.", POSITIVE
    )
    momentum_in_correction: Literal["updated", "previous"] = flag(
        "updated",
        'which means the correction takes: "updated", those that hold this step\'s gradient, as the equations are '
        'printed; or "previous", by which the correction is larger by 1 / betas[0].',
    )
    stacked: bool = decided_by_role(False, "take the first axis as a stack of matrices, each with its own means.")


class HFac(LowMemOptimizer):
    """Adafactor's normalized gradient, corrected towards the running means of the gradient's rows and columns.

        u <- b1(t) u + (1 - b1(t)) mean_columns(G),            v likewise over rows
        r <- b2(t) r + (1 - b2(t)) mean_columns(G^2 + 1e-30),  s likewise over rows
        U <- G / sqrt(r / mean(r) s);  U <- U / max(1, rms(U) / clip_threshold)
        P <- b1(t) ((u - mean_columns(G)) / sqrt(r) + (v - mean_rows(G)) / sqrt(s)) / 2
        W <- W - lr (P + U + weight_decay W),                  b(t) = b (1 - b^(t - 1)) / (1 - b^t)

    H-Fac is experimental. It is from arXiv:2406.09958, but there is no code of the authors', the equations are those
    that junaidaliop/zij@74a271e prints, and none of the paper's figures has been reproduced. The source leaves open
    whether P takes u before or after its update (`momentum_in_correction`), how b1 is corrected, and what vectors do.

    Weights of more than two axes are matrices of (first axis, all others), each expert of a stack its own; vectors and
    scalars take AdamW. A gradient that is not finite spoils its own entry only, and is left out of the means.

    The state of an (m, n) matrix is exp_avg_row and exp_avg_sq_row (m, 1), exp_avg_col and exp_avg_sq_col (1, n), all
    float32, and step; that of a vector is `LowMemAdamW`'s, and `eps` is used for vectors only.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = HFac([weight], lr=1e-3)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> print(optimizer)
    HFac(): groups: 1, parameters: 1 of 8,192 entries, state: 1.50 KiB
    """

    algorithm = "h_fac"
    rule = "h_fac"
    options_cls = HFacOptions

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        stacked = options["stacked"] and len(shape) > 1
        moments: dict[str, Moment] = {"exp_avg": Full(), "exp_avg_sq": Full(signed=False)}
        if len(shape) > (2 if stacked else 1):
            moments = {name: mean for each in moments for name, mean in side_means(each, shape, stacked).items()}
        return StatePlan(moments, codec_of(shape, options), stacked=stacked)

    @classmethod
    def rule_of(cls, plan: StatePlan, group: Mapping[str, Any]) -> str:
        return cls.rule if "exp_avg_row" in plan.moments else "adamw"


def side_means(name: str, shape: tuple[int, ...], stacked: bool) -> dict[str, GroupMean]:
    """Return the means of each row and of each column of a matrix, or of each matrix of a stack."""
    rows, *columns = range(1 if stacked else 0, len(shape))
    return {f"{name}_row": whole(shape, tuple(columns)), f"{name}_col": whole(shape, (rows,))}


@dataclass(frozen=True)
class HFacRecipe(Recipe, HFacOptions):
    """H-Fac, in which the experts of a stack are matrices of their own."""

    optimizer_cls = HFac
    caution = (
        "H-Fac is experimental: there is no code of its authors' to compare with, and its equations are from a "
        "secondary source."
    )

    def options_of(self, role: ParamRole) -> RoleOptions:
        if role.expert_axis == 0:
            return {"stacked": True}, "the means of each expert's rows and columns"
        return {}, "the means of rows and columns" if len(role.shape) > 1 else "AdamW keeps every entry"
