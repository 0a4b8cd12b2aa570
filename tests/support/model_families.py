"""Tiny randomly initialised models, one per architecture family, for every test that needs a real parameter layout.

All of them build in a few seconds, also under `torch.device("meta")`, and all run on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import transformers as tf
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig
from transformers.models.moshi.modeling_moshi import MoshiDepthDecoder

VOCAB_SIZE = 96

# head_dim * heads differs from hidden_size wherever the family allows it.
_TOKENS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MHA = _TOKENS | _SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}
_GQA = _MHA | {"num_key_value_heads": 2}
_MOE = _GQA | {"num_experts_per_tok": 2}
_QWEN_MOE = _MOE | {"num_experts": 4, "moe_intermediate_size": 24}
_GPT2 = _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_FALCON = _TOKENS | _SIZES | {"ffn_hidden_size": 48}
_MAMBA = _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_VISION = _SIZES | {"intermediate_size": 48, "image_size": 16, "patch_size": 4}
_ENCODER_DECODER = _TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
_DEEPSEEK = _MOE | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_QWEN3_NEXT = _QWEN_MOE | {
    "shared_expert_intermediate_size": 40,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN2_VL_TEXT = _GQA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_QWEN2_VL_VISION = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4}

_DECODER_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, head_dim=16)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GQA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=16)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GQA, head_dim=16)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GQA, head_dim=16)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GQA)),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_GQA, head_dim=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**_GPT2)),
    "gpt_bigcode_mha": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**_GPT2, multi_query=False)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_MHA)),
    "falcon_mqa": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_FALCON)),
    "falcon_mha": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_FALCON, multi_query=False, alibi=True, parallel_attn=False, bias=True)
    ),
    "falcon_grouped": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**_TOKENS, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_TOKENS, **_SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(**_TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_MOE, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**_QWEN_MOE, shared_expert_intermediate_size=40)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_QWEN_MOE, head_dim=16)),
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**_QWEN3_NEXT)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_MOE, num_local_experts=4, head_dim=16)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**_DEEPSEEK)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **_MOE, num_local_experts=4, head_dim=16, intermediate_size_mlp=40, interleave_moe_layer_step=2
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**_MAMBA)),
    "mamba2": lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**_MAMBA, num_heads=8, head_dim=8, n_groups=1)),
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **_DECODER_FAMILIES,
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_ENCODER_DECODER, max_position_embeddings=64)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**_ENCODER_DECODER, num_mel_bins=8, max_source_positions=32, max_target_positions=32)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_MHA)),
    "bert_classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_MHA)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**_MHA, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VISION)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=_MHA, vision_config=_VISION, projection_dim=24)),
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config=_QWEN2_VL_TEXT,
            vision_config=_QWEN2_VL_VISION,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
    ),
}

_VLM_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
_PER_LAYER_INPUTS = _GQA | _TWO_KINDS | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
_MOSHI = _SIZES | {"vocab_size": VOCAB_SIZE, "head_dim": 8, "ffn_dim": 96}
_GEMMA3N_AUDIO = {"hidden_size": 32, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "input_feat_size": 16}
_DEEPSEEK_V4 = {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
_DEEPSEEK_V4 |= {"q_lora_rank": 20, "o_groups": 2, "o_lora_rank": 12, "moe_intermediate_size": 24}
_DEEPSEEK_V4 |= {"num_local_experts": 4, "n_shared_experts": 1, "index_n_heads": 2, "index_head_dim": 8}
_CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}

# More names and layouts, for what reads them alone.
LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "moshi": lambda: tf.MoshiForCausalLM(tf.MoshiConfig(**_MOSHI)),
    "moshi_depth": lambda: MoshiDepthDecoder(
        MoshiDepthConfig(**_MOSHI | {"num_hidden_layers": 1}, input_size=24, num_codebooks=3, audio_vocab_size=20)
    ),
    "kyutai": lambda: tf.KyutaiSpeechToTextModel(
        tf.KyutaiSpeechToTextConfig(**_MOSHI, pad_token_id=0, codebook_vocab_size=20, audio_pad_token_id=19)
    ),
    "gemma3_vlm": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=_GQA | {"head_dim": 16}, vision_config=_VISION | {"hidden_size": 24})
    ),
    "gemma3n": lambda: tf.Gemma3nForCausalLM(
        tf.Gemma3nTextConfig(
            **_PER_LAYER_INPUTS | {"head_dim": 16, "intermediate_size": [48, 48]},
            laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0],
        )
    ),
    "gemma3n_audio": lambda: tf.AutoModel.from_config(tf.Gemma3nAudioConfig(**_GEMMA3N_AUDIO)),
    "gemma4": lambda: tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            text_config=_PER_LAYER_INPUTS | {"head_dim": 16, "global_head_dim": 16},
            vision_config=_SIZES | {"num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48},
            audio_config=_SIZES | {"output_proj_dims": 24},
        )
    ),
    "deepseek_v4": lambda: tf.DeepseekV4ForCausalLM(tf.DeepseekV4Config(**_DEEPSEEK_V4)),
    "ctrl": lambda: tf.CTRLLMHeadModel(
        tf.CTRLConfig(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4)
    ),
    "funnel": lambda: tf.FunnelForMaskedLM(
        tf.FunnelConfig(vocab_size=VOCAB_SIZE, block_sizes=[1, 1], d_model=32, n_head=4, d_head=16, d_inner=48)
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            **_TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=24,
            num_local_experts=4,
        )
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(**_CONVNEXT)),
    "convnextv2": lambda: tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(**_CONVNEXT)),
    "hubert": lambda: tf.HubertModel(
        tf.HubertConfig(**_SIZES, intermediate_size=48, conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(2, 2))
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config=_QWEN2_VL_TEXT, vision_config=_QWEN_VISION | {"out_hidden_size": 32}, **_VLM_TOKENS
        )
    ),
    "qwen3_vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config=_QWEN2_VL_TEXT | {"head_dim": 8},
            vision_config=_QWEN_VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
            **_VLM_TOKENS,
        )
    ),
}

DECODER_LMS = tuple(_DECODER_FAMILIES)


def _adapted_llama(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": ["q_proj", "down_proj"], "r": 4}
    return get_peft_model(FAMILIES["llama"](), LoraConfig(task_type="CAUSAL_LM", **(targets | options)))


ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "llama_lora": lambda: _adapted_llama(target_modules=["q_proj", "down_proj", "embed_tokens"]),
    "llama_dora": lambda: _adapted_llama(use_dora=True),
    "llama_modules_to_save": lambda: _adapted_llama(modules_to_save=["embed_tokens", "lm_head"]),
    "llama_trainable_tokens": lambda: _adapted_llama(trainable_token_indices=[1, 2]),
}


def tiny_model(family: str) -> nn.Module:
    """A new randomly initialised model of a family in FAMILIES, LAYOUTS or ADAPTED."""
    return (FAMILIES | LAYOUTS | ADAPTED)[family]()


@functools.cache
def meta_model(family: str) -> nn.Module:
    """The same model on the meta device, one for all tests: they must not change it."""
    with torch.device("meta"):
        return tiny_model(family)
