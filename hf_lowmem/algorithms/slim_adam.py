"""SlimAdam: one second-moment number per row or column of a weight, along the axis where the paper found it safe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_lowmem.algorithms.calibration import CalibratedAdamW, CalibratedRecipe
from hf_lowmem.algorithms.grouped import LOSE_BY_MEANS, segments_of
from hf_lowmem.options import recipe_only
from hf_lowmem.param_groups import RoleOptions
from hf_lowmem.roles import ParamRole

# Table 1 of the paper says which axes are averaged over. "One per token" for embeddings is their fan_in.
FAN_IN = (
    "attention_query",
    "attention_key",
    "token_embedding",
    "position_embedding",
    "embedding",
    "lm_head",
    "patch_conv",
)
FAN_OUT = ("attention_value", "attention_output", "mlp_up", "mlp_gate", "mlp_down")
CONTESTED = ("mlp_up", "mlp_gate")  # the rows that the authors' code marks as inconsistent across models


class SlimAdamW(CalibratedAdamW):
    """AdamW that keeps one second-moment number per row or column of a weight.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) mean(g^2, axes)
        w <- w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    Source: arXiv:2503.01843, table 1; authors' code dayal-kalra/low-memory-adam@bb3652c.
    It departs from them: the reduced moment is float32 whatever the weight's dtype.

    The state of a (fan_out, fan_in) weight is exp_avg of its shape, and exp_avg_sq (fan_out, 1) or (1, fan_in). A
    fused weight has exp_avg_sq_<part> for each of its parts.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = SlimAdamW([weight], lr=1e-3, axes=(1,))
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[weight]["exp_avg_sq"].shape
    torch.Size([64, 1])
    """

    algorithm = "slim_adamw"


@dataclass(frozen=True)
class SlimAdamRecipe(CalibratedRecipe):
    """SlimAdam, and which axis of which weight is averaged.

    MLPs, embeddings and the head, which lose quality by the paper's means, are factored unless `rules=paper`.
    """

    conservative: bool = recipe_only(
        False,
        "keep the full second moment of MLP up and gate projections, which the authors mark as inconsistent across "
        "models.",
    )
    fused: Literal["split", "full"] = recipe_only(
        "split",
        '"split" takes each part of a fused QKV or gate-up weight as a weight of its own; "full" keeps the full '
        "second moment of such weights.",
    )
    lora: Literal["full", "fan_in"] = recipe_only("full", '"fan_in" averages `lora_A` over its inputs.')

    optimizer_cls = SlimAdamW
    factored_roles = LOSE_BY_MEANS

    def options_by_role(self, role: ParamRole) -> RoleOptions:
        if role.parts:
            if self.fused == "full":
                return {}, "fused=full"
            if self.conservative and any(part.role in CONTESTED for part in role.parts):
                return {}, "conservative=true"
            return segments_of(role, [self._table(role, part.role) for part in role.parts]), "one rule per fused part"
        if self.conservative and role.role in CONTESTED:
            return {}, "conservative=true"
        if role.role == "lora_A" and self.lora == "fan_in":
            return {"axes": role.fan_in}, "lora=fan_in"
        options = self._table(role, role.role)
        if options:
            return options, f"mean over {'fan_in' if role.role in FAN_IN else 'fan_out'}"
        return {}, f"elementwise: {role.why}"

    @staticmethod
    def _table(role: ParamRole, name: str) -> dict[str, Any]:
        """Return the options that the paper's table has for a weight, or a part of it, that is called `name`."""
        if role.fan_out is None:
            return {}
        if name in FAN_IN:
            return {"axes": role.fan_in}
        return {"axes": (role.fan_out,)} if name in FAN_OUT else {}
