"""The exact names that modules have in transformers, and the roles of their weights.

Some names mean something only inside a block of one kind, such as "dense" in an attention or an MLP. The kind of a
block is read from how its attribute name or its class name ends.
"""

from __future__ import annotations

import re

import torch.nn as nn

ATTENTION_NAMES = {
    **dict.fromkeys(
        ("q_proj", "q", "query", "q_lin", "query_proj", "wq", "Wq", "q_attn", "q_b_proj"), "attention_query"
    ),
    **dict.fromkeys(("k_proj", "k", "key", "k_lin", "key_proj", "wk", "Wk"), "attention_key"),
    **dict.fromkeys(("v_proj", "v", "value", "v_lin", "value_proj", "wv", "Wv"), "attention_value"),
    **dict.fromkeys(("o_proj", "out_lin"), "attention_output"),
    **dict.fromkeys(("qkv_proj", "Wqkv", "qkv", "query_key_value", "c_attn", "att_proj"), "attention_qkv"),
    **dict.fromkeys(("kv_b_proj", "kv_proj", "kv"), "attention_key_value"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj", "kv_a_proj_with_mqa"), "attention_down"),
}
MLP_NAMES = {
    **dict.fromkeys(("up_proj", "fc1", "c_fc", "fc_in", "wi", "wi_1", "lin1", "linear1", "w3"), "mlp_up"),
    **dict.fromkeys(("dense_h_to_4h", "ffn", "pwconv1", "pointwise_conv1", "linear_fc1", "ffw_layer_1"), "mlp_up"),
    **{"linear_up": "mlp_up", "proj_up": "mlp_up", "proj_up_gate": "mlp_gate", "proj_down": "mlp_down"},
    **dict.fromkeys(("gate_proj", "wi_0", "w1"), "mlp_gate"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "lin2", "linear2", "w2"), "mlp_down"),
    **dict.fromkeys(("dense_4h_to_h", "ffn_output", "pwconv2", "pointwise_conv2"), "mlp_down"),
    **dict.fromkeys(("linear_fc2", "ffw_layer_2", "linear_down"), "mlp_down"),
    **dict.fromkeys(("gate_up_proj", "Wi"), "mlp_gate_up"),
}
PROJECTION_NAMES = {
    *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "embedding_projection"),
    *("altup_projections", "altup_unembed_projections", "correction_coefs", "prediction_coefs"),  # Gemma 3n
    *("linear_left", "linear_right", "input_proj_linear", "input_projections"),
    *("linear_start", "linear_end", "pointwise_lin1", "pointwise_lin2"),  # the convolution module of a Conformer
}
HEAD_NAMES = {
    *("score", "classifier", "qa_outputs", "pre_classifier", "seq_relationship", "summary"),
    *("pooler", "v_head", "head"),
}
ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "modality_router"}
TOKEN_NAMES = {"wte", "embed_tokens", "word_embeddings", "tok_embeddings", "token_embedding"}
POSITION_NAMES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed"}
RELATIVE_BIAS_NAMES = {"relative_attention_bias", "relative_position_bias_table"}

# The names that mean something only inside a block of this kind.
BLOCK_NAMES = {
    "attention": {
        **dict.fromkeys(("q_head", "linear_q", "project_q", "to_q", "query_global", "wq_b"), "attention_query"),
        **dict.fromkeys(("layout_query", "w2e_query", "e2w_query", "e2e_query"), "attention_query"),
        **dict.fromkeys(("k_head", "linear_k", "project_k", "to_k", "key_global", "layout_key"), "attention_key"),
        **dict.fromkeys(("linear_pos", "pos_proj", "relative_k_proj"), "attention_key"),  # keys of positions
        **dict.fromkeys(
            ("v_head", "linear_v", "project_v", "to_v", "value_global", "layout_value"), "attention_value"
        ),
        **{f"projection_{part}": f"attention_{part}" for part in ("query", "key", "value")},
        **dict.fromkeys(("out_proj", "dense", "proj", "c_proj", "o", "wo", "Wo", "output_proj"), "attention_output"),
        **dict.fromkeys(
            ("linear_out", "post_proj", "post", "attention_out", "o_b_proj", "to_out"), "attention_output"
        ),
        **dict.fromkeys(("projection", "projection_layer", "output", "output_linear"), "attention_output"),
        **dict.fromkeys(("in_proj", "queries_keys_values"), "attention_qkv"),
        **dict.fromkeys(("to_kv", "keys_values"), "attention_key_value"),
        **dict.fromkeys(("gate_proj", "g_proj", "q_gate_proj", "o_a_proj", "weights_proj"), "projection"),
        "input_linear": "attention_query",
    },
    "mlp": {
        **dict.fromkeys(("intermediate_dense", "dense1", "linear_1", "layer_1", "intermediate"), "mlp_up"),
        **dict.fromkeys(("proj_in", "in_proj", "input_linear", "w_1"), "mlp_up"),
        **dict.fromkeys(("c_proj", "wo", "Wo", "down", "output_dense", "dense2", "linear_2", "layer_2"), "mlp_down"),
        **dict.fromkeys(("output", "proj_out", "out_proj", "output_linear", "w_out"), "mlp_down"),
        **{"up": "mlp_up", "gate": "mlp_gate", "w_0": "mlp_gate"},
    },
    "mlp_input": {"dense": "mlp_up"},
    "mlp_output": {"dense": "mlp_down"},
}
# How the attribute name or the class name of a block of this kind ends.
_BLOCK_ENDINGS = {
    "attention": re.compile(r"((attn|attention)|(?-i:MoA))$", re.I),
    "mlp": re.compile(r"(mlp|^ff|ffn|feed_?forward|actdense|densereludense|moe|experts?)$", re.I),
    "mlp_input": re.compile(r"intermediate$", re.I),
    "mlp_output": re.compile(r"(?<!Self)(?<!Attention)Output$"),
    "router": re.compile(r"^router$|(Router|Gating)$"),
    "projection": re.compile(r"(projector|merger|merging|connector|aligner|feature_?projection)$", re.I),
    "patch": re.compile(r"patch_?embed(ding|der)?s?$", re.I),
    "head": re.compile(r"^(pooler|classifier|classification_head|v_head|head)$|(Pooler|Head|HeadTransform)$"),
}


def block_kind(name: str, module: nn.Module | None = None) -> str:
    """Return the kind of block that an attribute name, or the module's class name, stands for; "" for any other."""
    names = (name, type(module).__name__) if module is not None else (name,)
    kinds = (kind for kind, ending in _BLOCK_ENDINGS.items() if any(map(ending.search, names)))
    return next(kinds, "")
