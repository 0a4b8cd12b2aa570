"""The help of TRL's scripts: a short one with the options that matter, and the whole one on request."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter
from copy import copy
from typing import Any

from hf_lowmem.trainer.names import OPTIM_NAMES

# The options by heading, in the order in which people need them. Abbreviations prefer the earlier ones, too.
_EVERY_TASK: dict[str, tuple[str, ...]] = {
    "model and data": ("model_name_or_path", "dtype", "dataset_name", "dataset_config", "test_split_size"),
    "output": ("output_dir",),
    "length of training": (
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        "max_length",
    ),
    "optimizer": ("optim", "optim_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    "memory and device": ("gradient_checkpointing", "bf16", "fp16", "use_cpu"),
    "adapters (PEFT)": ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "load_in_4bit"),
    "logging, saving, resuming": (
        *("logging_steps", "report_to", "eval_strategy", "eval_steps"),
        *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "seed"),
    ),
}
_PREFERENCES = ("beta", "loss_type", "precompute_ref_log_probs")
_ROLLOUTS = ("num_generations", "max_completion_length", "temperature", "beta", "num_iterations", "use_vllm")
_REWARDS = ("reward_funcs", "reward_model_name_or_path")
_OF_TASK: dict[str, tuple[str, ...]] = {
    "sft": ("packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field", "loss_type"),
    "reward": ("center_rewards_coefficient", "disable_dropout"),
    "dpo": (*_PREFERENCES, "label_smoothing"),
    "kto": (*_PREFERENCES, "desirable_weight", "undesirable_weight"),
    "grpo": (*_REWARDS, *_ROLLOUTS, "loss_type", "scale_rewards"),
    "rloo": (*_REWARDS, *_ROLLOUTS, "normalize_advantages"),
    "distillation": ("teacher_model_name_or_path", "max_completion_length", "temperature", "beta", "use_vllm"),
}

_OURS = {  # our own help for options that TRL explains differently or not at all
    "dataset_name": "A hub id, a local folder, or a .jsonl, .json, .csv or .parquet file",
    "test_split_size": "Share of a data file that is held out for evaluation",
    "optim": "The optimizer",
    "optim_args": "Its options: key=value,key=value or a JSON object",
    "resume_from_checkpoint": "True for the last whole checkpoint in --output_dir, or a checkpoint's folder",
}


def important(task: str) -> list[str]:
    """Return the options that the short help of a task lists, without dashes. Other versions of TRL may lack some."""
    return [name for names in _sections(task).values() for name in names]


def _sections(task: str) -> dict[str, tuple[str, ...]]:
    return {"model and data": _EVERY_TASK["model and data"], f"of {task}": _OF_TASK[task], **_EVERY_TASK}


def short_help_first(task: str, parser: Any) -> None:
    """Make `--help` of TRL's parser show the options that matter, and `--help-all` all options."""
    whole = parser.format_help

    class HelpAll(Action):
        def __call__(self, used: Any, *given: Any) -> None:
            used.format_help = whole
            used.print_help()
            used.exit()

    # The option must not leave a value in the parsed arguments, because TRL's scripts unpack them.
    parser.add_argument(
        "--help-all", action=HelpAll, nargs=0, dest=SUPPRESS, default=SUPPRESS, help="show all options and exit"
    )
    parser.format_help = lambda: short_help(task, parser)


def short_help(task: str, parser: ArgumentParser) -> str:
    """Return the help with the first sentence and the default of each option that matters, in at most 100 columns."""
    by_name = {action.dest: action for action in reversed(parser._actions)}  # prefers --OPTION to a later --no_OPTION
    shown = HelpFormatter(parser.prog, max_help_position=34, width=100)
    shown.add_usage("%(prog)s --model_name_or_path MODEL --dataset_name DATA [--option VALUE ...]", [], [])
    shown.add_text(parser.description)
    for heading, names in _sections(task).items():
        shown.start_section(heading)
        shown.add_arguments([_short(by_name[name]) for name in names if name in by_name])
        shown.end_section()
    shown.start_section("processes and files")
    for option, metavar, what in (
        ("--num_processes", "N", "number of processes; all options of `accelerate launch` are accepted"),
        ("--config", "FILE", "a YAML file of options, which those of the command line override"),
        ("--help-all", None, f"show all {len(parser._actions)} options"),
    ):
        shown.add_argument(Action([option], option, nargs=None if metavar else 0, metavar=metavar, help=what))
    shown.end_section()
    shown.add_text(f"The names of --optim are {', '.join(OPTIM_NAMES)}, and transformers' own such as adamw_torch.")
    shown.add_text(parser.epilog)
    return shown.format_help()


def _short(action: Action) -> Action:
    """Return a copy of an option with one spelling, a short placeholder, and the first sentence of its help."""
    short = copy(action)
    short.option_strings, short.choices = action.option_strings[:1], None
    if action.nargs in (None, "?"):
        short.nargs, short.metavar = None, "VALUE"
    else:
        short.metavar = "VALUES"
    said = _OURS.get(action.dest) or " ".join((action.help or "").split())
    first = re.split(r"(?<=[a-z)`'\"])\.(?= [A-Z`]|$)", said)[0].replace("%(default)s", "").rstrip(".: ")
    default = "" if action.default in (None, "==SUPPRESS==", "") else f" (default: {action.default})"
    short.help = (first + default).replace("%", "%%")
    return short
