"""The models whose steps are timed: shapes of real models with random values."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

HEADS_32 = dict(num_attention_heads=32, num_key_value_heads=8)
SIZES_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, **HEADS_32)
Config = LlamaConfig | MixtralConfig
PRESETS: dict[str, Config] = {
    "tiny": LlamaConfig(  # tries the benchmarks out on any machine
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
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
    "8b": LlamaConfig(num_hidden_layers=32, **SIZES_8B),  # Llama 3.1 8B
    "8b-8layers": LlamaConfig(num_hidden_layers=8, **SIZES_8B),  # so that several optimizers fit on one GPU
    "mixtral": MixtralConfig(  # one block of Mixtral 8x7B with small embeddings
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_local_experts=8,
        **HEADS_32,
    ),
}


def meta_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a configuration on the meta device."""
    make = MixtralForCausalLM if isinstance(config, MixtralConfig) else LlamaForCausalLM
    with torch.device("meta"):
        return make(config).to(dtype)


def build_model(config: Config, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return the model with normal weights, and gradients that are proportional to them."""
    model = meta_model(config, dtype).to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            torch.mul(parameter.grad, 0.02, out=parameter)
    return model


def copy_of(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of the model with its own weights, which shares the gradients if they have the same dtype."""
    copied = deepcopy(model).to(dtype)
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.to(dtype)  # deepcopy does not copy gradients
    return copied


def one_layer(preset: str, vocab_size: int = 1024) -> Config:
    """Return the configuration of a preset with the same widths, but one layer and few tokens to save memory."""
    config = deepcopy(PRESETS[preset])
    config.num_hidden_layers, config.vocab_size = 1, vocab_size
    return config


def size(preset: str) -> tuple[int, int]:
    """Return the number of parameters and of tensors."""
    sizes = [parameter.numel() for parameter in meta_model(PRESETS[preset]).parameters()]
    return sum(sizes), len(sizes)
