"""Scripts started by `accelerate launch` and `torchrun` know our names on every process, and the processes agree."""

import sys

import pytest
import torch

SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

def main(output_dir, optim, optim_args=None, dtype="float32"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )).to(getattr(torch, dtype))
    tokens = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=output_dir, optim=optim, optim_args=optim_args, max_steps=4, learning_rate=1e-2,
        per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )
    assert args.world_size == 2
    Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in tokens]).train()
    torch.save(model.state_dict(), f"{output_dir}/rank{args.process_index}.pt")

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def accelerate(arguments):
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(
        launch_command_parser().parse_args(["--multi_gpu", "--num_processes", "2", "--num_machines", "1", *arguments])
    )


def torchrun(arguments):
    from torch.distributed.run import main

    main(["--nproc_per_node", "2", *arguments])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launch", "module_arguments", "optim"),
    [
        (accelerate, ["-m", "hf_lowmem", "run"], ["slim_adamw_8bit"]),
        (torchrun, ["-m", "hf_lowmem"], ["coap_adamw_8bit", "update_interval=1,reproject_factor=2"]),
        (torchrun, ["-m", "hf_lowmem"], ["slim_adamw_8bit", "rounding=stochastic,rounding_seed=5", "bfloat16"]),
        (torchrun, ["-m", "hf_lowmem"], ["adam_mini", "rounding=kahan,fused_clip=true", "bfloat16"]),
    ],
    ids=["accelerate-run", "torchrun", "stochastic", "kahan"],
)
def test_both_ranks_finish_with_the_same_weights(launch, module_arguments, optim, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["launcher"])
    launch([*module_arguments, str(tmp_path / "train.py"), str(tmp_path), *optim])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
