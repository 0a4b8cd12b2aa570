"""Short runs of a small Llama through the Trainer, and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lowmem


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= 3


def make_trainer(
    output: Path, optim: str, optim_args: str | None = None, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Trainer:
    hf_lowmem.register()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(dtype)
    rows = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(output),
        optim=optim,
        optim_args=optim_args,
        learning_rate=3e-3,
        weight_decay=0.1,
        max_steps=8,
        save_steps=3,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"per_device_train_batch_size": 4, **arguments},
    )
    return Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def three_steps(output: Path, optim: str, **options: Any) -> Path:
    """A run that was stopped after it saved its third step."""
    trainer = make_trainer(output, optim, **options)
    trainer.add_callback(StopAt())
    trainer.train()
    return output / "checkpoint-3"
