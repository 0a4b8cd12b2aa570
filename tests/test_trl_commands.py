"""`hf-lowmem TASK` and `scripts/TASK.py`: TRL's training scripts on the user's model and data, with our names."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lowmem
from hf_lowmem.cli import TRL_TASKS, main

pytest.importorskip("trl")

SCRIPTS = Path(__file__).parents[1] / "scripts"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PAIRS = [{"prompt": f"Say {word}: ", "chosen": word, "rejected": word[::-1]} for word in WORDS]
PROMPTS = [{"prompt": f"Say {word}: ", "answer": word} for word in WORDS]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
REWARDS = """
def share_of_letters(completions, answer, **kwargs):
    return [float(sum(letter in completion for letter in word)) for completion, word in zip(completions, answer)]
"""
ROLLOUTS = ["--num_generations", "2", "--max_completion_length", "8"]
TASKS = {  # rows of the data file, options
    "reward": (PAIRS, []),
    "dpo": (PAIRS, []),
    "kto": (LABELLED, []),
    "grpo": (PROMPTS, [*ROLLOUTS, "--reward_funcs", "my_rewards.share_of_letters", "--beta", "0.1"]),
    "rloo": (PROMPTS, [*ROLLOUTS, "--reward_funcs", "my_rewards.share_of_letters"]),
    "distillation": (PROMPTS, ["--max_completion_length", "8"]),
}


def options_for(task, model_folder, folder, **more):
    """Write the task's data and reward function to `folder`; two steps on the CPU, in float32."""
    rows, options = TASKS[task]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    given = {
        "model_name_or_path": model_folder,
        "dataset_name": folder / "data.jsonl",
        "output_dir": folder / "out",
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        **({"teacher_model_name_or_path": model_folder} if task == "distillation" else {}),
        **more,
    }
    return [*options, *(str(word) for option, value in given.items() for word in (f"--{option}", value))]


def check_run(task, folder, optim, processes=1):
    """The last checkpoint is whole and says that our optimizer ran; return the logged entries."""
    checkpoint = folder / "out" / "checkpoint-2"
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert arguments.optim == optim
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert any("exp_avg_absmax" in entry or "exp_avg" in entry for entry in state["state"].values())
    assert len(list(checkpoint.glob("rng_state*.pth"))) == processes
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    weights = "model.safetensors"
    assert (folder / "out" / weights).is_file()


@pytest.fixture
def launched_here(monkeypatch):
    """What accelerate would start, runs in this process; returns the command lines."""
    from hf_lowmem.trainer import trl_script

    commands = []

    def run(args):
        commands.append((args.training_script, args.training_script_args))
        assert args.module
        monkeypatch.setattr(sys, "argv", ["-m", *args.training_script_args])
        runpy.run_module(args.training_script, run_name="__main__")

    monkeypatch.setattr(trl_script, "launch_command", run)
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_local_model_and_a_jsonl_file_from_the_command_line(
    task, model_folder, tmp_path, monkeypatch, launched_here
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    main([task, *options_for(task, model_folder, tmp_path)])
    assert len(launched_here) == 1
    check_run(task, tmp_path, "slim_adamw_8bit")
