"""A tiny model and a Trainer around it, the same for every optim name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hf_lowmem

CONFIG = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    attn_implementation="eager",  # the fused backward passes of CUDA add in any order
)


def tokens(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (rows, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def make_trainer(tmp_path: Path, device: str) -> Callable[..., Trainer]:
    """`make_trainer(optim, dtype=..., model=..., **TrainingArguments)`: the same model and data at every call.

    What takes it runs on each device.
    """
    hf_lowmem.register()

    def make(optim: str, dtype: torch.dtype = torch.float32, model: Any = None, **arguments: Any) -> Trainer:
        set_seed(0)
        model = model if model is not None else LlamaForCausalLM(LlamaConfig(**CONFIG))
        defaults = dict(
            output_dir=str(tmp_path / "out"),
            optim=optim,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_steps=6,
            warmup_steps=2,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=0,
        )
        args = TrainingArguments(**{**defaults, **arguments})
        assert args.device.type == ("cpu" if args.use_cpu else device)
        return Trainer(model=model.to(dtype), args=args, train_dataset=tokens())

    return make
