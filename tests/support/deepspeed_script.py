"""A training script under DeepSpeed ZeRO on CPU processes: OUTPUT_DIR OPTIM STAGE STEPS RESUME.

The first process writes the log to `OUTPUT_DIR/OPTIM-STAGE-STEPS-RESUME.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lowmem


def main(output_dir: str, optim: str, stage: str, steps: str, resume: str) -> None:
    hf_lowmem.register()
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(stage)},
    }
    args = TrainingArguments(
        output_dir,
        optim=optim,
        deepspeed=config,
        max_steps=int(steps),
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    tokens = torch.randint(97, (48, 8), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.train(resume_from_checkpoint=resume == "True")
    if args.process_index == 0:
        path = Path(output_dir, f"{optim}-{stage}-{steps}-{resume}.json")
        path.write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
