"""Where the query, key, value, gate and up rows lie inside a fused weight.

The layouts are those of the model types whose code was read. A fused weight of any other model type has no parts,
because a wrong guess would average queries together with values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn as nn


@dataclass(frozen=True)
class FusedPart:
    """One part of a fused weight, such as the query rows of a QKV projection.

    The fan_out axis, of size n, is viewed as (outer, n // outer), and the part is `[:, start:stop]` of that view. A
    contiguous slice has outer = 1. GPT-NeoX interleaves the parts by head (outer = heads), and gpt-oss interleaves
    gate and up row by row (outer = n // 2).
    """

    role: str
    outer: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Return the name of the part in rules files and in the names of its state, such as query or up."""
        return self.role.rpartition("_")[2]


_QUERY, _KEY, _VALUE = "attention_query", "attention_key", "attention_value"
_GATE, _UP = "mlp_gate", "mlp_up"

# [query | key | value], with num_key_value_heads * head_dim key and as many value rows where the attention has them
_CONTIGUOUS_QKV = {
    "blip_2_vision_model", "blip_vision_model", "coarse_acoustics", "dbrx", "decision_transformer",
    "dots3_note_vision_encoder", "fine_acoustics", "glm4v_moe_vision", "glm4v_vision", "glm_image_vision",
    "glm_ocr_vision", "gpt2", "imagegpt", "instructblip_vision_model", "modernbert", "mpt", "openai-gpt", "phi3",
    "phi4_multimodal", "qwen2_5_vl_vision", "qwen2_vl_vision", "qwen3_5_moe_vision", "qwen3_5_vision",
    "qwen3_omni_moe_vision_encoder", "qwen3_vl_moe_vision", "qwen3_vl_vision", "sam_vision_model", "semantic",
    "timesformer", "vitdet",
}  # fmt: skip
# (heads, 3, head_dim): each head has its query, key and value rows side by side
_QKV_PER_HEAD = {"bloom", "deberta", "gpt_neox", "gpt_neox_japanese", "minimax", "persimmon"}

# [gate | up]: the first half goes through the activation and multiplies the second
_GATE_THEN_UP = {
    "dia_decoder", "dia_encoder", "dots3_note_audio_encoder", "glm", "glm4", "glm4v_text", "glm_image_text",
    "glm_ocr_text", "jetmoe", "kyutai_speech_to_text", "llama4_text", "longcat_flash", "minimax_m3_vl_text",
    "modernbert", "modernbert-decoder", "moshi", "moshi_depth", "phi3", "phi4_multimodal", "zamba2",
}  # fmt: skip
_UP_THEN_GATE = {"phi4_multimodal_audio"}


def qkv_parts(attention: nn.Module, model_type: str, rows: int, head_dim: int | None) -> tuple[FusedPart, ...]:
    """Return the parts of a fused QKV weight with `rows` outputs; none if the layout is unknown or does not fit."""
    module: Any = attention
    if isinstance(attention, nn.MultiheadAttention):
        return _contiguous_qkv(rows, rows // 3)
    if model_type in _CONTIGUOUS_QKV:
        kv_heads = getattr(module, "num_key_value_heads", None)
        return _contiguous_qkv(rows, kv_heads * head_dim if kv_heads and head_dim else rows // 3)
    if head_dim is None:
        return ()
    if model_type in _QKV_PER_HEAD:
        return _grouped_qkv(rows, rows // (3 * head_dim), head_dim)
    if model_type in {"falcon", "gpt_bigcode"}:
        if getattr(module, "new_decoder_architecture", False):
            return _grouped_qkv(rows, module.num_kv_heads, head_dim)
        if module.multi_query:
            return _contiguous_qkv(rows, head_dim)
        return _grouped_qkv(rows, module.num_heads, head_dim)
    if model_type == "codegen":  # four blocks, one per TPU core, in the order query, value, key
        block = rows // 12
        return _cut(rows, 4, (_QUERY, block), (_VALUE, block), (_KEY, block))
    return ()


def key_value_parts(attention: nn.Module, model_type: str, rows: int) -> tuple[FusedPart, ...]:
    """Return the parts of a fused key and value weight: MLA's kv_b_proj, or a cross-attention of the GPT-2 family."""
    key_dim, value_dim = getattr(attention, "qk_nope_head_dim", None), getattr(attention, "v_head_dim", None)
    if isinstance(key_dim, int) and isinstance(value_dim, int):
        return _cut(rows, rows // (key_dim + value_dim), (_KEY, key_dim), (_VALUE, value_dim))
    if model_type in {"gpt2", "imagegpt", "decision_transformer"}:
        return _cut(rows, 1, (_KEY, rows // 2), (_VALUE, rows // 2))
    return ()


def gate_up_parts(mlp: nn.Module, model_type: str, rows: int) -> tuple[FusedPart, ...]:
    """Return the parts of a fused gate and up weight; stacked experts have a flag that says if they interleave."""
    concatenated = getattr(mlp, "is_concatenated", model_type in _GATE_THEN_UP or None)
    if concatenated is False:
        return _cut(rows, rows // 2, (_GATE, 1), (_UP, 1))
    if concatenated:
        return _cut(rows, 1, (_GATE, rows // 2), (_UP, rows // 2))
    if model_type in _UP_THEN_GATE:
        return _cut(rows, 1, (_UP, rows // 2), (_GATE, rows // 2))
    return ()


def _contiguous_qkv(rows: int, kv_rows: int) -> tuple[FusedPart, ...]:
    return _cut(rows, 1, (_QUERY, rows - 2 * kv_rows), (_KEY, kv_rows), (_VALUE, kv_rows))


def _grouped_qkv(rows: int, kv_heads: int, head_dim: int) -> tuple[FusedPart, ...]:
    """Return the parts of one group per key-value head: its query heads, then its key and its value."""
    query_rows = rows // max(kv_heads, 1) - 2 * head_dim
    return _cut(rows, kv_heads, (_QUERY, query_rows), (_KEY, head_dim), (_VALUE, head_dim))


def _cut(rows: int, outer: int, *pieces: tuple[str, int]) -> tuple[FusedPart, ...]:
    """Return parts of these roles and sizes, side by side in each of `outer` blocks; none if they do not fill them."""
    parts: list[FusedPart] = []
    stop = 0
    for role, size in pieces:
        parts.append(FusedPart(role, outer, stop, stop + size))
        stop += size
    fits = outer * stop == rows and all(size > 0 for _, size in pieces)
    return tuple(parts) if fits else ()
