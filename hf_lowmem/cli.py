"""The command line `hf-lowmem`. Imports wait until they are needed, so that help and `optims` answer at once."""

from __future__ import annotations

import json
import os
import runpy
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from hf_lowmem.trainer.names import OPTIM_NAMES, unknown_optim

Command = Callable[[list[str]], None]


def main(argv: list[str] | None = None) -> int:
    """Run one command; `script.py ARGS` is short for `run script.py ARGS`.

    Args:
        argv: the arguments, `sys.argv[1:]` by default.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in COMMANDS and (argv[0].endswith(".py") or os.path.isfile(argv[0])):
        argv = ["run", *argv]
    parser = ArgumentParser(
        prog="hf-lowmem",
        description="Low-memory optimizers for Hugging Face Trainer and TRL.",
        epilog="`hf-lowmem COMMAND --help` says more; `hf-lowmem script.py ARGS` is short for `hf-lowmem run`.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=str(command.__doc__).splitlines()[0].rstrip("."), add_help=False)
    command = parser.parse_args(argv[:1]).command  # each command parses the rest itself
    if command is None:
        parser.print_help()
        return 0
    COMMANDS[command](argv[1:])
    return 0


def run(argv: list[str]) -> None:
    """Run a Python script in which `optim` knows our names.

    Works under launchers too: `accelerate launch -m hf_lowmem script.py ARGS`, `torchrun -m hf_lowmem script.py ARGS`.
    """
    parser = ArgumentParser(prog="hf-lowmem run", description=run.__doc__)
    parser.add_argument("script", help="the script, run as `python SCRIPT ARGS` would")
    parser.add_argument("args", nargs=REMAINDER, metavar="ARGS", help="the script's own arguments")
    args = parser.parse_args(argv)
    if not os.path.exists(args.script):
        parser.exit(2, f"hf-lowmem run: there is no script {args.script!r}.\n")
    sys.argv = [args.script, *args.args]
    sys.path[0] = os.path.dirname(os.path.abspath(args.script))

    from hf_lowmem.trainer.build import show_summary
    from hf_lowmem.trainer.registration import register

    register()
    show_summary()
    runpy.run_path(args.script, run_name="__main__")


def train(task: str, argv: list[str]) -> None:
    """Run TRL's script for a task."""
    if find_spec("trl") is None:
        ArgumentParser(prog=f"hf-lowmem {task}").exit(
            2, f"hf-lowmem {task}: TRL is missing, install it with `pip install 'hf_lowmem[trl]'`.\n"
        )

    from hf_lowmem.trainer.trl_script import launch

    launch(task, argv)


def _training_command(task: str, what: str) -> Command:
    def command(argv: list[str]) -> None:
        train(task, argv)

    command.__doc__ = f"{what} (TRL's script, our optim names)."
    return command


def inspect(argv: list[str]) -> None:
    """Show what an optimizer keeps for each part of a model, and the bytes; no weights are loaded."""
    parser = ArgumentParser(prog="hf-lowmem inspect", description=inspect.__doc__)
    parser.add_argument("model", help="a local folder, a hub id, or a config.json")
    parser.add_argument("--optim", required=True, metavar="NAME", help="an optim name, see `hf-lowmem optims`")
    parser.add_argument(
        "--optim-args", "--optim_args", metavar="TEXT", help="options: key=value,key=value or a JSON object"
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--rows", action="store_true", help="one line per parameter instead of one per role")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(argv)
    if args.optim not in OPTIM_NAMES:
        parser.exit(2, f"hf-lowmem inspect: {unknown_optim(args.optim)}\n")

    from hf_lowmem import explain

    try:
        table = explain(_meta_model(args.model, args.dtype), args.optim, args.optim_args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"hf-lowmem inspect: {error}\n")
    if args.json:
        print(json.dumps(table.to_dict(), indent=2))
    else:
        print(table if args.rows else table.by_role())


def _meta_model(name: str, dtype: str) -> Any:
    """Build the model of a config on the meta device, which takes no memory."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        for architecture in config.architectures or ():
            if hasattr(transformers, architecture):
                return getattr(transformers, architecture)(config).to(getattr(torch, dtype))
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:  # not a causal language model
            model = transformers.AutoModel.from_config(config)
        return model.to(getattr(torch, dtype))


def optims(argv: list[str]) -> None:
    """List the optim names, with the bytes of optimizer state per parameter."""
    ArgumentParser(prog="hf-lowmem optims", description=optims.__doc__).parse_args(argv)
    print(f"{'name':<20}{'bytes/parameter':>16}  (Llama 2 7B; AdamW in fp32 keeps 8)")
    for name, optim in OPTIM_NAMES.items():
        print(f"{name:<20}{optim.bytes_per_param:>16.3f}  {optim.summary}")


def demo(argv: list[str]) -> None:
    """Train a small Llama on this machine's Python documentation, with AdamW and with ours."""
    from hf_lowmem.demo import main as demo_main

    demo_main(argv)


TRL_TASKS = {
    "sft": "Fine-tune on text",
    "reward": "Train a reward model on chosen and rejected answers",
    "dpo": "Align with chosen and rejected answers",
    "kto": "Align with answers labelled good or bad",
    "grpo": "Reinforce by a reward, groups of answers compared",
    "rloo": "Reinforce by a reward, each answer against the others",
    "distillation": "Distill a teacher model into a smaller one",
}
COMMANDS: dict[str, Command] = {
    "run": run,
    **{task: _training_command(task, what) for task, what in TRL_TASKS.items()},
    "inspect": inspect,
    "optims": optims,
    "demo": demo,
}
