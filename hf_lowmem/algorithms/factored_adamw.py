"""Factored AdamW: AdamW whose second moment is estimated from the means of its rows and of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_lowmem.algorithms.calibration import CalibratedAdamW, CalibratedOptions, CalibratedRecipe
from hf_lowmem.algorithms.candidates import AUTO
from hf_lowmem.algorithms.grouped import LimitedOptions, factored
from hf_lowmem.moments import whole
from hf_lowmem.options import decided_by_role, recipe_only, with_default
from hf_lowmem.param_groups import RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Moment

IN_FULL = ("router", "classifier", "relative_bias", "adapter", "unknown")  # small, or not known to be one matrix


@dataclass(frozen=True)
class FactoredOptions(CalibratedOptions):
    """Options of a weight whose second moment is factored."""

    update_limit: float | Literal["auto"] = with_default(AUTO, LimitedOptions, "update_limit")
    factored: bool = decided_by_role(
        True,
        "whether a weight of two or more axes, without `axes` and `segments`, is factored over its last two axes.",
    )


class FactoredAdamW(CalibratedAdamW):
    """AdamW whose second moment is the rank-1 estimate from the means of its rows and of its columns.

        m <- b1 m + (1 - b1) g
        r <- b2 r + (1 - b2) mean(g^2, columns)
        c <- b2 c + (1 - b2) mean(g^2, rows)
        v =  r c / mean(r)
        w <- w - lr (m_hat / (sqrt(v_hat + (m_hat / update_limit)^2) + eps) + weight_decay w)

    Source: the estimate is that of Adafactor (arXiv:1804.04235, algorithm 4), the step AdamW's (arXiv:1711.05101,
    algorithm 2).
    It departs from Adafactor: b2 is constant and its bias is corrected, eps is AdamW's, and in place of clipping the
    update's root mean square each entry is limited. An estimate may be far below the entry's own second moment, as
    where most entries of a gradient are zero. This optimizer moves no entry by more than `update_limit` times lr,
    beside the weight decay; the default is the largest update that AdamW itself can take. A limit
    shortens all updates, one of lr by 1 % with betas of 0.9 and 0.999, and by 24 % with 0.9 and 0.95.

    The state of a (fan_out, fan_in) weight is exp_avg of its shape, exp_avg_sq_row (fan_out, 1) and exp_avg_sq_col
    (1, fan_in), both float32. A fused weight has exp_avg_sq_<part>_row and exp_avg_sq_<part>_col for each of its
    parts, and each of a stack of experts has means of its own.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = FactoredAdamW([weight], lr=1e-3, state_bits=8)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> print(optimizer)
    FactoredAdamW(state_bits=8): groups: 1, parameters: 1 of 8,192 entries, state: 9.00 KiB
    """

    algorithm = "factored_adamw"
    options_cls = FactoredOptions
    full_options: ClassVar[dict[str, Any]] = {"factored": False}

    @classmethod
    def second_moment(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> Moment:
        by_itself = options["factored"] and not (options["axes"] or options["segments"])
        if by_itself and len(shape) > 1:
            return whole(shape, (-1,), cross_axes=(-2,))
        return super().second_moment(shape, options)


@dataclass(frozen=True)
class FactoredAdamWRecipe(CalibratedRecipe):
    """Factored AdamW, and which weights are factored: every matrix."""

    lora: Literal["full", "factored"] = recipe_only("full", '"factored" factors the matrices of LoRA adapters too.')

    optimizer_cls = FactoredAdamW
    without_roles = "every matrix is factored over its last two axes"

    def options_by_role(self, role: ParamRole) -> RoleOptions:
        if role.role in IN_FULL or role.fan_out is None:
            return {"factored": False}, f"elementwise: {role.role}"
        if role.role.startswith("lora_") and self.lora == "full":
            return {"factored": False}, "lora=full"
        return factored(role), "the means of rows and columns" + (" of each fused part" if role.parts else "")

    def options_from_file(self, role: ParamRole, value: Any) -> dict[str, Any]:
        return super().options_from_file(role, value) or FactoredAdamW.full_options
