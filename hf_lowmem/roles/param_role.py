"""What a role is: the legal names with their meanings, and the record that a parameter gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_lowmem.roles.fused_layouts import FusedPart

ROLES = {
    "attention_query": "query projection; head_dim rows per head",
    "attention_key": "key projection; head_dim rows per head",
    "attention_value": "value projection",
    "attention_output": "projection of the concatenated heads back to the residual stream",
    "attention_qkv": "fused query, key and value projection; `parts` says which rows are which",
    "attention_key_value": "fused key and value projection (MLA's kv_b_proj, the cross-attention of GPT-2)",
    "attention_down": "MLA's projection down to the latent (q_a_proj, kv_a_proj_with_mqa)",
    "mlp_up": "input projection of an MLP, or the linear half of a gated MLP",
    "mlp_gate": "the half of a gated MLP that goes through the activation",
    "mlp_gate_up": "fused gate and up projection; `parts` says which rows are which",
    "mlp_down": "output projection of an MLP",
    "router": "scores of the experts",
    "token_embedding": "token embedding, one row per token; also the head where the two are tied",
    "position_embedding": "position embedding, one row per position",
    "embedding": "any other nn.Embedding, such as that of token types",
    "lm_head": "language-model head that is not tied, one row per token",
    "classifier": "head for classification, regression, pooling or values",
    "ssm": "matrix of a state-space, gated linear-attention or gated short-convolution mixer, and A_log",
    "projection": "any other linear map in the body: between towers or widths, or a gate of an attention's output",
    "conv": "convolution; has no axes if it is grouped or depthwise",
    "patch_conv": "convolution whose stride is its kernel size, which is a Linear over patches",
    "norm": "scale of a normalisation layer",
    "bias": "bias of any rank",
    "vector": "any other tensor of at most one axis (sinks, D, dt_bias)",
    "relative_bias": "table of relative position biases, one column per head",
    "lora_A": "LoRA factor (rank, fan_in)",
    "lora_B": "LoRA factor (fan_out, rank)",
    "lora_embedding_A": "LoRA factor (rank, vocab) of an embedding",
    "lora_embedding_B": "LoRA factor (dim, rank) of an embedding",
    "lora_magnitude": "magnitudes of DoRA",
    "adapter": "any other trained tensor of a PEFT method (AdaLoRA's lora_E, IA3, LoHa, LoKr, OFT, soft prompts)",
    "unknown": "not recognised; has axes only where the type of the module gives them",
}


@dataclass(frozen=True)
class ParamRole:
    """The role of one parameter.

    Args:
        name: the canonical name of the parameter.
        shape: its shape.
        role: one of `ROLES`.
        fan_out: the axis of the output features, which for an embedding (vocab, dim) is that of the tokens. None if
            there is no such axis, as in vectors and unknown tensors.
        fan_in: the axes of the input features; empty if there are none.
        expert_axis: the axis that counts stacked experts, also in their biases. It is never averaged over.
        head_dim: the number of consecutive fan_out entries of one attention head, for queries and keys only; in a
            fused weight it holds within the query and the key part.
        parts: the parts of a fused weight; empty if the weight is not fused or its layout is not known.
        tied: whether the parameter is both the input and the output embedding.
        why: the evidence that the role was read from, in a few words.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    fan_out: int | None = None
    fan_in: tuple[int, ...] = ()
    expert_axis: int | None = None
    head_dim: int | None = None
    parts: tuple[FusedPart, ...] = ()
    tied: bool = False
    why: str = ""


MakeRole = Callable[..., ParamRole]  # ParamRole with the name and the shape, and sometimes the axes, filled in
