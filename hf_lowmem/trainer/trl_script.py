"""TRL's own training script with our optim names, as `hf-lowmem TASK` and `scripts/TASK.py` run it.

It differs from TRL's in three options: --optim is slim_adamw_8bit by default; --dataset_name also accepts a .jsonl,
.json, .csv or .parquet file, of which --test_split_size holds out a share for evaluation; and
--resume_from_checkpoint True resumes from the last complete checkpoint in --output_dir.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from subprocess import CalledProcessError
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence
from trl.scripts.utils import DatasetConfig

from hf_lowmem.trainer.build import show_summary
from hf_lowmem.trainer.registration import register
from hf_lowmem.trainer.trl_checks import check, file_format, is_file
from hf_lowmem.trainer.trl_help import short_help_first

DEFAULT_OPTIM = "slim_adamw_8bit"


def launch(task: str, argv: list[str]) -> None:
    """Do what `trl TASK` does, but let accelerate start processes with this module instead of TRL's script.

    Args:
        task: the name of one of TRL's training scripts, such as "dpo".
        argv: the options of that script and of `accelerate launch`.

    Raises:
        SystemExit: with status 2 after a sentence about a mistake, or with the status of a process that has failed.
    """
    if "LOCAL_RANK" in os.environ:  # `accelerate launch` or `torchrun` has started this process
        main(task, argv)
        return
    parser = make_parser(task, f"hf-lowmem {task}")
    with _one_sentence(parser):
        argv = _config_apart(argv)
        from_config, from_argv = _check(task, parser, argv, launches=True)
        args = _launch_arguments(from_config + from_argv, [task, *_subtract_subsequence(argv, from_argv)])
    try:
        launch_command(args)
    except CalledProcessError as error:  # the process has reported why, which accelerate's traceback does not
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    else:
        return
    sys.exit(status if status > 0 else 128 - status)  # the status that a shell reports for a signal


def main(task: str, argv: list[str] | None = None) -> None:
    """Run one of TRL's training scripts in this process.

    Args:
        task: the name of the script, such as "dpo".
        argv: the options of the script, by default those of the process.

    Raises:
        SystemExit: with status 2 after a sentence about a mistake.
    """
    parser = make_parser(task, None if argv is None else f"hf-lowmem {task}")
    with _one_sentence(parser):
        argv = _config_apart(sys.argv[1:] if argv is None else argv)
        _check(task, parser, argv)
        script_args, training_args, model_args, dataset_args, _ = parser.parse_args_and_config(
            argv, return_remaining_strings=True
        )
    show_summary()
    if is_file(path := script_args.dataset_name):  # TRL reads a file only as part of a mixture of datasets
        dataset_args.datasets = [DatasetConfig(path=file_format(path), data_files=path)]
        dataset_args.streaming = script_args.dataset_streaming
        script_args.dataset_name = None
    if str(training_args.resume_from_checkpoint).lower() in ("true", "false"):
        training_args.resume_from_checkpoint = str(training_args.resume_from_checkpoint).lower() == "true"
    # This reference outlives TRL's trainer. If DDP's reducer were the last to release a gloo group, torch could
    # deadlock, because the group's threads may still wait for the GIL (pytorch issue 56297).
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    _script(task).main(script_args, training_args, model_args, dataset_args)
    del group


def _script(task: str) -> Any:
    return import_module(f"trl.scripts.{task}")


def make_parser(task: str, prog: str | None = None) -> Any:
    """Return TRL's parser with our names and our default for `--optim`. It raises ValueError for a mistake."""
    register()
    parser = _script(task).make_parser(prog=prog)
    parser.set_defaults(optim=DEFAULT_OPTIM)
    parser.description = __doc__
    parser.epilog = f"Several processes: hf-lowmem {task} --num_processes 2 ...; without a GPU, add --use_cpu true."
    short_help_first(task, parser)
    parser.allow_abbrev = False
    if task == "reward":  # PEFT's default task type needs a model that generates
        parser.set_defaults(lora_task_type="SEQ_CLS")
    parser.error = _refuse
    (optim,) = (action for action in parser._actions if action.dest == "optim")
    optim.metavar, optim.choices = f"{{{','.join(optim.choices)}}}", None  # our check names only the nearest choices
    return parser


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@contextmanager
def _one_sentence(parser: Any) -> Iterator[None]:
    """Print a ValueError that is raised inside the context as one line, and exit with status 2."""
    try:
        yield
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


def _config_apart(argv: list[str]) -> list[str]:
    """Return the arguments with `--config=FILE` as two words, which is the only form that TRL accepts."""
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the name of a YAML file.")
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def _check(task: str, parser: Any, argv: list[str], launches: bool = False) -> tuple[list[str], list[str]]:
    """Raise ValueError for a mistake, or return what TRL leaves to accelerate of the config file and of `argv`."""
    plain = copy(parser)
    plain.dataclass_types = []  # parses to plain values, because the dataclasses would set up the device here, too
    try:
        given, from_config, from_argv = plain.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except OSError as error:
        raise ValueError(f"there is no config file {error.filename!r}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the config file is not valid YAML: {error}.") from error
    check(task, parser, given, from_config, from_argv, launches)
    return from_config, from_argv


def _launch_arguments(options: list[str], script: list[str]) -> Any:
    """Return the arguments of `accelerate launch` for this module, whose own arguments are `script`."""
    launcher = launch_command_parser()
    launcher.error = _refuse
    args = launcher.parse_args([*resolve_accelerate_config_argument(options), "--module", __name__, *script])
    if args.training_script != __name__:
        raise ValueError(f"Unexpected {args.training_script!r}: every option is written as --name value.")
    if (args.num_processes or 1) > 1 and not (args.cpu or torch.accelerator.is_available()):
        args.multi_gpu = True  # makes accelerate use torchrun; otherwise it silently starts a single process
    return args


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
