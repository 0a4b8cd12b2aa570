"""Adam-mini: one second-moment number per smallest dense block of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_lowmem.algorithms.grouped import LOSE_BY_MEANS, GroupedAdamW, RulesRecipe, segments_of
from hf_lowmem.options import recipe_only
from hf_lowmem.param_groups import RoleOptions
from hf_lowmem.roles import ParamRole

ELEMENTWISE = (
    "bias",
    "vector",
    "relative_bias",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude",
)


class AdamMini(GroupedAdamW):
    """AdamW that keeps one second-moment number per block: token, head, output neuron, norm.

        v_b <- b2 v_b + (1 - b2) mean(g^2, block b)
        m   <- b1 m + (1 - b1) g
        w   <- w - lr (m_hat / (sqrt(v_hat_b) + eps) + weight_decay w)

    Source: arXiv:2406.16793, algorithms 1 to 3; authors' code zyushun/Adam-mini@402aadf, version 1.1.1.
    It departs from them: roles come from modules and not from substrings of names; heads have the attention module's
    head_dim; experts have blocks of their own; and a weight whose role is in doubt gets finer blocks, never one
    number.

    The state of a (fan_out, fan_in) weight is exp_avg of its shape, and exp_avg_sq (fan_out / rows_per_block, 1).

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = AdamMini([weight], lr=1e-3, axes=(1,), rows_per_block=8)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[weight]["exp_avg_sq"].shape
    torch.Size([8, 1])
    """

    algorithm = "adam_mini"


@dataclass(frozen=True)
class AdamMiniRecipe(RulesRecipe):
    """Adam-mini, and which entries of which weight form a block.

    MLPs, embeddings and the head, which lose quality by a mean per neuron or token, are factored unless `rules=paper`.
    """

    value: Literal["row", "tensor"] = recipe_only(
        "row",
        '"row" gives each output of the value projection a number; "tensor" gives the whole projection one, which '
        "the authors do for runs under 10 to 20 thousand steps.",
    )

    optimizer_cls = AdamMini
    factored_roles = LOSE_BY_MEANS

    def options_by_role(self, role: ParamRole) -> RoleOptions:
        if role.role == "norm":
            return {"axes": tuple(range(len(role.shape)))}, "one per norm"
        if role.role in ELEMENTWISE or role.fan_out is None:
            return {}, f"elementwise: {role.role}"
        if role.parts and role.role != "mlp_gate_up":  # gate|up is by output row, whichever half a row is in
            parts = [self._block(role, part.role, part.outer * (part.stop - part.start)) for part in role.parts]
            return segments_of(role, parts), "one rule per fused part"
        options = self._block(role, role.role, role.shape[role.fan_out])
        return options, "one per head" if "rows_per_block" in options else "one per output row"

    def _block(self, role: ParamRole, name: str, rows: int) -> dict[str, Any]:
        """Return the options of a weight, or of a part of it, that is called `name` and has that many output rows."""
        assert role.fan_out is not None
        if name in ("attention_query", "attention_key") and role.head_dim and rows % role.head_dim == 0:
            return {"axes": role.fan_in, "rows_per_block": role.head_dim}
        if name == "attention_value" and self.value == "tensor":
            return {"axes": tuple(sorted((role.fan_out, *role.fan_in)))}
        return {"axes": role.fan_in}
