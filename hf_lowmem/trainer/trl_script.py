"""TRL's own training scripts with our optim names: what `hf-lowmem TASK` and `scripts/TASK.py` run.

Beyond TRL's options: --optim defaults to slim_adamw_8bit; --dataset_name also takes a .jsonl, .json, .csv or .parquet
file, of which --test_split_size holds out a share for evaluation; --resume_from_checkpoint True resumes from the last
whole checkpoint in --output_dir.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.accelerate_launcher import launch_training_script
from trl.cli.commands.training import _subtract_subsequence
from trl.scripts.utils import DatasetConfig

from hf_lowmem.trainer.build import show_summary
from hf_lowmem.trainer.registration import register

DEFAULT_OPTIM = "slim_adamw_8bit"
_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def launch(task: str, argv: list[str]) -> None:
    """Do what `trl TASK` does, with this module in place of TRL's script in the processes that `accelerate` starts.

    Args:
        task: the name of one of TRL's training scripts, such as "dpo".
        argv: that script's options, and those of `accelerate launch`.
    """
    if "LOCAL_RANK" in os.environ:  # `accelerate launch` or `torchrun` has started this process
        main(task, argv)
        return
    parser = make_parser(task, f"hf-lowmem {task}")
    parser.dataclass_types = []  # plain values will do: the dataclasses would set up the device in this process too
    given, config_rest, argv_rest = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    try:
        _check(given, given, given)
    except ValueError as error:
        parser.exit(2, f"hf-lowmem {task}: {error}\n")
    launch_training_script(
        script_name=f"{task}.py",
        launch_args=resolve_accelerate_config_argument(config_rest + argv_rest),
        training_script_args=_subtract_subsequence(argv, argv_rest),
        launch_command_fn=partial(_launch_this_module, task),
    )


def main(task: str, argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        task: the name of one of TRL's training scripts, such as "dpo".
        argv: that script's options, `sys.argv[1:]` by default.

    Raises:
        ValueError: when evaluation is asked for and the data file is not split, or a reward is needed and none given.
    """
    parser = make_parser(task)
    script_args, training_args, model_args, dataset_args, _, unknown = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    if unknown:  # what a YAML file holds for the launcher is not ours to judge, the command line is
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    _check(script_args, training_args, dataset_args)
    show_summary()
    if _is_file(script_args.dataset_name):  # as TRL's dataset mixture, which can read one
        path = Path(script_args.dataset_name)
        dataset_args.datasets = [DatasetConfig(path=_file_format(path), data_files=str(path))]
        dataset_args.streaming = script_args.dataset_streaming
        script_args.dataset_name = None
    if str(training_args.resume_from_checkpoint).lower() in ("true", "false"):
        training_args.resume_from_checkpoint = str(training_args.resume_from_checkpoint).lower() == "true"
    # Held while TRL drops its trainer: torch can deadlock where DDP's reducer is the last to let go of a gloo group,
    # whose threads may still wait for the GIL (pytorch issue 56297).
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    _script(task).main(script_args, training_args, model_args, dataset_args)
    del group


def _script(task: str) -> Any:
    return import_module(f"trl.scripts.{task}")


def make_parser(task: str, prog: str | None = None) -> Any:
    """TRL's parser of the task's script, with our names among the choices of `--optim`, and our default."""
    register()
    parser = _script(task).make_parser(prog=prog)
    parser.set_defaults(optim=DEFAULT_OPTIM)
    parser.description = __doc__
    return parser


def _launch_this_module(task: str, args: Any) -> None:
    args.module = True
    args.training_script = __name__
    args.training_script_args = [task, *args.training_script_args]
    if (args.num_processes or 1) > 1 and not (args.cpu or torch.accelerator.is_available()):
        args.multi_gpu = True  # the name of accelerate's torchrun; else it starts one process, without a word
    launch_command(args)


def _check(script_args: Any, training_args: Any, dataset_args: Any) -> None:
    """Raise ValueError for what TRL would find only after the model is loaded, or say less well."""
    if _is_file(script_args.dataset_name):
        path = Path(script_args.dataset_name)
        if _file_format(path) is None:
            raise ValueError(f"--dataset_name {path} is a file that ends in none of {', '.join(_FILE_FORMATS)}.")
        if training_args.eval_strategy != "no" and dataset_args.test_split_size is None:
            raise ValueError(f"--eval_strategy with the data file {path} needs --test_split_size, such as 0.1.")
    takes_reward = hasattr(script_args, "reward_funcs")
    if takes_reward and not (script_args.reward_funcs or script_args.reward_model_name_or_path):
        raise ValueError(
            "No reward is given: add --reward_funcs, such as accuracy_reward or my_module.my_function, or "
            "--reward_model_name_or_path with a sequence classifier of one label."
        )


def _is_file(dataset_name: str | None) -> bool:
    return dataset_name is not None and Path(dataset_name).is_file()


def _file_format(path: Path) -> str | None:
    return next((_FILE_FORMATS[suffix] for suffix in path.suffixes if suffix in _FILE_FORMATS), None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
