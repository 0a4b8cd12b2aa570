"""The same of every tensor of `model_families.LAYOUTS` and `model_families.ADAPTED`."""

from __future__ import annotations

from hf_lowmem.roles import ParamRole
from tests.support.expected_roles import (
    BIAS,
    EMBEDDING,
    FC_MLP,
    GATED_MLP,
    HEAD,
    NORM,
    TIED,
    TIED_EMBEDDING,
    VISION_CONV,
    Table,
    attention,
    conv1d,
    experts,
    gate_up,
    linear,
    llama_like,
    moe,
    no_axes,
    qkv,
)

MOSHI = {
    "*.self_attn.q_proj.linear.weight": linear("attention_query", 8),
    "*.self_attn.k_proj.linear.weight": linear("attention_key", 8),
    "*.self_attn.v_proj.linear.weight": linear("attention_value"),
    "*.self_attn.o_proj.linear.weight": linear("attention_output"),
    "*.mlp.fc1.weight": linear("mlp_gate_up", None, gate_up(1, 48, 96)),
    "*.mlp.fc2.weight": linear("mlp_down"),
    "*norm.weight": no_axes("norm"),
}
PER_LAYER_INPUTS = {
    "*.embed_tokens_per_layer.weight": linear("embedding"),
    "*.per_layer_input_gate.weight": linear("projection"),
    "*.per_layer_projection.weight": linear("projection"),
    "*.per_layer_model_projection.weight": linear("projection"),
}
SIGLIP = {
    "*.patch_embedding.weight": VISION_CONV,
    "*.position_embedding.weight": linear("position_embedding"),
    "*.head.probe": no_axes("vector"),
    "*.head.attention.in_proj_weight": linear("attention_qkv", 6, qkv(1, 24, 48, 72)),
    "*.head.attention.out_proj.weight": linear("attention_output"),
    "*.in_proj_bias": no_axes("bias"),
    "*layer*norm*.weight": no_axes("norm"),
    **attention(6, "out_proj", "*.vision_tower.*.self_attn"),
    **FC_MLP,
    **BIAS,
}
CONFORMER = {
    "*.ffw_layer_1*.weight": linear("mlp_up"),
    "*.ffw_layer_2*.weight": linear("mlp_down"),
    "*.lconv1d.linear_*.weight": linear("projection"),
    "*.lconv1d.depthwise_conv1d.weight": no_axes("conv"),
    "*.per_dim_scale": no_axes("vector"),
    "*.input_proj_linear.weight": linear("projection"),
    "*conv.weight": ParamRole("", (), "conv", fan_out=0, fan_in=(1, 2, 3)),
    "*norm*.weight": no_axes("norm"),
}
CONVNEXT = {
    "*.patch_embeddings.weight": VISION_CONV,
    "*.downsampling_layer.1.weight": VISION_CONV,
    "*.dwconv.weight": no_axes("conv"),
    "*.pwconv1.weight": linear("mlp_up"),
    "*.pwconv2.weight": linear("mlp_down"),
    "*norm*.weight": no_axes("norm"),
    "*.downsampling_layer.0.weight": no_axes("norm"),
    "classifier.weight": linear("classifier"),
    **BIAS,
}
QWEN_VISION = {
    "model.visual.patch_embed.proj.weight": ParamRole("", (), "patch_conv", fan_out=0, fan_in=(1, 2, 3, 4)),
    "*.attn.qkv.weight": linear("attention_qkv", 8, qkv(1, 32, 64, 96)),
    "*.attn.proj.weight": linear("attention_output"),
    "model.visual.*norm*.weight": no_axes("norm"),
    **BIAS,
}
EXPECTED_LAYOUTS: dict[str, Table] = {
    "moshi": MOSHI | EMBEDDING | HEAD,
    "moshi_depth": {  # (codebook, fan_out, fan_in), but for the token embeddings
        "text_embed_tokens.weight": linear("embedding"),
        "embed_tokens.?.weight": linear("token_embedding"),
        "input_projections.weight": experts("projection", 1, 2),
        "*.self_attn.q_proj.linear.weight": experts("attention_query", 1, 2),
        "*.self_attn.k_proj.linear.weight": experts("attention_key", 1, 2),
        "*.self_attn.v_proj.linear.weight": experts("attention_value", 1, 2),
        "*.self_attn.o_proj.linear.weight": experts("attention_output", 1, 2),
        "*.mlp.fc1.weight": experts("mlp_gate_up", 1, 2, gate_up(1, 48, 96)),
        "*.mlp.fc2.weight": experts("mlp_down", 1, 2),
        "lm_heads.weight": experts("lm_head", 1, 2),
        "*norm.weight": no_axes("norm"),
    },
    "kyutai": MOSHI | {"embed_tokens.embed_tokens.weight": linear("token_embedding")},
    "gemma3_vlm": SIGLIP
    | TIED_EMBEDDING
    | NORM
    | GATED_MLP
    | attention(16, block="model.language_model.*.self_attn")
    # stored (fan_in, fan_out), a parameter of its own
    | {"*.mm_input_projection_weight": conv1d("projection")},
    "gemma3n": llama_like(16)
    | TIED_EMBEDDING
    | PER_LAYER_INPUTS
    | {
        "*.altup.*_coefs.weight": linear("projection"),
        "*.altup.modality_router.weight": linear("router"),
        "*.altup.correct_output_scale": no_axes("vector"),
        "*.laurel.linear_*.weight": linear("projection"),
        "model.altup_*projections.?.weight": linear("projection"),
    },
    "gemma3n_audio": CONFORMER
    | {
        "*.attn.q_proj.weight": linear("attention_query", 8),
        "*.attn.k_proj.weight": linear("attention_key", 8),
        "*.attn.v_proj.weight": linear("attention_value"),
        "*.attention.post.weight": linear("attention_output"),
        "*.pos_proj.weight": linear("attention_key", 8),
    },
    "gemma4": CONFORMER
    | TIED_EMBEDDING
    | PER_LAYER_INPUTS
    | attention(16, block="model.language_model.*.self_attn")
    | GATED_MLP
    | {
        f"*_tower.*.self_attn.{name}_proj.linear.weight": role
        for name, role in (
            ("q", linear("attention_query", 8)),
            ("k", linear("attention_key", 8)),
            ("v", linear("attention_value")),
            ("o", linear("attention_output")),
        )
    }
    | {
        "*.mlp.gate_proj.linear.weight": linear("mlp_gate"),
        "*.mlp.up_proj.linear.weight": linear("mlp_up"),
        "*.mlp.down_proj.linear.weight": linear("mlp_down"),
        "*.self_attn.post.linear.weight": linear("attention_output"),
        "*.relative_k_proj.weight": linear("attention_key", 8),
        "*.patch_embedder.input_proj.weight": linear("patch_conv"),
        "*.position_embedding_table": no_axes("unknown"),
        "*.audio_tower.output_proj.weight": linear("unknown"),
        "*.embedding_projection.weight": linear("projection"),
        **BIAS,
    },
    "deepseek_v4": EMBEDDING
    | HEAD
    | NORM
    | moe(24)
    | {
        "*.shared_experts.gate_proj.weight": linear("mlp_gate"),
        "*.shared_experts.up_proj.weight": linear("mlp_up"),
        "*.shared_experts.down_proj.weight": linear("mlp_down"),
        "*.q_a_proj.weight": linear("attention_down"),
        "*.self_attn.q_b_proj.weight": linear("attention_query", 16),
        "*.kv_proj.weight": linear("attention_key_value", 16),  # keys are values
        "*.o_a_proj.weight": linear("projection"),
        "*.o_b_proj.weight": linear("attention_output"),
        "*.compressor.gate_proj.weight": linear("projection"),
        "*.position_bias": no_axes("bias", expert_axis=0),
        "*_hc.fn": linear("projection"),
        "*.hc_fn": linear("projection"),
        "*.sinks": no_axes("vector"),
        "*.*base": no_axes("vector"),
        "*.*scale": no_axes("vector"),
    },
    "ctrl": {
        "transformer.w.weight": TIED,
        "*.Wq.weight": linear("attention_query", 8),
        "*.Wk.weight": linear("attention_key", 8),
        "*.Wv.weight": linear("attention_value"),
        "*.multi_head_attention.dense.weight": linear("attention_output"),
        "*.ffn.0.weight": linear("mlp_up"),
        "*.ffn.2.weight": linear("mlp_down"),
        "*norm*.weight": no_axes("norm"),
        **BIAS,
    },
    "funnel": {
        "*.word_embeddings.weight": TIED,
        "*.q_head.weight": linear("attention_query", 16),
        "*.k_head.weight": linear("attention_key", 16),
        "*.v_head.weight": linear("attention_value"),
        "*.post_proj.weight": linear("attention_output"),
        "*.ffn.linear_1.weight": linear("mlp_up"),
        "*.ffn.linear_2.weight": linear("mlp_down"),
        "*.r_kernel": no_axes("unknown"),  # (fan_in, head, head_dim)
        "*.seg_embed": no_axes("unknown"),
        "*.r_?_bias": no_axes("bias", expert_axis=0),
        "*norm.weight": no_axes("norm"),
        **BIAS,
    },
    "jetmoe": TIED_EMBEDDING
    | NORM
    | {
        "*.mlp.input_linear.weight": experts("mlp_gate_up", 1, 2, gate_up(1, 24, 48)),
        "*.mlp.output_linear.weight": experts("mlp_down", 1, 2),
        "*.router.layer.weight": linear("router"),
        "*.experts.input_linear.weight": experts("attention_query", 1, 2),
        "*.experts.output_linear.weight": experts("attention_output", 1, 2),
        "*.kv_proj.weight": linear("attention_key_value", 8),
        **BIAS,
    },
    "convnext": CONVNEXT | {"*.layer_scale_parameter": no_axes("vector")},
    "convnextv2": CONVNEXT | {"*.grn.weight": no_axes("vector")},
    "hubert": {
        "*.conv_layers.?.conv.weight": ParamRole("", (), "conv", fan_out=0, fan_in=(1, 2)),
        "feature_projection.projection.weight": linear("projection"),
        "*.pos_conv_embed.*.original0": no_axes("vector"),
        "*.pos_conv_embed.*.original1": no_axes("unknown"),
        "*.intermediate_dense.weight": linear("mlp_up"),
        "*.output_dense.weight": linear("mlp_down"),
        "masked_spec_embed": no_axes("vector"),
        "*layer*norm.weight": no_axes("norm"),
        **attention(8, "out_proj", "*.attention"),
        **BIAS,
    },
    "qwen2_5_vl": llama_like(8)
    | HEAD
    | QWEN_VISION
    | {
        "*.merger.mlp.0.weight": linear("mlp_up"),
        "*.merger.mlp.2.weight": linear("mlp_down"),
        "*.merger.ln_q.weight": no_axes("norm"),
    },
    "qwen3_vl": llama_like(8)
    | HEAD
    | QWEN_VISION
    | {
        "model.visual.pos_embed.weight": linear("embedding"),
        "model.visual.*.linear_fc1.weight": linear("mlp_up"),  # blocks and mergers
        "model.visual.*.linear_fc2.weight": linear("mlp_down"),
    },
}
FROZEN_LLAMA = {
    **NORM,
    "*.layers.?.self_attn.q_proj.base_layer.weight": linear("attention_query", 8),
    "*.layers.?.self_attn.k_proj.weight": linear("attention_key", 8),
    "*.layers.?.self_attn.v_proj.weight": linear("attention_value"),
    "*.layers.?.self_attn.o_proj.weight": linear("attention_output"),
    "*.gate_proj.weight": linear("mlp_gate"),
    "*.up_proj.weight": linear("mlp_up"),
    "*.layers.?.mlp.down_proj.base_layer.weight": linear("mlp_down"),
    "*.lora_A.weight": linear("lora_A"),
    "*.lora_B.weight": linear("lora_B"),
}
EXPECTED_ADAPTED: dict[str, Table] = {
    "llama_lora": FROZEN_LLAMA
    | HEAD
    | {
        "model.embed_tokens.base_layer.weight": linear("token_embedding"),
        "model.embed_tokens.lora_embedding_A": conv1d("lora_embedding_A"),  # (rank, vocab): tokens are axis 1
        "model.embed_tokens.lora_embedding_B": linear("lora_embedding_B"),
    },
    "llama_dora": FROZEN_LLAMA | HEAD | EMBEDDING | {"*.lora_magnitude_vector.weight": no_axes("lora_magnitude")},
    "llama_modules_to_save": FROZEN_LLAMA
    | {
        "model.embed_tokens.weight": linear("token_embedding"),
        "model.embed_tokens.original_module.weight": linear("token_embedding"),
        "lm_head.weight": linear("lm_head"),
        "lm_head.original_module.weight": linear("lm_head"),
    },
    "llama_trainable_tokens": FROZEN_LLAMA
    | HEAD
    | {
        "model.embed_tokens.token_adapter.base_layer.weight": linear("token_embedding"),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": linear("token_embedding"),
    },
}
