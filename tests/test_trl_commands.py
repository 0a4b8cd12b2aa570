"""`hf-lowmem TASK` and `scripts/TASK.py`: TRL's training scripts on the user's model and data, with our names."""

import json
import logging
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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


def check_run(folder, steps=2, processes=1):
    """Our optimizer has trained for so many steps, in so many processes, and the model is saved."""
    checkpoint = folder / "out" / f"checkpoint-{steps}"
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert arguments.optim == "slim_adamw_8bit"
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert any(entry["exp_avg_sq"].numel() < entry["exp_avg"].numel() for entry in optimizer["state"].values())
    assert len(list(checkpoint.glob("rng_state*.pth"))) == processes
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == steps
    assert (folder / "out" / "model.safetensors").is_file()


@pytest.fixture
def launched_here(monkeypatch):
    """What accelerate would start in a process of its own runs in this one."""
    from hf_lowmem.trainer import trl_script

    def run(args):
        assert args.module
        monkeypatch.setattr(sys, "argv", ["-m", *args.training_script_args])
        monkeypatch.delitem(sys.modules, args.training_script)
        runpy.run_module(args.training_script, run_name="__main__")

    monkeypatch.setattr(trl_script, "launch_command", run)


@pytest.mark.parametrize("task", TRL_TASKS)
def test_help_lists_our_names(task, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([task, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: hf-lowmem {task} ")
    assert ".jsonl" in shown
    assert "(default: slim_adamw_8bit)" in " ".join(shown.split())
    assert all(name in shown for name in [*hf_lowmem.optim_names(), "adamw_torch"])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_command_and_the_script_train_a_local_model_on_a_jsonl_file(
    task, model_folder, tmp_path, monkeypatch, launched_here
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    argv = options_for(task, model_folder, tmp_path)
    main([task, *argv])
    check_run(tmp_path)
    if (SCRIPTS / f"{task}.py").is_file():  # the same, from where the command stopped
        resumed = ["--resume_from_checkpoint", "True", "--max_steps", "3", "--save_steps", "1"]
        monkeypatch.setattr(sys, "argv", [f"{task}.py", *argv, *resumed])
        runpy.run_path(str(SCRIPTS / f"{task}.py"), run_name="__main__")
        check_run(tmp_path, steps=3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launch", "task"),
    [("hf-lowmem", "grpo"), ("accelerate -m hf_lowmem", "dpo"), ("accelerate script", "dpo")],
)
def test_two_processes(launch, task, model_folder, tmp_path, monkeypatch):
    """One row per process: GRPO's group of two spans both, which only a process that knows of two can accept."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = options_for(task, model_folder, tmp_path, per_device_train_batch_size=1)
    if launch == "hf-lowmem":
        main([task, "--num_processes", "2", *argv])
    else:
        target = [str(SCRIPTS / f"{task}.py")] if launch == "accelerate script" else ["-m", "hf_lowmem", task]
        options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch_command(launch_command_parser().parse_args([*options, *target, *argv]))
    check_run(tmp_path, processes=2)


@pytest.mark.slow
def test_sft_trains_a_local_model_on_a_jsonl_file(model_folder, tmp_path, monkeypatch, caplog):
    rows = [{"prompt": f"What is {n} + 1? ", "completion": str(n + 1)} for n in range(32)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        "num_processes: 1\nmax_steps: 2\nsave_steps: 1\neval_strategy: steps\neval_steps: 1\nreport_to: none\n"
        "bf16: false\nuse_cpu: true\nresume_from_checkpoint: false\noptim_args: embedding_bits=8\n"
    )
    paths = {"model_name_or_path": model_folder, "dataset_name": "data.jsonl", "config": "config.yaml"}
    argv = [word for option, path in paths.items() for word in (f"--{option}", str(tmp_path / path))]
    argv += ["--test_split_size", "0.25", "--output_dir", str(tmp_path / "out")]
    main(["sft", *argv])
    arguments = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.optim == "slim_adamw_8bit"
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in state["log_history"]) == 2
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, tmp_path / "out"))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name

    logging.getLogger("hf_lowmem").addHandler(caplog.handler)  # which shows its own summary, and passes nothing on
    # scripts/sft.py does the same, and resumes from the last checkpoint that was not cut short
    os.truncate(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", 100)
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv, "--resume_from_checkpoint", "True", "--max_steps", "3"])
    runpy.run_path(str(SCRIPTS / "sft.py"), run_name="__main__")
    assert "checkpoint-2: optimizer.pt is cut short" in caplog.text
    steps = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"]
    assert steps == 3


@pytest.mark.slow
def test_grpo_takes_a_reward_model(model_folder, tmp_path, monkeypatch, launched_here):
    monkeypatch.chdir(tmp_path)
    judge = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "judge")
    options = options_for("grpo", model_folder, tmp_path, reward_model_name_or_path="judge", logging_steps=1)
    at = options.index("--reward_funcs")
    main(["grpo", *options[:at], *options[at + 2 :]])
    check_run(tmp_path)
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("rewards/judge/mean" in entry for entry in log)


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        (
            "sft",
            ["--dataset_name", "data.tar"],
            "--dataset_name data.tar is a file that ends in none of .jsonl, .json, .csv, .parquet.",
        ),
        (
            "dpo",
            ["--dataset_name", "data.jsonl", "--eval_strategy", "epoch"],
            "--eval_strategy with the data file data.jsonl needs --test_split_size, such as 0.1.",
        ),
        (
            "grpo",
            ["--dataset_name", "data.jsonl"],
            "No reward is given: add --reward_funcs, such as accuracy_reward",
        ),
        ("rloo", ["--config", "config.yaml"], "No reward is given: add --reward_funcs, such as accuracy_reward"),
    ],
)
def test_mistakes_are_answered_in_one_sentence_before_a_model_is_loaded(
    task, options, sentence, tmp_path, monkeypatch, capsys
):
    from hf_lowmem.trainer import trl_script

    monkeypatch.chdir(tmp_path)
    for file in ("data.tar", "data.jsonl"):
        (tmp_path / file).touch()
    (tmp_path / "config.yaml").write_text("dataset_name: data.jsonl\noptim: adam_mini\n")
    with pytest.raises(SystemExit) as exit_info:
        main([task, *options])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-lowmem {task}: {sentence}")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=re.escape(sentence)):  # scripts/TASK.py
        trl_script.main(task, [*options, "--output_dir", str(tmp_path), "--bf16", "false"])
