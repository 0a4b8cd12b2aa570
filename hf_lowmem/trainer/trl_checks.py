"""Checks of the options of TRL's scripts, which report a mistake in one sentence before a model is loaded.

TRL and accelerate would report it minutes later, at greater length, or not at all. Data on the hub are left to them.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from transformers.training_args import OptimizerNames
from transformers.utils import cached_file
from trl.scripts.utils import DatasetConfig

from hf_lowmem.trainer.build import refuse_sharding
from hf_lowmem.trainer.checkpoints import last_whole_checkpoint, refuse_incomplete
from hf_lowmem.trainer.names import nearest, optim_name, unknown_optim
from hf_lowmem.trainer.optim_args import recipe_for
from hf_lowmem.trainer.trl_help import important

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PAIRS = ("chosen", "rejected")
# The alternative sets of columns for each task, of which one is needed. Those of tokenized rows come last.
_COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "sft": [("text",), ("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",)],
    "reward": [_PAIRS, ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")],
    "dpo": [_PAIRS],
    "kto": [("prompt", "completion", "label"), _PAIRS],
    "grpo": [("prompt",)],
    "rloo": [("prompt",)],
    "distillation": [("prompt",)],
}
_GIVEN_TO_REWARDS = {  # what TRL passes to a reward function in addition to the columns
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}
_CATCH_ALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check(
    task: str, parser: Any, given: Any, from_config: list[str], from_argv: list[str], launches: bool = False
) -> None:
    """Raise ValueError for the first mistake that is found.

    Args:
        task: the name of one of TRL's training scripts.
        parser: the parser of that script.
        given: the options that the parser has read, as plain values.
        from_config: the keys and values of the config file, as `--key value`, that the parser does not know.
        from_argv: the words of the command line that the parser does not know.
        launches: whether this process accepts options of `accelerate launch` and starts others to train.
    """
    _check_names(task, parser, from_config, from_argv)
    if from_argv and not launches:
        raise ValueError(
            f"The script does not accept '{' '.join(from_argv)}': options of `accelerate launch` go before it."
        )
    known = [str(member.value) for member in OptimizerNames]
    if given.optim not in known:
        raise ValueError(unknown_optim(given.optim, known))
    if optim_name(given.optim):
        recipe_for(given.optim, given.optim_args, given.optim_target_modules)
        refuse_sharding(given)
    _check_dataset(given)
    for option, what in (("model_name_or_path", "model"), ("teacher_model_name_or_path", "teacher model")):
        if getattr(given, option, "") is None:
            raise ValueError(f"No {what} is given: add --{option} with a local folder or a hub id.")
    for option in ("model_name_or_path", "teacher_model_name_or_path", "reward_model_name_or_path"):
        _check_model(option, getattr(given, option, None))
    _check_resume(given)
    columns = None
    if is_file(given.dataset_name):
        row = _first_row(given.dataset_name)
        columns = list(row)
        _check_columns(task, given, columns)
        if task == "kto" and not isinstance(row.get("label", True), bool):
            raise ValueError(
                f"The column label of {given.dataset_name} must hold true or false, not {row['label']!r}."
            )
    rewards = getattr(given, "reward_funcs", None) or ()
    if isinstance(rewards, str):  # TRL would take each letter for the name of a reward
        raise ValueError(f"reward_funcs must be a list in a config file: [{rewards}].")
    for name in rewards:
        _check_reward(name, columns, imports=not launches)
    _check_device(given)


def is_file(dataset_name: str | None) -> bool:
    """Return whether `--dataset_name` is a file, rather than a folder or a hub id."""
    return dataset_name is not None and Path(dataset_name).is_file()


def file_format(path: str) -> str | None:
    """Return the format of a file as `datasets` calls it, or None if the file's name has no known ending."""
    return next((_FILE_FORMATS[suffix] for suffix in Path(path).suffixes if suffix in _FILE_FORMATS), None)


def _check_names(task: str, parser: Any, from_config: list[str], from_argv: list[str]) -> None:
    """Raise ValueError for an option or a key of the config file that is neither TRL's nor accelerate's."""
    launcher = launch_command_parser()
    legal = {"--accelerate_config", *parser._option_string_actions, *launcher._option_string_actions}
    first = [f"--{name}" for name in important(task)]
    others = sorted(option for option in legal if option.startswith("--") and "-" not in option[2:])
    options = [*(option for option in first if option in legal), *(option for option in others if option not in first)]
    for option in from_config[::2]:
        if option not in legal:
            raise _unknown("config key", option[2:], [known[2:] for known in options])
    for word in from_argv:
        option = word.split("=")[0]
        if option.startswith("--") and option not in legal:
            raise _unknown("option", option, options)


def _check_dataset(given: Any) -> None:
    name = given.dataset_name
    if not (name or given.datasets):
        raise ValueError("No data is given: add --dataset_name with a data file, a local folder or a hub id.")
    for entry in given.datasets or ():
        for key in entry if isinstance(entry, dict) else ():
            if key not in (legal := [field.name for field in fields(DatasetConfig)]):
                raise _unknown("config key of datasets:", key, legal)
    if is_file(name):
        if file_format(name) is None:
            raise ValueError(f"--dataset_name {name} is a file without one of the endings {', '.join(_FILE_FORMATS)}.")
        if given.eval_strategy != "no" and given.test_split_size is None:
            raise ValueError(f"--eval_strategy with the data file {name} needs --test_split_size, such as 0.1.")
    elif name and Path(name).suffix in _FILE_FORMATS and not Path(name).exists():
        raise ValueError(f"--dataset_name {name}: there is no such file.")
    if hasattr(given, "reward_funcs") and not (given.reward_funcs or given.reward_model_name_or_path):
        raise ValueError(
            "No reward is given: add --reward_funcs, such as accuracy_reward or my_module.my_function, or "
            "--reward_model_name_or_path with a sequence classifier of one label."
        )


def _check_device(given: Any) -> None:
    wants_gpu = not (given.use_cpu or given.fp16) and str(given.bf16).lower() != "false"
    if wants_gpu and not torch.accelerator.is_available():
        raise ValueError("There is no GPU here: add --use_cpu true to train on the CPU.")
    if (given.load_in_4bit or given.load_in_8bit) and not given.use_peft:
        raise ValueError("--load_in_4bit and --load_in_8bit freeze the model: add --use_peft to train adapters.")


def _check_model(option: str, name: str | None) -> None:
    """Raise ValueError unless `name` is a folder with a model or adapters, or a model in the cache or on the hub."""
    if name is None:
        return
    files = ("config.json", "adapter_config.json")
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in files):
            raise ValueError(f"--{option} {name}: the folder holds neither {' nor '.join(files)}.")
        return
    for file in files:
        try:
            if cached_file(name, file):
                return
        except OSError:
            continue
    raise ValueError(f"--{option} {name}: there is no such folder, and no such model in the cache or on the hub.")


def _check_resume(given: Any) -> None:
    asked = given.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return
    folder = given.output_dir
    if str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: there is no such folder.")
        refuse_incomplete(asked)
    elif folder is None or not (Path(folder).is_dir() and last_whole_checkpoint(folder)):
        raise ValueError(f"--resume_from_checkpoint True: there is no whole checkpoint in --output_dir {folder}.")


def _first_row(path: str) -> dict[str, Any]:
    logging.disable()  # `datasets` also logs the errors that it raises
    try:
        return dict(next(iter(load_dataset(file_format(path), data_files=path, split="train", streaming=True))))
    except StopIteration:
        raise ValueError(f"The data file {path} has no rows.") from None
    except ValueError as error:
        raise ValueError(f"The data file {path} cannot be read: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


def _check_columns(task: str, given: Any, columns: list[str]) -> None:
    text_field = getattr(given, "dataset_text_field", "text")
    choices = [tuple(text_field if column == "text" else column for column in choice) for choice in _COLUMNS[task]]
    if not any(set(choice) <= set(columns) for choice in choices):
        needed = ", or ".join(" and ".join(choice) for choice in choices)
        raise ValueError(
            f"The data file {given.dataset_name} has the columns {', '.join(columns)}; {task} needs {needed}."
        )


def _check_reward(name: str, columns: list[str] | None, imports: bool) -> None:
    """Raise ValueError unless `name` is one of TRL's rewards or a function whose columns are in the data file.

    A module of the user's may load a model, so it is imported only in the process that trains.

    Args:
        name: "reward" for one of TRL's, or "module.function".
        columns: the columns of the data file, None if there is no such file.
        imports: whether the module of the user's may be imported.
    """
    prefix, _, function = name.rpartition(".")
    module = prefix or "trl.rewards"
    sys.path.insert(0, os.getcwd())  # TRL looks there, too
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # the package around the module is missing
        found = None
    if found is None:
        raise ValueError(f"--reward_funcs {name}: there is no module {module!r}, here or installed.")
    if prefix and not imports:
        return
    rewards = import_module(module)
    reward = getattr(rewards, function, None)
    if not callable(reward):
        functions = [other for other in dir(rewards) if callable(getattr(rewards, other))]
        raise _unknown("reward", name, [f"{prefix}.{other}" for other in functions] if prefix else functions)
    if columns is None or not inspect.isfunction(reward):
        return
    parameters = inspect.signature(reward).parameters.values()
    needed = {item.name for item in parameters if item.default is item.empty and item.kind not in _CATCH_ALL}
    if "completions" in needed and (missing := needed - _GIVEN_TO_REWARDS - {*columns}):
        raise ValueError(
            f"--reward_funcs {name} needs the data file to have {', '.join(sorted(missing))}; its columns are "
            f"{', '.join(columns)}."
        )


def _unknown(what: str, name: str, legal: Iterable[str]) -> ValueError:
    return ValueError(f"Unknown {what} {name!r}; the nearest names: {', '.join(nearest(name, list(legal)))}.")
