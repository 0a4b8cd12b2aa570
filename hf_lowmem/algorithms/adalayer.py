"""Adalayer: one second-moment number per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_lowmem.algorithms.grouped import GroupedAdamW, RulesRecipe, segments_of
from hf_lowmem.options import recipe_only
from hf_lowmem.param_groups import EMBEDDINGS, RoleOptions
from hf_lowmem.roles import ParamRole


class Adalayer(GroupedAdamW):
    """AdamW that keeps one second-moment number per weight, and one per logit of the last layer.

        m   <- b1 m + (1 - b1) g
        v_l <- b2 v_l + (1 - b2) mean(g^2)
        w   <- w - lr (m_hat / (sqrt(v_hat_l) + eps) + weight_decay w)

    Source: arXiv:2407.07972. The order of decay and bias correction is that of the rules that SlimAdam's authors ship
    (dayal-kalra/low-memory-adam@bb3652c, adalayer_rules.json).
    Each expert of a stack and each part of a fused weight is a layer of its own. Adalayer is less stable than SlimAdam
    at high learning rates.

    The state of a weight is exp_avg of its shape, and exp_avg_sq with size 1 on every axis but the experts'.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = Adalayer([weight], lr=1e-3, axes=(0, 1))
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[weight]["exp_avg_sq"].shape
    torch.Size([1, 1])
    """

    algorithm = "adalayer"


@dataclass(frozen=True)
class AdalayerRecipe(RulesRecipe):
    """Adalayer, and which weights get one number.

    Embeddings and the head, which lose most by a single mean, are factored unless the algorithm is a paper's.
    """

    variant: Literal["star", "all", "slim_repo"] = recipe_only(
        "star",
        '"star" gives every weight one number, and the last layer, where it is not factored, one per logit. Two '
        'others are of papers, without factored weights and a limit: "all" gives the last layer one number too, and '
        '"slim_repo" keeps the full second moment of embeddings, head and norms, as the rules of SlimAdam\'s authors.',
    )

    optimizer_cls = Adalayer
    factored_roles = frozenset((*EMBEDDINGS, "lm_head"))

    @property
    def is_papers(self) -> bool:
        return super().is_papers or self.variant != "star"

    def options_by_role(self, role: ParamRole) -> RoleOptions:
        if self.variant == "slim_repo" and role.role in (*EMBEDDINGS, "lm_head", "norm"):
            return {}, "variant=slim_repo"
        if self.variant == "star" and (role.role in ("lm_head", "classifier") or role.tied):
            return {"axes": role.fan_in}, "last layer: one per logit"
        fused = role.role in ("attention_qkv", "attention_key_value", "mlp_gate_up")
        adapter = role.role.startswith("lora_") and role.role != "lora_magnitude"
        if len(role.shape) > 1 and (
            role.role == "unknown" or (fused and not role.parts) or (adapter and role.fan_out is None)
        ):
            return {}, f"may hold several layers: {role.why}"
        axes = tuple(axis for axis in range(max(len(role.shape), 1)) if axis != role.expert_axis)
        if role.parts:
            return segments_of(role, [{"axes": axes}] * len(role.parts)), "one per fused part"
        return {"axes": axes}, "one per weight"
