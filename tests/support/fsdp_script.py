"""A training script under FSDP2 on CPU processes, which `fsdp_on_cpu` makes possible.

    torchrun --nproc_per_node 2 fsdp_script.py OUTPUT_DIR '{"optim": "slim_adamw_8bit", ...}'

The first process writes the weights and the optimizer's state, whole, to `OUTPUT_DIR/RANKS-STEPS.pt`; with
"only_loads", as soon as a checkpoint has been loaded. With "sharded": false one process trains without FSDP2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_lowmem
from hf_lowmem.sharding import is_sharded, whole
from hf_lowmem.state_place import as_bytes


def main(output_dir: str, given: str) -> None:
    options = json.loads(given)
    config, dtype = options.pop("fsdp_config", {}), getattr(torch, options.pop("dtype", "float32"))
    resume, world = options.pop("resume", None), int(os.environ["WORLD_SIZE"])
    only_loads, sharded = options.pop("only_loads", False), options.pop("sharded", True)
    hf_lowmem.register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).to(dtype)
    tokens = torch.randint(97, (48, 8), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=12 // world,
        fsdp=sharded,
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config} if sharded else None,
        **options,
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    path = Path(output_dir, f"{world}-{args.max_steps}.pt")
    if only_loads:
        trainer.add_callback(Loads(trainer, path))
    trainer.train(resume_from_checkpoint=resume)
    if not only_loads:
        write(trainer, path)
    if sharded:
        torch.distributed.destroy_process_group()


def llama() -> LlamaConfig:
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    return LlamaConfig(**sizes, num_key_value_heads=2)


class Loads(TrainerCallback):
    """Ends a run that has loaded its checkpoint."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self.trainer, self.path = trainer, path

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write(self.trainer, self.path)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)


def write(trainer: Trainer, path: Path) -> None:
    optimizer, params = trainer.optimizer.optimizer, dict(trainer.model.named_parameters())
    assert all(is_sharded(param) == bool(trainer.args.fsdp) for param in params.values())
    found: dict[str, Any] = {"weights": {}, "state": {}, "log": trainer.state.log_history}
    for name, param in params.items():
        found["weights"][name] = whole(param.detach())
        found["state"][name] = {key: in_full(value) for key, value in optimizer.state[param].items()}
    if trainer.args.process_index == 0:
        torch.save(found, path)


def in_full(value: torch.Tensor) -> torch.Tensor:
    return whole(as_bytes(value)) if value.dtype == torch.int16 else whole(value)


if __name__ == "__main__":
    main(*sys.argv[1:])
