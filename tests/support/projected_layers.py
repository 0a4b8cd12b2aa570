"""Which weights of a layer of each family COAP projects, by hand."""

from __future__ import annotations

from hf_lowmem.planner import Explanation

BODY_ROLES = {"attention_query", "attention_key", "attention_value", "attention_output", "attention_qkv"}
BODY_ROLES |= {"mlp_gate", "mlp_up", "mlp_gate_up", "mlp_down"}

# Of the first layer of each family: (shape of proj, shape of exp_avg). Hidden 32, intermediate 48, 4 heads of which 2
# are keys' and values'; gpt_oss has heads of 16, the mixtures of experts have 4.
LAYERS: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (32, 4)),  # square: the inputs' side
        "model.layers.0.self_attn.k_proj.weight": ((4, 16), (4, 32)),  # (16, 32): the outputs' side
        "model.layers.0.self_attn.v_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.gate_proj.weight": ((4, 32), (48, 4)),
        "model.layers.0.mlp.up_proj.weight": ((4, 32), (48, 4)),
        "model.layers.0.mlp.down_proj.weight": ((4, 32), (4, 48)),
    },
    "gpt2": {  # stored (inputs, outputs)
        "transformer.h.0.attn.c_attn.weight": ((4, 32), (96, 4)),
        "transformer.h.0.attn.c_proj.weight": ((4, 32), (32, 4)),
        "transformer.h.0.mlp.c_fc.weight": ((4, 32), (128, 4)),
        "transformer.h.0.mlp.c_proj.weight": ((4, 32), (4, 128)),
    },
    "mixtral": {
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.k_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.v_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 4, 32), (4, 96, 4)),
        "model.layers.0.mlp.experts.down_proj": ((4, 4, 32), (4, 4, 48)),
    },
    "gpt_oss": {  # experts stored (expert, inputs, outputs)
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (64, 4)),
        "model.layers.0.self_attn.k_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.v_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (4, 64)),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 4, 32), (4, 96, 4)),
        "model.layers.0.mlp.experts.down_proj": ((4, 4, 32), (4, 4, 48)),
    },
    "phi3": {  # fused weights are one matrix
        "model.layers.0.self_attn.qkv_proj.weight": ((4, 32), (64, 4)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.gate_up_proj.weight": ((4, 32), (96, 4)),
        "model.layers.0.mlp.down_proj.weight": ((4, 32), (4, 48)),
    },
    "vit": {
        "vit.layers.0.attention.q_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.k_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.v_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.o_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.mlp.fc1.weight": ((4, 32), (48, 4)),
        "vit.layers.0.mlp.fc2.weight": ((4, 32), (4, 48)),
    },
}
LAYERS["llama_tied"] = LAYERS["llama"]


def projected(explanation: Explanation) -> set[str]:
    return {row.name for row in explanation.rows if any(name.startswith("proj") for name in row.state)}
