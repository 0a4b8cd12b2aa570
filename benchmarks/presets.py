"""The parameter sets that steps are timed on: shapes of real models, random values."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

HEADS_32 = dict(num_attention_heads=32, num_key_value_heads=8)
PRESETS: dict[str, LlamaConfig | MixtralConfig] = {
    "100m": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "1b": LlamaConfig(  # Llama 3.2 1B
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        tie_word_embeddings=True,
        **HEADS_32,
    ),
    "8b": LlamaConfig(  # Llama 3.1 8B
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **HEADS_32
    ),
    "mixtral": MixtralConfig(  # one block of Mixtral 8x7B, next to no embeddings
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_local_experts=8,
        **HEADS_32,
    ),
}


def meta_model(preset: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a preset, without memory."""
    config = PRESETS[preset]
    make = MixtralForCausalLM if isinstance(config, MixtralConfig) else LlamaForCausalLM
    with torch.device("meta"):
        return make(config).to(dtype)


def build_model(preset: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model with normal weights and gradients, proportional to each other."""
    model = meta_model(preset, dtype).to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            torch.mul(parameter.grad, 0.02, out=parameter)
    return model


def copy_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights and gradients, which take long to draw again."""
    copied = deepcopy(model).to(dtype)
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.to(dtype, copy=True)  # deepcopy leaves them out
    return copied


def size(preset: str) -> tuple[int, int]:
    """(parameters, tensors)"""
    sizes = [parameter.numel() for parameter in meta_model(preset).parameters()]
    return sum(sizes), len(sizes)
