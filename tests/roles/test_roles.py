"""Every tensor of every family has the role, axes, parts and head_dim written down here, by hand, from its model code.

The second half checks the fused layouts by what the models do: a part called `key` must change the cached keys only.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as tf

import hf_lowmem
from hf_lowmem import roles
from hf_lowmem.roles import ROLES, FusedPart, ParamRole, assign_roles, canonical_name
from tests.support.model_families import ADAPTED, DECODER_LMS, FAMILIES, LAYOUTS, VOCAB_SIZE, tiny_model

# ---------------------------------------------------------------- the expected roles, by hand


def linear(role: str, head_dim: int | None = None, parts: tuple[FusedPart, ...] = ()) -> ParamRole:
    """A weight (fan_out, fan_in), or an embedding (token, dim)."""
    return ParamRole("", (), role, fan_out=0, fan_in=(1,), head_dim=head_dim, parts=parts)


def conv1d(role: str, head_dim: int | None = None, parts: tuple[FusedPart, ...] = ()) -> ParamRole:
    """A GPT-2 weight (fan_in, fan_out)."""
    return ParamRole("", (), role, fan_out=1, fan_in=(0,), head_dim=head_dim, parts=parts)


def experts(role: str, fan_out: int, fan_in: int, parts: tuple[FusedPart, ...] = ()) -> ParamRole:
    return ParamRole("", (), role, fan_out=fan_out, fan_in=(fan_in,), expert_axis=0, parts=parts)


def no_axes(role: str, expert_axis: int | None = None) -> ParamRole:
    return ParamRole("", (), role, expert_axis=expert_axis)


def qkv(outer: int, query: int, key: int, value: int) -> tuple[FusedPart, ...]:
    """The three stops of query, key and value inside each of `outer` blocks."""
    return (
        FusedPart("attention_query", outer, 0, query),
        FusedPart("attention_key", outer, query, key),
        FusedPart("attention_value", outer, key, value),
    )


def gate_up(outer: int, gate: int, up: int) -> tuple[FusedPart, ...]:
    return (FusedPart("mlp_gate", outer, 0, gate), FusedPart("mlp_up", outer, gate, up))


Table = dict[str, ParamRole]

TIED = dataclasses.replace(linear("token_embedding"), tied=True)
EMBEDDING = {"*embed_tokens.weight": linear("token_embedding")}
TIED_EMBEDDING = {"*embed_tokens.weight": TIED}
HEAD = {"*lm_head.weight": linear("lm_head")}
NORM = {"*norm.weight": no_axes("norm")}
BIAS = {"*.bias": no_axes("bias")}
LAYER_NORMS = {"*.ln_*.weight": no_axes("norm")}
GATED_MLP = {
    "*.gate_proj.weight": linear("mlp_gate"),
    "*.up_proj.weight": linear("mlp_up"),
    "*.down_proj.weight": linear("mlp_down"),
}
FC_MLP = {"*.fc1.weight": linear("mlp_up"), "*.fc2.weight": linear("mlp_down")}
DENSE_MLP = {
    "*.mlp.dense_h_to_4h.weight": linear("mlp_up"),
    "*.mlp.dense_4h_to_h.weight": linear("mlp_down"),
}


def attention(head_dim: int, output: str = "o_proj", block: str = "*.self_attn") -> Table:
    return {
        f"{block}.q_proj.weight": linear("attention_query", head_dim),
        f"{block}.k_proj.weight": linear("attention_key", head_dim),
        f"{block}.v_proj.weight": linear("attention_value"),
        f"{block}.{output}.weight": linear("attention_output"),
    }


def fused_attention(parts: tuple[FusedPart, ...], output: str = "dense", fused: str = "query_key_value") -> Table:
    return {
        f"*.{fused}.weight": linear("attention_qkv", 8, parts),
        f"*attention.{output}.weight": linear("attention_output"),
    }


def llama_like(head_dim: int) -> Table:
    return EMBEDDING | NORM | attention(head_dim) | GATED_MLP


def falcon_like(parts: tuple[FusedPart, ...], norms: str = "*layernorm.weight") -> Table:
    return {
        "transformer.word_embeddings.weight": TIED,
        "*.ln_f.weight": no_axes("norm"),
        norms: no_axes("norm"),
        **fused_attention(parts),
        **DENSE_MLP,
        **BIAS,
    }


def moe(intermediate: int) -> Table:
    """Experts stored (expert, fan_out, fan_in), gate before up; the router is a raw parameter."""
    return {
        "*.mlp.gate.weight": linear("router"),
        "*.experts.gate_up_proj": experts("mlp_gate_up", 1, 2, gate_up(1, intermediate, 2 * intermediate)),
        "*.experts.down_proj": experts("mlp_down", 1, 2),
    }


def gpt2_like(c_attn: ParamRole, matrix: Any) -> Table:
    return {
        "transformer.wte.weight": TIED,
        "transformer.wpe.weight": linear("position_embedding"),
        "*.attn.c_attn.weight": c_attn,
        "*.attn.c_proj.weight": matrix("attention_output"),
        "*.mlp.c_fc.weight": matrix("mlp_up"),
        "*.mlp.c_proj.weight": matrix("mlp_down"),
        **LAYER_NORMS,
        **BIAS,
    }


def seq2seq(conv: Table) -> Table:
    return {
        "model.shared.weight": TIED,
        "*.embed_positions.weight": linear("position_embedding"),
        **attention(8, "out_proj"),
        **attention(8, "out_proj", "*.encoder_attn"),
        **FC_MLP,
        "*norm*.weight": no_axes("norm"),
        **BIAS,
        **conv,
    }


BERT = {
    "*.word_embeddings.weight": linear("token_embedding"),
    "*.position_embeddings.weight": linear("position_embedding"),
    "*.token_type_embeddings.weight": linear("embedding"),
    "*.attention.self.query.weight": linear("attention_query", 8),
    "*.attention.self.key.weight": linear("attention_key", 8),
    "*.attention.self.value.weight": linear("attention_value"),
    "*.attention.output.dense.weight": linear("attention_output"),
    "*.intermediate.dense.weight": linear("mlp_up"),
    "*.layer.?.output.dense.weight": linear("mlp_down"),
    "*.LayerNorm.weight": no_axes("norm"),
    **BIAS,
}
VISION_CONV = ParamRole("", (), "patch_conv", fan_out=0, fan_in=(1, 2, 3))
SSM_MIXER = {
    "*.in_proj*.weight": linear("ssm"),
    "*.mixer.out_proj.weight": linear("ssm"),
    "*.D": no_axes("vector"),
    "*.conv1d.weight": no_axes("conv"),
}

EXPECTED: dict[str, Table] = {
    "llama": llama_like(8) | HEAD,
    "mistral": llama_like(16) | HEAD,
    "qwen2": llama_like(8) | HEAD | BIAS,
    "qwen3": llama_like(16) | HEAD,
    "gemma2": llama_like(16) | TIED_EMBEDDING,
    "gemma3": llama_like(16) | TIED_EMBEDDING,
    "phi3": EMBEDDING
    | HEAD
    | NORM
    | {
        "*.qkv_proj.weight": linear("attention_qkv", 8, qkv(1, 32, 48, 64)),
        "*.o_proj.weight": linear("attention_output"),
        "*.gate_up_proj.weight": linear("mlp_gate_up", None, gate_up(1, 48, 96)),
        "*.down_proj.weight": linear("mlp_down"),
    },
    "glm4": EMBEDDING
    | HEAD
    | NORM
    | BIAS
    | attention(16)
    | {
        "*.gate_up_proj.weight": linear("mlp_gate_up", None, gate_up(1, 48, 96)),
        "*.down_proj.weight": linear("mlp_down"),
    },
    "gpt2": gpt2_like(conv1d("attention_qkv", 8, qkv(1, 32, 64, 96)), conv1d),
    "gpt_bigcode": gpt2_like(linear("attention_qkv", 8, qkv(1, 32, 40, 48)), linear),
    "gpt_bigcode_mha": gpt2_like(linear("attention_qkv", 8, qkv(4, 8, 16, 24)), linear),
    "gpt_neox": {
        "gpt_neox.embed_in.weight": linear("token_embedding"),
        "*norm.weight": no_axes("norm"),
        **fused_attention(qkv(4, 8, 16, 24)),
        **DENSE_MLP,
        **HEAD,
        **BIAS,
    },
    "falcon_mqa": falcon_like(qkv(1, 32, 40, 48)),
    "falcon_mha": falcon_like(qkv(4, 8, 16, 24)),
    "falcon_grouped": falcon_like(qkv(2, 16, 24, 32), "*.h.?.ln_*.weight"),
    "bloom": falcon_like(qkv(4, 8, 16, 24)),
    "opt": {
        "*.embed_positions.weight": linear("position_embedding"),
        **TIED_EMBEDDING,
        **attention(8, "out_proj"),
        **FC_MLP,
        "*norm.weight": no_axes("norm"),
        **BIAS,
    },
    "mpt": {
        "transformer.wte.weight": TIED,
        "*.attn.Wqkv.weight": linear("attention_qkv", 8, qkv(1, 32, 64, 96)),
        "*.attn.out_proj.weight": linear("attention_output"),
        "*.ffn.up_proj.weight": linear("mlp_up"),
        "*.ffn.down_proj.weight": linear("mlp_down"),
        "*norm*.weight": no_axes("norm"),
    },
    "mixtral": EMBEDDING | HEAD | NORM | attention(8) | moe(48),
    "qwen2_moe": llama_like(8) | HEAD | BIAS | moe(24) | {"*.shared_expert_gate.weight": linear("router")},
    "qwen3_moe": EMBEDDING | HEAD | NORM | attention(16) | moe(24),
    "qwen3_next": llama_like(16)
    | HEAD
    | moe(24)
    | {
        "*.shared_expert_gate.weight": linear("router"),
        "*.linear_attn.in_proj_*.weight": linear("ssm"),
        "*.linear_attn.out_proj.weight": linear("ssm"),
        "*.linear_attn.conv1d.weight": no_axes("conv"),
        "*.linear_attn.A_log": no_axes("vector"),
        "*.linear_attn.dt_bias": no_axes("vector"),
    },
    "gpt_oss": EMBEDDING
    | HEAD
    | NORM
    | BIAS
    | attention(16)
    | {
        "*.sinks": no_axes("vector"),
        "*.mlp.router.weight": linear("router"),
        # stored (expert, fan_in, fan_out), gate and up alternating
        "*.experts.gate_up_proj": experts("mlp_gate_up", 2, 1, gate_up(48, 1, 2)),
        "*.experts.down_proj": experts("mlp_down", 2, 1),
        "*.experts.*_proj_bias": no_axes("bias", expert_axis=0),
    },
    "deepseek_v3": EMBEDDING
    | HEAD
    | NORM
    | GATED_MLP
    | moe(24)
    | {
        "*.q_a_proj.weight": linear("attention_down"),
        "*.q_b_proj.weight": linear("attention_query", 12),
        "*.kv_a_proj_with_mqa.weight": linear("attention_down"),
        "*.kv_b_proj.weight": linear(
            "attention_key_value", 8, (FusedPart("attention_key", 4, 0, 8), FusedPart("attention_value", 4, 8, 14))
        ),
        "*.o_proj.weight": linear("attention_output"),
    },
    "llama4": llama_like(16)
    | HEAD
    | {
        "*.router.weight": linear("router"),
        # stored (expert, fan_in, fan_out), without a flag that says so
        "*.experts.gate_up_proj": experts("mlp_gate_up", 2, 1, gate_up(1, 48, 96)),
        "*.experts.down_proj": experts("mlp_down", 2, 1),
    },
    "mamba": {
        "backbone.embeddings.weight": TIED,
        "*.A_log": no_axes("ssm"),
        "*.x_proj.weight": linear("ssm"),
        "*.dt_proj.weight": linear("ssm"),
        "*norm*.weight": no_axes("norm"),
        **SSM_MIXER,
        **BIAS,
    },
    "mamba2": {
        "backbone.embeddings.weight": linear("token_embedding"),
        "*.A_log": no_axes("vector"),
        "*.dt_bias": no_axes("vector"),
        "*norm*.weight": no_axes("norm"),
        **SSM_MIXER,
        **HEAD,
        **BIAS,
    },
    "t5": {
        "shared.weight": TIED,
        "*Attention.q.weight": linear("attention_query", 16),
        "*Attention.k.weight": linear("attention_key", 16),
        "*Attention.v.weight": linear("attention_value"),
        "*Attention.o.weight": linear("attention_output"),
        "*.relative_attention_bias.weight": no_axes("relative_bias"),
        "*.DenseReluDense.wi_0.weight": linear("mlp_gate"),
        "*.DenseReluDense.wi_1.weight": linear("mlp_up"),
        "*.DenseReluDense.wo.weight": linear("mlp_down"),
        "*norm.weight": no_axes("norm"),
    },
    "bart": seq2seq({}),
    "whisper": {
        **{name: role for name, role in seq2seq({}).items() if name != "model.shared.weight"},
        **TIED_EMBEDDING,
        "model.encoder.conv?.weight": ParamRole("", (), "conv", fan_out=0, fan_in=(1, 2)),
    },
    "bert": BERT | {"*.word_embeddings.weight": TIED, "cls.predictions.transform.dense.weight": linear("classifier")},
    "bert_classifier": BERT
    | {"bert.pooler.dense.weight": linear("classifier"), "classifier.weight": linear("classifier")},
    "modernbert": {
        "*.tok_embeddings.weight": TIED,
        "*.attn.Wqkv.weight": linear("attention_qkv", 8, qkv(1, 32, 64, 96)),
        "*.attn.Wo.weight": linear("attention_output"),
        "*.mlp.Wi.weight": linear("mlp_gate_up", None, gate_up(1, 48, 96)),
        "*.mlp.Wo.weight": linear("mlp_down"),
        "head.dense.weight": linear("classifier"),
        "*norm.weight": no_axes("norm"),
        **BIAS,
    },
    "vit": {
        "*.cls_token": no_axes("vector"),
        "*.position_embeddings": no_axes("unknown"),
        "*.patch_embeddings.projection.weight": VISION_CONV,
        **attention(8, "o_proj", "*.attention"),
        **FC_MLP,
        "classifier.weight": linear("classifier"),
        "*norm*.weight": no_axes("norm"),
        **BIAS,
    },
    "clip": {
        "logit_scale": no_axes("vector"),
        "*.class_embedding": no_axes("vector"),
        "*.token_embedding.weight": linear("token_embedding"),
        "*.position_embedding.weight": linear("position_embedding"),
        "*.patch_embedding.weight": VISION_CONV,
        **attention(8, "out_proj"),
        **FC_MLP,
        "*_projection.weight": linear("unknown"),
        "*rm*.weight": no_axes("norm"),  # CLIP spells one of them pre_layrnorm
        **BIAS,
    },
    "qwen2_vl": llama_like(8)
    | HEAD
    | BIAS
    | FC_MLP
    | {
        "model.visual.patch_embed.proj.weight": ParamRole("", (), "patch_conv", fan_out=0, fan_in=(1, 2, 3, 4)),
        "*.attn.qkv.weight": linear("attention_qkv", 8, qkv(1, 32, 64, 96)),
        "*.attn.proj.weight": linear("attention_output"),
        "*.merger.mlp.0.weight": linear("mlp_up"),
        "*.merger.mlp.2.weight": linear("mlp_down"),
        "model.visual.*.norm?.weight": no_axes("norm"),
        "*.ln_q.weight": no_axes("norm"),
    },
}

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


@functools.cache
def meta_model(family: str) -> nn.Module:
    with torch.device("meta"):
        return tiny_model(family)


@pytest.mark.parametrize("family", [*FAMILIES, *LAYOUTS, *ADAPTED])
def test_every_tensor_has_the_expected_role(family: str) -> None:
    table = (EXPECTED | EXPECTED_LAYOUTS | EXPECTED_ADAPTED)[family]
    unused = set(table)
    for _, found in assign_roles(meta_model(family)):
        patterns = [pattern for pattern in table if fnmatchcase(found.name, pattern)]
        assert patterns, f"{found} is not in the table"
        for pattern in patterns:
            assert dataclasses.replace(found, name="", shape=(), why="") == table[pattern], found
        unused -= set(patterns)
    assert not unused


@pytest.mark.parametrize("family", [*FAMILIES, *LAYOUTS, *ADAPTED])
def test_every_parameter_once_in_order_and_parts_fill_the_rows(family: str) -> None:
    model = meta_model(family)
    assigned = assign_roles(model)
    assert [id(param) for param, _ in assigned] == [id(param) for param in model.parameters()]
    assert len({found.name for _, found in assigned}) == len(assigned)
    for param, found in assigned:
        assert found.shape == tuple(param.shape)
        assert found.role in ROLES
        assert found.why
        if found.parts:
            assert found.fan_out is not None
            rows = torch.cat([part_rows(part, found.shape[found.fan_out]) for part in found.parts])
            assert rows.sort().values.tolist() == list(range(found.shape[found.fan_out]))


@pytest.mark.parametrize("family", DECODER_LMS)
def test_no_decoder_lm_has_an_unknown_role(family: str) -> None:
    assert not [found.name for _, found in assign_roles(meta_model(family)) if found.role == "unknown"]


# ---------------------------------------------------------------- what the fused layouts do in the real models

TOKENS = torch.arange(3, 11).unsqueeze(0)
FUSED_ATTENTION = [family for family in DECODER_LMS if any("qkv" in role.role for role in EXPECTED[family].values())]
FUSED_MLP = ["phi3", "glm4", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "modernbert"]
FUSED_MLP += ["moshi", "jetmoe"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small cost more to share between threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part_rows(part: FusedPart, rows: int) -> torch.Tensor:
    return torch.arange(rows).view(part.outer, -1)[:, part.start : part.stop].reshape(-1)


def seeded_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    for param in model.parameters():  # far above rounding, and too small for gpt-oss to clamp its activations
        if param.ndim > 1:
            nn.init.normal_(param, std=0.1)
    return model


def first_fused(model: nn.Module, *names: str) -> tuple[nn.Parameter, ParamRole]:
    return next((param, found) for param, found in assign_roles(model) if found.role in names)


def scale_rows(weight: nn.Parameter, axis: int, rows: torch.Tensor, factor: float) -> None:
    with torch.no_grad():
        weight.index_copy_(axis, rows, weight.index_select(axis, rows) * factor)


def first_layer(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention probabilities, cached keys and cached values of layer 0, each with the head axis first."""
    output = model(TOKENS, use_cache=True, output_attentions=True)
    cache = output.past_key_values.layers[0]
    return tuple(tensor[0].clone() for tensor in (output.attentions[0], cache.keys, cache.values))


def changed_heads(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return [head for head in range(len(before)) if not torch.allclose(before[head], after[head], atol=1e-6)]


@pytest.mark.parametrize("family", FUSED_ATTENTION)
@torch.no_grad()
def test_each_head_of_a_fused_projection_is_where_its_part_says(family: str) -> None:
    """Scaling one head's query, key or value rows changes that head of that tensor in layer 0, and no other."""
    model = seeded_model(family)
    model.set_attn_implementation("eager")
    weight, found = first_fused(model, "attention_qkv")
    assert found.fan_out is not None
    assert found.head_dim is not None
    before = first_layer(model)
    tensors = {"attention_query": 0, "attention_key": 1, "attention_value": 2}
    assert [part.role for part in found.parts] == list(tensors)
    for part in found.parts:
        rows = part_rows(part, weight.shape[found.fan_out])
        for head, head_rows in enumerate(rows.split(found.head_dim)):
            scale_rows(weight, found.fan_out, head_rows, 2.0)
            after = first_layer(model)
            scale_rows(weight, found.fan_out, head_rows, 0.5)
            index = tensors[part.role]
            # Falcon caches its shared keys and values once per query head
            repeats = len(before[index]) * found.head_dim // len(rows)
            heads = list(range(head * repeats, (head + 1) * repeats))
            assert heads
            assert changed_heads(before[index], after[index]) == heads, part
            assert all(not changed_heads(before[other], after[other]) for other in {1, 2} - {index}), part


@torch.no_grad()
def test_each_head_of_the_mla_up_projection_is_where_its_part_says() -> None:
    """DeepSeek caches the latent, so its own `expand_kv` is asked for the keys and values."""
    model = seeded_model("deepseek_v3")
    weight, found = first_fused(model, "attention_key_value")
    block = model.model.layers[0].self_attn
    latent, rotary = torch.randn(1, 1, 5, block.kv_lora_rank), torch.randn(1, 1, 5, block.qk_rope_head_dim)
    before = [states[0] for states in block.expand_kv(latent, rotary)]
    assert [part.role for part in found.parts] == ["attention_key", "attention_value"]
    for index, part in enumerate(found.parts):
        for head, head_rows in enumerate(part_rows(part, len(weight)).chunk(block.num_heads)):
            scale_rows(weight, 0, head_rows, 2.0)
            after = [states[0] for states in block.expand_kv(latent, rotary)]
            scale_rows(weight, 0, head_rows, 0.5)
            assert changed_heads(before[index], after[index]) == [head], part
            assert changed_heads(before[1 - index], after[1 - index]) == [], part


@pytest.mark.parametrize("family", FUSED_MLP)
@torch.no_grad()
def test_the_mlp_is_affine_in_the_up_part_and_not_in_the_gate_part(family: str) -> None:
    model = seeded_model(family)
    weight, found = first_fused(model, "mlp_gate_up")
    assert found.fan_out is not None
    block = model.get_submodule(found.name.removesuffix(".weight").rpartition(".")[0])
    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    original, bent = weight.clone(), {}
    for part in found.parts:
        for factor in (1.0, 2.0, 0.0):
            weight.copy_(original)
            scale_rows(weight, found.fan_out, part_rows(part, weight.shape[found.fan_out]), factor)
            model(TOKENS)
        weight.copy_(original)
        once, twice, none = outputs[-3:]
        bent[part.role] = ((twice + none - 2 * once).abs().max() / once.abs().max()).item()
    assert bent["mlp_up"] < 1e-5
    assert bent["mlp_gate"] > 1e-2


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.0.mlp.c_proj"),
        ("llama", "model.layers.0.mlp.down_proj"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("llama4", "model.layers.1.feed_forward.experts.down_proj"),
    ],
)
@torch.no_grad()
def test_a_slice_of_fan_out_changes_one_output_feature(family: str, name: str) -> None:
    model = seeded_model(family)
    weight, found = next(pair for pair in assign_roles(model) if pair[1].name.removesuffix(".weight") == name)
    assert found.fan_out is not None
    block = model.get_submodule(name if found.expert_axis is None else name.rpartition(".")[0])
    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda _module, _args, output: outputs.append(output.flatten(0, -2)))
    for factor in (1.0, 2.0):
        scale_rows(weight, found.fan_out, torch.tensor([5]), factor)
        model(TOKENS)
    assert changed_heads(outputs[0].T, outputs[1].T) == [5]


# ---------------------------------------------------------------- cases that are not a family


def only(model: nn.Module, role: str) -> ParamRole:
    (found,) = [found for _, found in assign_roles(model) if found.role == role]
    return found


def test_tied_embedding_is_one_token_embedding() -> None:
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB_SIZE, tie_word_embeddings=True
        )
    )
    found = [role for param, role in assign_roles(model) if param is model.lm_head.weight]
    assert [(role.name, role.role, role.tied) for role in found] == [
        ("model.embed_tokens.weight", "token_embedding", True)
    ]


def test_gpt2_cross_attention_has_keys_then_values() -> None:
    config = tf.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    found = only(tf.GPT2LMHeadModel(config), "attention_key_value")
    assert found.name == "transformer.h.0.crossattention.c_attn.weight"
    assert found.parts == (FusedPart("attention_key", 1, 0, 32), FusedPart("attention_value", 1, 32, 64))
    assert (found.fan_out, found.fan_in, found.head_dim) == (1, (0,), 8)


def test_multihead_attention_keeps_its_three_thirds() -> None:
    model = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=48)
    found = {role.name: role for _, role in assign_roles(model)}
    assert found["self_attn.in_proj_weight"].parts == qkv(1, 32, 64, 96)
    assert found["self_attn.in_proj_weight"].head_dim == 8
    assert found["self_attn.in_proj_bias"].role == "bias"
    assert found["self_attn.out_proj.weight"].role == "attention_output"
    assert found["linear1.weight"].role == "mlp_up"
    assert found["linear2.weight"].role == "mlp_down"


def test_fused_weight_without_a_known_model_type_has_no_parts() -> None:
    class CausalSelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(8, 24, bias=False)

    found = only(CausalSelfAttention(), "attention_qkv")
    assert found.parts == ()
    assert found.head_dim is None
    assert "layout unknown" in found.why


def test_names_are_read_exactly_and_never_from_the_path() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj_adapter = nn.Linear(4, 4, bias=False)
            self.q_proj = nn.ModuleDict({"anything": nn.Linear(4, 4, bias=False)})
            self.gate = nn.Linear(4, 600, bias=False)  # too many outputs for a router
            self.mixer_weight = nn.Parameter(torch.zeros(4, 4))

    assert {role.role for _, role in assign_roles(Odd())} == {"unknown"}
    axes = {role.name: role.fan_out for _, role in assign_roles(Odd())}
    assert axes["v_proj_adapter.weight"] == 0
    assert axes["mixer_weight"] is None


def test_a_key_in_a_feed_forward_is_not_an_attention_key() -> None:
    class RwkvFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 8, bias=False)

    assert assign_roles(RwkvFeedForward())[0][1].role == "unknown"


def test_gate_beside_up_is_an_mlp_gate_and_beside_experts_a_router() -> None:
    class MLP(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(4, 4, bias=False))

    found = [role.role for _, role in assign_roles(nn.ModuleDict({"mlp": MLP("gate", "up", "down")}))]
    assert found == ["mlp_gate", "mlp_up", "mlp_down"]
    assert [role.role for _, role in assign_roles(nn.ModuleDict({"mlp": MLP("gate")}))] == ["router"]


def roles_of(model: nn.Module) -> list[str]:
    return [found.role for _, found in assign_roles(model)]


def bare(fan_in: int = 4, fan_out: int = 4) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


def test_a_wrapper_lends_its_name_to_its_one_linear() -> None:
    def attention_with(**wrapped: nn.Module) -> nn.Module:
        return nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.ModuleDict(wrapped)})})

    assert roles_of(attention_with(linear=bare())) == ["attention_query"]
    assert roles_of(attention_with(linear=bare(), batch_norm=nn.BatchNorm1d(4)))[0] == "attention_query"
    assert roles_of(attention_with(linear=bare(), other=bare())) == ["unknown", "unknown"]
    assert roles_of(attention_with(inner=bare())) == ["unknown"]
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"linear": bare()})})
    assert roles_of(nn.ModuleDict({"layers": block})) == ["unknown"], "a block is no wrapper"


def test_a_list_lends_its_name_to_what_it_holds() -> None:
    heads = nn.ModuleDict({"decoder": nn.ModuleDict({"lm_heads": nn.ModuleList([bare(), bare()])})})
    assert roles_of(heads) == ["lm_head", "lm_head"]
    assert roles_of(nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([bare()])})})) == ["unknown"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([bare(4, 8), nn.GELU(), bare(8, 4)], ["mlp_up", "mlp_down"]),
        ([bare(4, 8), nn.GELU(), nn.Dropout(), bare(8, 4)], ["mlp_up", "mlp_down"]),
        ([bare(4, 8), nn.GELU(), bare(8, 8), nn.GELU(), bare(8, 4)], ["unknown"] * 3),
        ([bare(4, 8), nn.Sequential(bare(8, 8)), bare(8, 4)], ["unknown"] * 3),
        ([bare(4, 8)], ["unknown"]),
    ],
)
def test_two_linears_in_a_sequential_mlp(layers: list[nn.Module], expected: list[str]) -> None:
    assert roles_of(nn.ModuleDict({"ffn": nn.Sequential(*layers)})) == expected
    assert set(roles_of(nn.ModuleDict({"encoder": nn.Sequential(*layers)}))) == {"unknown"}


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("in_proj", "out_proj"), ("intermediate_dense", "output_dense")])
def test_an_up_projection_of_twice_the_rows_is_gate_and_up(names: tuple[str, str]) -> None:
    """Which half is which is known of no model type here, so no part is named."""
    up, down = names
    for rows, expected in ((8, "mlp_up"), (16, "mlp_gate_up")):
        (_, first), (_, second) = assign_roles(
            nn.ModuleDict({"mlp": nn.ModuleDict({up: bare(4, rows), down: bare(8, 4)})})
        )
        assert (first.role, first.parts, second.role) == (expected, (), "mlp_down")


def test_a_linear_layer_of_its_own_class_says_which_axis_is_which() -> None:
    class QuantizedLinear(nn.Module):
        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 8
            self.weight = nn.Parameter(torch.zeros(shape))

    for shape, expected in (((8, 4), ("attention_query", 0)), ((4, 8), ("unknown", None))):
        ((_, found),) = assign_roles(nn.ModuleDict({"q_proj": QuantizedLinear(shape)}))
        assert (found.role, found.fan_out) == expected


def test_a_head_size_that_does_not_fit_is_not_guessed() -> None:
    """Queries of more rows than hidden_size have another head_dim than hidden_size over the heads."""
    config = tf.BertConfig(hidden_size=8, num_attention_heads=2)
    for rows, expected in ((8, 4), (16, None)):
        block = nn.ModuleDict({"attn": nn.ModuleDict({"query": bare(8, rows)})})
        block.config = config
        assert assign_roles(block)[0][1].head_dim == expected


def test_stacked_experts_of_unknown_orientation_are_unknown() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(2, 8, 8))

    ((_, found),) = assign_roles(Experts())
    assert (found.role, found.fan_out, found.expert_axis) == ("unknown", None, 0)


def test_adapters_of_stacked_experts_have_no_axes() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = peft.get_peft_model(tiny_model("mixtral"), config)
    assigned = [found for _, found in assign_roles(model)]
    assert len({found.name for found in assigned}) == len(assigned)
    adapters = [found for found in assigned if ".experts." in found.name and "lora_" in found.name]
    assert len(adapters) == 8
    assert {(found.role, found.fan_out) for found in adapters} == {("lora_A", None), ("lora_B", None)}
    frozen = {found.name.rpartition(".")[2]: found for found in assigned if found.expert_axis == 0}
    assert set(frozen) == {"gate_up_proj", "down_proj"}


PEFT_METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "AdaLoraConfig": ({"total_step": 8}, {"lora_A", "lora_B", "adapter"}),
    "IA3Config": ({"feedforward_modules": ["down_proj"]}, {"adapter"}),
    "LoHaConfig": ({}, {"adapter"}),
    "LoKrConfig": ({}, {"adapter"}),
    "OFTConfig": ({"oft_block_size": 8, "r": 0}, {"adapter"}),
    "VBLoRAConfig": ({"num_vectors": 16, "vector_length": 8}, {"adapter"}),
    "PromptTuningConfig": ({"num_virtual_tokens": 4}, {"adapter"}),
    "PrefixTuningConfig": ({"num_virtual_tokens": 4}, {"adapter"}),
    "PromptEncoderConfig": ({"num_virtual_tokens": 4, "encoder_hidden_size": 8}, {"adapter", "bias"}),
}


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_what_other_peft_methods_train_is_an_adapter(method: str) -> None:
    peft = pytest.importorskip("peft")
    options, expected = PEFT_METHODS[method]
    if not issubclass(getattr(peft, method), peft.PromptLearningConfig):
        options = {"target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(tiny_model("llama"), getattr(peft, method)(task_type="CAUSAL_LM", **options))
    trained = [found for param, found in assign_roles(model) if param.requires_grad]
    assert {found.role for found in trained} == expected
    assert all(found.fan_out is None for found in trained if found.role == "adapter")
    frozen = {found.role for param, found in assign_roles(model) if not param.requires_grad}
    assert {"attention_query", "mlp_down", "token_embedding"} <= frozen


@pytest.mark.parametrize(
    ("conv", "role", "fan_out", "fan_in"),
    [
        (nn.Conv2d(3, 8, kernel_size=4, stride=4), "patch_conv", 0, (1, 2, 3)),
        (nn.Conv2d(3, 8, kernel_size=4, stride=2), "conv", 0, (1, 2, 3)),
        (nn.Conv1d(8, 8, kernel_size=3, groups=8), "conv", None, ()),
        (nn.ConvTranspose2d(3, 8, kernel_size=2, stride=2), "conv", 1, (0, 2, 3)),
    ],
)
def test_convolutions(conv: nn.Module, role: str, fan_out: int | None, fan_in: tuple[int, ...]) -> None:
    found = assign_roles(conv)[0][1]
    assert (found.role, found.fan_out, found.fan_in) == (role, fan_out, fan_in)


def test_wrappers_change_neither_roles_nor_names() -> None:
    plain = meta_model("llama")
    expected = [found for _, found in assign_roles(plain)]
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = tiny_model("llama")
    for layer in list(wrapped.module._orig_mod.model.layers):
        inner, layer.self_attn = layer.self_attn, nn.Module()
        layer.self_attn._fsdp_wrapped_module = inner
    found = {role.name: role for _, role in assign_roles(wrapped)}
    assert found == {role.name: role for role in expected}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("module._orig_mod.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_fsdp_wrapped_module.lm_head._checkpoint_wrapped_module.weight", "lm_head.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("module.module._orig_mod._fsdp_wrapped_module.module.norm.weight", "norm.weight"),
        ("layers.0._checkpoint_wrapped_module._orig_mod.mlp._fsdp_wrapped_module.weight", "layers.0.mlp.weight"),
        ("module.base_model.model._orig_mod.norm.weight", "norm.weight"),
        ("base_model.model.module.norm.weight", "norm.weight"),
        ("layers.0._orig_mod.module.weight", "layers.0.module.weight"),
        ("layers.my_orig_mod.weight", "layers.my_orig_mod.weight"),
        ("layers.module", "layers.module"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.original_module.weight"),
        ("base_model.model.q_proj.lora_A.default.weight", "q_proj.lora_A.weight"),
        ("base_model.model.q_proj.lora_A.other.weight", "q_proj.lora_A.other.weight"),
        ("embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_A"),
        ("encoder.module.default.weight", "encoder.module.default.weight"),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q_proj, self.norm = nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.q_proj(self.embed(ids)))


class Renamed(nn.Module):
    """Its parameters' names lead to no module, as those of a wrapper that hides what it wraps."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.inner, self.blocks, self.prefix = Plain(), nn.ModuleList(), prefix

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"{self.prefix}.{name}", param) for name, param in self.inner.named_parameters())


IDS = torch.tensor([1, 2])
UNREAD: dict[str, Any] = {
    "nowhere": lambda: Renamed("outer"),
    "no_such_block": lambda: Renamed("blocks.3"),
    "no_module": lambda: Renamed("prefix"),
    "a_method": lambda: Renamed("forward"),
    "scripted": lambda: torch.jit.script(Plain()),
    "traced": lambda: torch.jit.trace(Plain(), IDS),
    "exported": lambda: torch.export.export(Plain(), (IDS,)).module(),
    "scripted_part": lambda: nn.Sequential(torch.jit.script(Plain())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", UNREAD)
def test_a_model_whose_modules_cannot_be_read_has_unknown_matrices(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = UNREAD[case]()
    found = [role for _, role in assign_roles(model)]
    assert [role.role for role in found] == ["unknown", "unknown", "bias", "vector", "bias"]
    assert all(role.fan_out is None for role in found)
    assert [id(param) for param, _ in assign_roles(model)] == [id(param) for param in model.parameters()]
    optimizer_cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(model, "slim_adamw", lr=1e-2)
    assert "2 matrices have an unknown role" in caplog.text
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = optimizer_cls(model.parameters(), **kwargs)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.Sequential(torch.fx.symbolic_trace(model))])
def test_a_wrapper_that_keeps_the_modules_keeps_their_roles(wrap: Any) -> None:
    assert [role.role for _, role in assign_roles(wrap(Plain()))] == [
        "embedding",
        "attention_query",
        "bias",
        "norm",
        "bias",
    ]


def test_roles_import_only_torch_and_each_other() -> None:
    for path in Path(roles.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name.partition(".")[0] for name in imported} & {"transformers", "peft", "trl"} == set()


def test_weight_decay_reaches_weights_whose_names_lead_nowhere() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            for name, param in super().named_parameters(*args, **kwargs):
                yield f"elsewhere.{name}", param

    for model in (Renamed(), torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4)))):
        optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3, weight_decay=0.1)
        decayed, others = (group["params"] for group in optimizer.param_groups)
        assert [param.ndim for param in decayed] == [2]
        assert [param.ndim for param in others] == [1]
