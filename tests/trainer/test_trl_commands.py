"""`hf-lowmem TASK` and `scripts/TASK.py`: TRL's training scripts on the user's model and data, with our names."""

import json
import os
import runpy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_lowmem
from hf_lowmem.cli import TRL_TASKS, main
from tests import ROOT

pytest.importorskip("trl")

SCRIPTS = ROOT / "scripts"
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
    states = optimizer["state"].values()
    assert any("exp_avg_sq_row" in entry for entry in states)
    assert any(entry["exp_avg_sq"].numel() < entry["exp_avg"].numel() for entry in states if "exp_avg_sq" in entry)
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


def help_of(task, option, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([task, option])
    return capsys.readouterr().out


@pytest.mark.parametrize("card", ["24gb", "32gb"])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_recipe_for_a_card_trains_a_small_model(task, card, model_folder, tmp_path, launched_here):
    more = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, bf16=True)
    options = options_for("dpo", model_folder, tmp_path, **more)
    if task == "sft":
        rows = [{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not main([task, "--config", str(SCRIPTS / "recipes" / f"{task}_8b_full_{card}.yaml"), *options])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert arguments.optim == {"24gb": "smmf_layerwise", "32gb": "slim_adamw_8bit_layerwise"}[card]
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert all(group["release"] for group in optimizer["param_groups"])
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert all(entry["grad_norm"] > 0 for entry in log if "grad_norm" in entry)


OF_A_TASK = {
    "sft": ["packing", "completion_only_loss"],
    "reward": ["center_rewards_coefficient"],
    "dpo": ["beta", "loss_type"],
    "kto": ["beta", "desirable_weight", "undesirable_weight"],
    "grpo": ["reward_funcs", "num_generations", "max_completion_length", "beta"],
    "rloo": ["reward_funcs", "num_generations", "normalize_advantages"],
    "distillation": ["teacher_model_name_or_path", "temperature"],
}
OF_ALL = """model_name_or_path dataset_name output_dir optim optim_args learning_rate per_device_train_batch_size
gradient_accumulation_steps num_train_epochs max_steps dtype use_peft gradient_checkpointing logging_steps save_steps
resume_from_checkpoint num_processes help-all""".split()


@pytest.mark.parametrize("task", TRL_TASKS)
def test_help_shows_what_matters_first_and_all_on_request(task, capsys):
    short, whole = (help_of(task, option, capsys) for option in ("--help", "--help-all"))
    for shown in (short, whole):
        assert shown.startswith(f"usage: hf-lowmem {task} ")
        assert ".jsonl" in shown
        assert "(default: slim_adamw_8bit)" in " ".join(shown.split())
        assert all(name in shown for name in [*hf_lowmem.optim_names(), "adamw_torch"])
    assert help_of(task, "-h", capsys) == short
    assert max(map(len, short.splitlines())) <= 100
    assert len(short) < len(whole) / 4
    assert all(f"  --{option}" in short for option in [*OF_ALL, *OF_A_TASK[task]])
    assert "--adam_beta1" in whole
    assert "--adam_beta1" not in short


@pytest.mark.parametrize("task", TRL_TASKS)
def test_the_short_help_names_only_options_that_there_are(task):
    from hf_lowmem.trainer.trl_help import important
    from hf_lowmem.trainer.trl_script import make_parser

    known = make_parser(task)._option_string_actions
    lacking = {option for option in important(task) if f"--{option}" not in known}
    assert lacking <= {"max_length", "loss_type", "num_iterations"}  # which some tasks have and others have not


@pytest.mark.usefixtures("mistaken_folder")
@pytest.mark.parametrize("task", ["sft", "grpo"])
@pytest.mark.parametrize(
    ("short", "meant"),
    [
        *(("model", "model_name_or_path"), ("model-path", "model_name_or_path"), ("dataset", "dataset_name")),
        *(("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size")),
        *(("output", "output_dir"), ("out", "output_dir"), ("grad_accum", "gradient_accumulation_steps")),
        *(("wd", "weight_decay"), ("resume", "resume_from_checkpoint"), ("optimizer", "optim")),
        *(("peft", "use_peft"), ("checkpointing", "gradient_checkpointing"), ("learning-rat", "learning_rate")),
    ],
)
def test_short_forms_of_options_are_understood(task, short, meant, capsys):
    for argv in (["--" + short, "x"], [f"--{short}=x"]):
        with pytest.raises(SystemExit, match="2"):
            main([task, *argv])
        error = capsys.readouterr().err
        assert error.startswith(f"hf-lowmem {task}: Unknown option '--{short}'; the nearest names: --{meant}")
        assert error.count("\n") == 1


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
    # the same, from where the command stopped
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


MISTAKES = [  # of the command and of the script: files as in `mistaken_folder`
    ("sft", "--dataset_name data.tar", "--dataset_name data.tar is a file without one of the endings .jsonl, .json, "),
    (
        "dpo",
        "--dataset_name data.jsonl --eval_strategy epoch",
        "--eval_strategy with the data file data.jsonl needs --",
    ),
    ("grpo", "--dataset_name data.jsonl", "No reward is given: add --reward_funcs, such as accuracy_reward"),
    ("rloo", "--config config.yaml", "No reward is given: add --reward_funcs, such as accuracy_reward"),
    ("dpo", "--config typo.yaml", "Unknown config key 'lerning_rate'; the nearest names: learning_rate, "),
    ("dpo", "--config=typo.yaml", "Unknown config key 'lerning_rate'; the nearest names: learning_rate, "),
    ("dpo", "--config=mixture.yaml", "Unknown config key of datasets: 'pth'; the nearest names: path, "),
    ("dpo", "--config broken.yaml", "the config file is not valid YAML: mapping values are not allowed here in "),
    ("dpo", "--config list.yaml", "Config file list.yaml must contain a YAML mapping."),
    ("dpo", "--config missing.yaml", "there is no config file 'missing.yaml'."),
    ("dpo", "--lerning_rate 1", "Unknown option '--lerning_rate'; the nearest names: --learning_rate, "),
    ("dpo", "--lerning_rate=1", "Unknown option '--lerning_rate'; the nearest names: --learning_rate, "),
    ("dpo", "--learning_rate x", "argument --learning_rate/--learning-rate: invalid float value: 'x'"),
    ("dpo", "--optim slim_adam", "Unknown optim name 'slim_adam'; the nearest names: slim_adamw, slim_adamw_8bit, "),
    ("dpo", "--optim adam_mini --optim_args rouding=kahan", "optim_args has no key 'rouding' for 'adam_mini' (did yo"),
    ("dpo", "--optim_args rounding=kahn", "optim_args rounding='kahn' is not legal: expected one of nearest, stoch"),
    ("dpo", "", "No data is given: add --dataset_name with a data file, a local folder or a hub id."),
    ("dpo", "--dataset_name missing.jsonl", "--dataset_name missing.jsonl: there is no such file."),
    ("dpo", "--dataset_name a.jsonl", "No model is given: add --model_name_or_path with a local folder or a hub id."),
    ("distillation", "--dataset_name a.jsonl {model}", "No teacher model is given: add --teacher_model_name_or_path"),
    ("dpo", "--dataset_name data.jsonl {model}", "The data file data.jsonl has no rows."),
    ("dpo", "--dataset_name data.parquet {model}", "The data file data.parquet cannot be read: Parquet file size is"),
    ("sft", "--dataset_name a.jsonl {model}", "The data file a.jsonl has the columns a; sft needs text, or messages,"),
    ("sft", "--dataset_name a.jsonl {model} --dataset_text_field b", "The data file a.jsonl has the columns a; sft n"),
    (
        "reward",
        "--dataset_name a.jsonl {model}",
        "The data file a.jsonl has the columns a; reward needs chosen and re",
    ),
    ("dpo", "--dataset_name a.jsonl {model}", "The data file a.jsonl has the columns a; dpo needs chosen and rejecte"),
    ("kto", "--dataset_name a.jsonl {model}", "The data file a.jsonl has the columns a; kto needs prompt and complet"),
    ("grpo", "--dataset_name a.jsonl {model} {reward}", "The data file a.jsonl has the columns a; grpo needs prompt."),
    ("rloo", "--dataset_name a.jsonl {model} {reward}", "The data file a.jsonl has the columns a; rloo needs prompt."),
    (
        "distillation",
        "--dataset_name a.jsonl {model} --teacher_model_name_or_path m",
        "The data file a.jsonl has the columns a; distillation needs prompt.",
    ),
    (
        "grpo",
        "--dataset_name some/hub_id {model} --reward_funcs acuracy_reward",
        "Unknown reward 'acuracy_reward'; the",
    ),
    (
        "rloo",
        "--dataset_name p.jsonl {model} --reward_funcs no.such",
        "--reward_funcs no.such: there is no module 'no'",
    ),
    ("rloo", "--config reward.yaml {model}", "reward_funcs must be a list in a config file: [accuracy_reward]."),
    (
        "grpo",
        "--dataset_name p.jsonl {model} {reward}",
        "--reward_funcs accuracy_reward needs the data file to have solution; its columns are prompt.",
    ),
    ("kto", "--dataset_name kto.jsonl {model}", "The column label of kto.jsonl must hold true or false, not 'good'."),
    ("dpo", "--dataset_name hub/id --model_name_or_path ./no", "--model_name_or_path ./no: there is no such folder,"),
    ("dpo", "--dataset_name hub/id --model_name_or_path empty", "--model_name_or_path empty: the folder holds neith"),
    ("rloo", "--dataset_name hub/id {model} --reward_model_name_or_path no", "--reward_model_name_or_path no: there"),
    ("dpo", "--dataset_name hub/id {model} --load_in_4bit", "--load_in_4bit and --load_in_8bit freeze the model: ad"),
    (
        "dpo",
        "--dataset_name hub/id {model} --fsdp full_shard --fsdp_config fsdp1.json",
        "optim='slim_adamw_8bit' does not support FSDP1",
    ),
    ("dpo", "--dataset_name hub/id {model} --learning_rat 1", "Unknown option '--learning_rat'; the nearest names: -"),
    ("dpo", "--dataset_name hub/id {model} --resume_from_checkpoint no", "--resume_from_checkpoint no: there is no s"),
    (
        "dpo",
        "--dataset_name hub/id {model} --resume_from_checkpoint True --output_dir no",
        "--resume_from_checkpoint True: there is no whole checkpoint in --output_dir no.",
    ),
    (
        "dpo",
        "--dataset_name hub/id {model} --resume_from_checkpoint run/checkpoint-2",
        "The checkpoint 'run/checkpoint-2' cannot be resumed from: trainer_state.json, which is written last,",
    ),
    (
        "dpo",
        "--dataset_name hub/id {model} --resume_from_checkpoint True --output_dir run",
        "--resume_from_checkpoint True: there is no whole checkpoint in --output_dir run.",
    ),
    pytest.param(
        "dpo",
        "--dataset_name hub/id --model_name_or_path m",
        "There is no GPU here: add --use_cpu true to train on the CPU.",
        marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
    ),
]
ONLY_THE_SCRIPT_SAYS = [  # the started process, where the command is used
    ("grpo", "--dataset_name p.jsonl {model} --reward_funcs judge.share", "Unknown reward 'judge.share'; the nearest"),
    (
        "rloo",
        "--dataset_name p.jsonl {model} --reward_funcs judge.score",
        "--reward_funcs judge.score needs the data ",
    ),
    ("dpo", "--num_processes 2", "The script does not accept '--num_processes 2': options of `accelerate launch`"),
    ("dpo", "--dataset_name hub/id {model} --load_best_model_at_end True", "--load_best_model_at_end requires the sa"),
]
ONLY_THE_COMMAND_SAYS = [
    (
        "dpo",
        "--dataset_name hub/id {model} --num_processes two",
        "argument --num_processes/--num-processes: invalid i",
    ),
    ("dpo", "--dataset_name hub/id {model} word", "Unexpected 'word': every option is written as --name value."),
    ("dpo", "--dataset_name hub/id {model} --accelerate_config no", "Accelerate config no is neither a file nor a va"),
]


@pytest.fixture
def mistaken_folder(tmp_path, monkeypatch):
    files = {
        "data.tar": "",
        "data.jsonl": "",
        "data.parquet": "no",
        "a.jsonl": '{"a": 1}',
        "fsdp1.json": '{"version": 1}',
        "p.jsonl": '{"prompt": "a"}',
        "judge.py": "def score(completions, answer, factor=1, **kwargs): pass",
        "config.yaml": "dataset_name: data.jsonl\noptim: adam_mini\n",
        "typo.yaml": "num_processes: 2\nlerning_rate: 1e-3\n",
        "mixture.yaml": "datasets:\n- pth: data.jsonl\n",
        "broken.yaml": "optim: adam_mini\n max_steps: 1: 2\n",
        "reward.yaml": "dataset_name: p.jsonl\nreward_funcs: accuracy_reward\n",
        "list.yaml": "- optim\n",
        "kto.jsonl": '{"prompt": "a", "completion": "b", "label": "good"}',
        "m/config.json": "{}",
    }
    for folder in ("m", "empty", "run/checkpoint-2"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judge", raising=False)


def words(options):
    return options.format(
        model="--model_name_or_path m --use_cpu True", reward="--reward_funcs accuracy_reward"
    ).split()


def check_answer(sentence, capfd):
    error = capfd.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1


@pytest.mark.usefixtures("mistaken_folder")
@pytest.mark.parametrize(("task", "options", "sentence"), MISTAKES + ONLY_THE_COMMAND_SAYS)
def test_mistakes_are_answered_in_one_sentence_before_a_process_is_started(task, options, sentence, capfd):
    with pytest.raises(SystemExit, match="2"):
        main([task, *words(options)])
    check_answer(f"hf-lowmem {task}: {sentence}", capfd)


@pytest.mark.usefixtures("mistaken_folder")
@pytest.mark.parametrize(("task", "options", "sentence"), MISTAKES + ONLY_THE_SCRIPT_SAYS)
def test_scripts_answer_mistakes_in_one_sentence_before_a_model_is_loaded(task, options, sentence, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [f"{task}.py", *words(options)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPTS / f"{task}.py"), run_name="__main__")
    check_answer(f"{task}.py: {sentence}", capfd)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_command_exits_as_the_started_process_does(processes, mistaken_folder, monkeypatch, capfd):
    """Only the process that trains builds TRL's config, which refuses these options."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "--dataset_name hub/id {model} --load_best_model_at_end True --num_processes " + processes
    with pytest.raises(SystemExit, match="2"):
        main(["dpo", *words(options)])
    # The launcher ends the other process once one has failed, which may be before it has said anything.
    said = capfd.readouterr().err.count("hf-lowmem dpo: --load_best_model_at_end requires")
    assert 1 <= said <= int(processes)
