"""SMMF: both moments as the rank-1 factors of nearly square matrices, and one bit per entry for the signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.log import get_logger
from hf_lowmem.moments import Full, RankOne
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import Legal, Options, decided_by_role, flag, layout, schedule, with_default
from hf_lowmem.param_groups import Assignment, Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Moments, StatePlan
from hf_lowmem.update_rules import BoundProjection, Number, update_rule

logger = get_logger(__name__)


@update_rule("smmf", elementwise=True)
def smmf_rule(
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
    growth_rate: float,
    decay_rate: float,
) -> Tensor:
    """SMMF (arXiv:2412.08894), whose moments are not corrected for bias; `beta2` is not used."""
    g = space.project(grad)
    m = moments["exp_avg"].ema(g, beta1 * growth_rate ** (step - 1))
    v = moments["exp_avg_sq"].ema(g.square(), 1 - step**decay_rate)
    decayed = (param * (1 - lr * weight_decay)).to(grad.dtype)  # which is bfloat16 under `reference_rounding`
    new_param: Tensor = decayed - lr * space.project_back(m / (v.sqrt() + eps))
    return new_param


@dataclass(frozen=True)
class SmmfOptions(Options):
    """The options of SMMF."""

    growth_rate: float = flag(
        0.999,
        "factor of the first moment's decay from one step to the next, from 0 to 1: momentum fades, and 1.0 keeps it.",
        Legal("a number from 0 to 1", lambda value: isinstance(value, int | float) and 0 <= value <= 1),
    )
    decay_rate: float = flag(
        -0.5,
        "exponent of the second moment's decay, from -1 to 0; the authors advise -0.5 for convolutional networks and "
        "-0.8 for Transformers.",
        Legal("a number from -1 to 0", lambda value: isinstance(value, int | float) and -1 <= value <= 0),
    )
    mask_zero_grads: bool = schedule(
        False,
        "let the momentum of an entry whose gradient is exactly zero count as zero, so that embeddings of tokens that "
        "a batch does not have stay where they are; the authors' code moves them.",
    )
    reference_rounding: bool = schedule(
        True,
        "round a bfloat16 weight after its decay too, as the authors' code does, which loses a decay of "
        "`lr * weight_decay` below 2^-9; it takes `rounding=nearest`.",
    )
    vector_reshape: bool = layout(
        True, "factor vectors too; false keeps both moments of each entry of a vector, in `state_bits`."
    )
    stacked: bool = decided_by_role(False, "take the first axis as a stack of tensors, each with a square of its own.")


class Smmf(LowMemOptimizer):
    """AdamW's two moments in a bit and a few thousandths of a float per entry.

        G <- g as a matrix (n, m) that is as square as the number of entries allows, n >= m
        M <- b1(t) S |M| + (1 - b1(t)) G,    b1(t) = betas[0] growth_rate^(t - 1)
        V <- b2(t) V     + (1 - b2(t)) G^2,  b2(t) = 1 - t^decay_rate
        w <- w - lr (M / (sqrt(V) + eps) + weight_decay w)
        |M| and V are kept as row col^T,  row = A 1,  col = A^T 1 / sum(A);  S as one bit per entry

    Source: arXiv:2412.08894; authors' code KwangryeolPark/Official.SMMF@b4139f0.
    It departs from the code: signs take one bit, as in the paper, not one byte; gradients are widened to float32
    before they are squared; decay is decoupled only. Without momentum, betas[0] = 0, it is their beta=None. The
    defaults of this class are theirs; an optim name sets decay_rate=-0.8, mask_zero_grads=true and
    reference_rounding=false.

    The state of a weight of N = n m entries is exp_avg_row (n), exp_avg_col (m), exp_avg_sq_row and exp_avg_sq_col in
    float32; exp_avg_sign, N bits in uint8; and step. Vectors without `vector_reshape` have the state of `LowMemAdamW`;
    nothing else has full moments, which `state_bits` is about. `betas[1]` is accepted so that a Trainer's arguments
    fit, and not used.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = Smmf([weight], lr=1e-3, decay_rate=-0.8)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> print(optimizer)
    Smmf(decay_rate=-0.8): groups: 1, parameters: 1 of 8,192 entries, state: 2.50 KiB
    """

    algorithm = "smmf"
    rule = "smmf"
    options_cls = SmmfOptions

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        stacked = options["stacked"] and len(shape) > 1
        moments: dict[str, Any] = {
            "exp_avg": RankOne(stacked=stacked, mask_zeros=options["mask_zero_grads"]),
            "exp_avg_sq": RankOne(signed=False, stacked=stacked),
        }
        is_vector = sum(size != 1 for size in shape[1 if stacked else 0 :]) == 1
        if is_vector and not options["vector_reshape"]:
            moments = {"exp_avg": Full(), "exp_avg_sq": Full(signed=False)}
        return StatePlan(moments, codec_of(shape, options), stacked=stacked)

    @classmethod
    def state_plan(cls, shape: tuple[int, ...], dtype: torch.dtype, values: Mapping[str, Any]) -> StatePlan:
        plan = super().state_plan(shape, dtype, values)
        follows = values["reference_rounding"] and dtype == torch.bfloat16 and plan.rounding.kind == "nearest"
        return replace(plan, arithmetic=dtype) if follows and isinstance(plan.moments["exp_avg"], RankOne) else plan


@dataclass(frozen=True)
class SmmfRecipe(Recipe, SmmfOptions):
    """SMMF as the authors advise it for Transformers, with a square for each expert of a stack."""

    decay_rate: float = with_default(-0.8, SmmfOptions, "decay_rate")
    mask_zero_grads: bool = with_default(True, SmmfOptions, "mask_zero_grads")
    reference_rounding: bool = with_default(False, SmmfOptions, "reference_rounding")

    optimizer_cls = Smmf

    def check_use(self, assignments: Sequence[Assignment]) -> None:
        bits = {self.state_bits, self.embedding_bits or 32} - {32}
        if bits and not any(isinstance(self.state_plan(each).moments["exp_avg"], Full) for each in assignments):
            logger.warning(
                "state_bits and embedding_bits of %s change nothing under smmf, whose moments are all factored, into "
                "float32 and one bit for each sign.",
                ", ".join(map(str, sorted(bits))),
            )

    def options_of(self, role: ParamRole) -> RoleOptions:
        if role.expert_axis == 0:
            return {"stacked": True}, "a square for each expert"
        return {}, "one square"
