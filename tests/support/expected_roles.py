"""The role, axes, parts and head_dim of every tensor of `model_families.FAMILIES`, by hand, from their model code."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_lowmem.roles import FusedPart, ParamRole


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


def part_rows(part: FusedPart, rows: int) -> torch.Tensor:
    return torch.arange(rows).view(part.outer, -1)[:, part.start : part.stop].reshape(-1)
