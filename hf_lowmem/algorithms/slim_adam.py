"""SlimAdam: one second-moment number per row or column of a weight, along the axis where the paper found it safe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_lowmem.algorithms.adamw import GroupedAdamW, segments_of
from hf_lowmem.param_groups import FULL, Recipe, Treatment
from hf_lowmem.roles import ParamRole

# Table 1 of the paper: the axes averaged over. "One per token" for embeddings is their fan_in.
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


class SlimAdamW(GroupedAdamW):
    """AdamW that keeps one second-moment number per row or column of a weight.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) mean(g^2, axes)
        w <- w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    Source: arXiv:2503.01843, table 1; authors' code dayal-kalra/low-memory-adam@bb3652c.
    Departs from it: the reduced moment is float32 whatever the weight's dtype.

    State per (fan_out, fan_in) weight: exp_avg (fan_out, fan_in); exp_avg_sq (fan_out, 1) or (1, fan_in);
    exp_avg_sq_<part> for each part of a fused weight.
    """

    algorithm = "slim_adamw"


@dataclass(frozen=True)
class SlimAdamRecipe(Recipe):
    """Which axis of which weight is averaged.

    Args:
        rules: path of a JSON file with rules by name, which go before the table.
        conservative: keep the full second moment of MLP up and gate projections.
        fused: "split" gives each part of a fused weight its own rule; "full" keeps its full second moment.
        lora: "full", or "fan_in" to average lora_A over its inputs.
    """

    rules: str | None = None
    conservative: bool = False
    fused: Literal["split", "full"] = "split"
    lora: Literal["full", "fan_in"] = "full"

    algorithm = "slim_adamw"
    optimizer_cls = SlimAdamW

    def treat(self, role: ParamRole) -> Treatment:
        if role.parts:
            if self.fused == "full":
                return FULL, "fused=full"
            if self.conservative and any(part.role in CONTESTED for part in role.parts):
                return FULL, "conservative=true"
            return segments_of(role, [self._table(role, part.role) for part in role.parts]), "one rule per fused part"
        if self.conservative and role.role in CONTESTED:
            return FULL, "conservative=true"
        if role.role == "lora_A" and self.lora == "fan_in":
            return {"axes": role.fan_in}, "lora=fan_in"
        options = self._table(role, role.role)
        if options:
            return options, f"mean over {'fan_in' if role.role in FAN_IN else 'fan_out'}"
        return FULL, f"elementwise: {role.why}"

    @staticmethod
    def _table(role: ParamRole, name: str) -> dict[str, Any]:
        if role.fan_out is None:
            return FULL
        if name in FAN_IN:
            return {"axes": role.fan_in}
        return {"axes": (role.fan_out,)} if name in FAN_OUT else FULL
