"""TRL's own SFT script with our optim names: what `hf-lowmem sft` and `scripts/sft.py` run.

Beyond TRL's options: --optim defaults to slim_adamw_8bit; --dataset_name also takes a .jsonl, .json, .csv or .parquet
file, of which --test_split_size holds out a share for evaluation; --resume_from_checkpoint True resumes from the last
whole checkpoint in --output_dir.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.accelerate_launcher import launch_training_script
from trl.cli.commands.training import _subtract_subsequence
from trl.scripts import sft
from trl.scripts.utils import DatasetConfig

from hf_lowmem.trainer.build import show_summary
from hf_lowmem.trainer.registration import register

DEFAULT_OPTIM = "slim_adamw_8bit"
_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def launch(argv: list[str]) -> None:
    """Do what `trl sft` does, with this module in place of TRL's script in the processes that `accelerate` starts.

    Args:
        argv: TRL's options, and those of `accelerate launch`.
    """
    parser = _make_parser("hf-lowmem sft")
    *_, config_rest, argv_rest = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_training_script(
        script_name="sft.py",
        launch_args=resolve_accelerate_config_argument(config_rest + argv_rest),
        training_script_args=_subtract_subsequence(argv, argv_rest),
        launch_command_fn=_launch_this_module,
    )


def main() -> None:
    """Train as the command line says.

    Raises:
        ValueError: when evaluation is asked for and the data file is not split.
    """
    parser = _make_parser()
    script_args, training_args, model_args, dataset_args, _, unknown = parser.parse_args_and_config(
        return_remaining_strings=True, separate_remaining_strings=True
    )
    if unknown:  # what a YAML file holds for the launcher is not ours to judge, the command line is
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    show_summary()
    if script_args.dataset_name and Path(script_args.dataset_name).is_file():
        _use_data_file(script_args, training_args, dataset_args)
    if str(training_args.resume_from_checkpoint).lower() in ("true", "false"):
        training_args.resume_from_checkpoint = str(training_args.resume_from_checkpoint).lower() == "true"
    sft.main(script_args, training_args, model_args, dataset_args)


def _make_parser(prog: str | None = None) -> Any:
    """TRL's parser of the SFT script, with our names among the choices of `--optim`, and our default."""
    register()
    parser = sft.make_parser(prog=prog)
    parser.set_defaults(optim=DEFAULT_OPTIM)
    parser.description = __doc__
    return parser


def _launch_this_module(args: Any) -> None:
    args.module = True
    args.training_script = __name__
    launch_command(args)


def _use_data_file(script_args: Any, training_args: Any, dataset_args: Any) -> None:
    """Hand a data file over as TRL's dataset mixture, which can read one."""
    path = Path(script_args.dataset_name)
    formats = [_FILE_FORMATS[suffix] for suffix in path.suffixes if suffix in _FILE_FORMATS]
    if not formats:
        raise ValueError(f"--dataset_name {path} is a file that ends in none of {', '.join(_FILE_FORMATS)}.")
    if training_args.eval_strategy != "no" and dataset_args.test_split_size is None:
        raise ValueError(f"--eval_strategy with the data file {path} needs --test_split_size, such as 0.1.")
    dataset_args.datasets = [DatasetConfig(path=formats[0], data_files=str(path))]
    dataset_args.streaming = script_args.dataset_streaming
    script_args.dataset_name = None


if __name__ == "__main__":
    main()
