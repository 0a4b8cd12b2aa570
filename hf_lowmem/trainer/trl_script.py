"""TRL's own training scripts with our optim names: what `hf-lowmem TASK` and `scripts/TASK.py` run.

Beyond TRL's options: --optim defaults to slim_adamw_8bit; --dataset_name also takes a .jsonl, .json, .csv or .parquet
file, of which --test_split_size holds out a share for evaluation; --resume_from_checkpoint True resumes from the last
whole checkpoint in --output_dir.
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
    """Do what `trl TASK` does, with this module in place of TRL's script in the processes that `accelerate` starts.

    Args:
        task: the name of one of TRL's training scripts, such as "dpo".
        argv: that script's options, and those of `accelerate launch`.

    Raises:
        SystemExit: with status 2 after one sentence for a mistake, or with that of a process that has failed.
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
    except CalledProcessError as error:  # the process has said why, and accelerate's traceback is not about it
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    else:
        return
    sys.exit(status if status > 0 else 128 - status)  # of a signal, as a shell has it


def main(task: str, argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        task: the name of one of TRL's training scripts, such as "dpo".
        argv: that script's options, `sys.argv[1:]` by default.

    Raises:
        SystemExit: with status 2 after one sentence for a mistake.
    """
    parser = make_parser(task, None if argv is None else f"hf-lowmem {task}")
    with _one_sentence(parser):
        argv = _config_apart(sys.argv[1:] if argv is None else argv)
        _check(task, parser, argv)
        script_args, training_args, model_args, dataset_args, _ = parser.parse_args_and_config(
            argv, return_remaining_strings=True
        )
    show_summary()
    if is_file(path := script_args.dataset_name):  # as TRL's dataset mixture, which can read one
        dataset_args.datasets = [DatasetConfig(path=file_format(path), data_files=path)]
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
    """TRL's parser of the task's script with our names and default for `--optim`; mistakes raise ValueError."""
    register()
    parser = _script(task).make_parser(prog=prog)
    parser.set_defaults(optim=DEFAULT_OPTIM)
    parser.description = __doc__
    parser.epilog = f"On several processes: hf-lowmem {task} --num_processes 2 ...; without a GPU: --use_cpu true."
    short_help_first(task, parser)
    parser.allow_abbrev = False
    if task == "reward":  # PEFT's default would look for a head that generates
        parser.set_defaults(lora_task_type="SEQ_CLS")
    parser.error = _refuse
    (optim,) = (action for action in parser._actions if action.dest == "optim")
    optim.metavar, optim.choices = f"{{{','.join(optim.choices)}}}", None  # the check names the nearest, not all
    return parser


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@contextmanager
def _one_sentence(parser: Any) -> Iterator[None]:
    """Say a ValueError in one line, and exit with status 2."""
    try:
        yield
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


def _config_apart(argv: list[str]) -> list[str]:
    """`--config=FILE` as two words, the only way in which TRL takes it."""
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the name of a YAML file.")
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def _check(task: str, parser: Any, argv: list[str], launches: bool = False) -> tuple[list[str], list[str]]:
    """Raise ValueError for a mistake; returns what TRL leaves to accelerate, of the config file and of `argv`."""
    plain = copy(parser)
    plain.dataclass_types = []  # plain values will do: the dataclasses would set up the device in this process too
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
    """Arguments of `accelerate launch` for this module; `script` is what follows its name."""
    launcher = launch_command_parser()
    launcher.error = _refuse
    args = launcher.parse_args([*resolve_accelerate_config_argument(options), "--module", __name__, *script])
    if args.training_script != __name__:
        raise ValueError(f"Unexpected {args.training_script!r}: every option is written as --name value.")
    if (args.num_processes or 1) > 1 and not (args.cpu or torch.accelerator.is_available()):
        args.multi_gpu = True  # the name of accelerate's torchrun; else it starts one process, without a word
    return args


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
