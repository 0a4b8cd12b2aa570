"""The command line `hf-lowmem`. Slow imports are deferred, so that the help and `optims` answer at once."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

from hf_lowmem import __version__
from hf_lowmem.trainer.names import ADAMW_NAMES, OPTIM_NAMES, legal_names, nearest, unknown_optim

Command = Callable[[list[str]], int | None]


class Parser(ArgumentParser):
    """A parser that answers a mistake in one sentence and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            near = nearest(unknown[0], options, n=1, cutoff=0.6)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; {self.prog} --help lists what it takes"
            self.error(f"Unexpected {unknown[0]!r}{hint}")
        return given


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; `script.py ARGS` is short for `run script.py ARGS`.

    Args:
        argv: the arguments. By default those of the process, which then belongs to the command and may be ended by it.
    """
    if argv is None:
        return _own_process(sys.argv[1:])
    if argv and argv[0] not in COMMANDS and (argv[0].endswith(".py") or os.path.isfile(argv[0])):
        argv = ["run", *argv]
    parser = Parser(
        prog="hf-lowmem",
        description="Low-memory optimizers for Hugging Face Trainer and TRL.",
        epilog="`hf-lowmem COMMAND --help` says more; `hf-lowmem script.py ARGS` is short for `hf-lowmem run`.",
    )
    parser.add_argument("--version", action="version", version=f"hf-lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=str(command.__doc__).splitlines()[0].rstrip("."), add_help=False)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = nearest(argv[0], [*COMMANDS, "--version", "--help"], n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; the commands: {', '.join(COMMANDS)}"
        parser.error(f"there is no command {argv[0]!r}{hint}")
    command = parser.parse_args(argv[:1]).command  # each command parses the rest itself
    if command is None:
        parser.print_help()
        return 0
    return COMMANDS[command](argv[1:]) or 0


def _own_process(argv: list[str]) -> int:
    """Run a command that owns the process; one that only answers exits faster, and silently under `| head`."""
    if not _only_answers(argv):
        return main(argv)
    gc.disable()  # imports make millions of lasting objects, which the collector would scan for most of a second
    try:
        try:
            status = main(argv)
        except SystemExit as leave:
            status = int(leave.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141  # the status that a shell reports for SIGPIPE
    sys.stderr.flush()
    os._exit(status)  # a regular exit takes a second more to free the modules, and would write to the pipe again


def _only_answers(argv: list[str]) -> bool:
    """Return whether the command neither trains nor runs a script of the user's."""
    command, *rest = argv or ["--help"]
    asks_help = not {"-h", "--help", "--help-all"}.isdisjoint(rest)
    return (
        command.startswith("-") or command in ("inspect", "optims", "doctor") or (command in TRL_TASKS and asks_help)
    )


def run(argv: list[str]) -> None:
    """Run a Python script in which our names are legal values of `optim`.

    Launchers work too: `accelerate launch -m hf_lowmem script.py ARGS`, `torchrun -m hf_lowmem script.py ARGS`.
    """
    parser = Parser(prog="hf-lowmem run", description=run.__doc__)
    parser.add_argument("script", help="the script, run as `python SCRIPT ARGS` would")
    parser.add_argument("args", nargs=REMAINDER, metavar="ARGS", help="the script's own arguments")
    args = parser.parse_args(argv)
    if not os.path.exists(args.script):
        parser.error(f"there is no script {args.script!r}")
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
        Parser(prog=f"hf-lowmem {task}").error("TRL is missing: install it with `pip install 'hf_lowmem[trl]'`")

    from hf_lowmem.trainer.trl_script import launch

    launch(task, argv)


def _training_command(task: str, what: str) -> Command:
    def command(argv: list[str]) -> None:
        train(task, argv)

    command.__doc__ = f"{what} (TRL's script, our optim names)."
    return command


def inspect(argv: list[str]) -> None:
    """Show what an optimizer keeps for each part of a model, or compare all optimizers, without loading weights."""
    parser = Parser(prog="hf-lowmem inspect", description=inspect.__doc__)
    parser.add_argument("model", help="a local folder, a hub id, or a config.json")
    parser.add_argument(
        "--optim", metavar="NAME", help="a name that `hf-lowmem optims` lists, or adamw_torch (default: compare all)"
    )
    parser.add_argument(
        "--optim-args", "--optim_args", metavar="TEXT", help="options: key=value,key=value or a JSON object"
    )
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="the dtype of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="show what each of N processes holds under FSDP2 (default: 1)",
    )
    parser.add_argument("--rows", action="store_true", help="print a line per parameter instead of one per role")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    names = [*legal_names(), *ADAMW_NAMES]
    if args.optim is None and (args.rows or args.optim_args):
        parser.error(f"{'--rows' if args.rows else '--optim-args'} needs --optim NAME: see `hf-lowmem optims`")
    if args.optim not in (None, *names):
        parser.error(unknown_optim(args.optim, names))

    import torch

    from hf_lowmem.trainer.explain import compare, explain
    from hf_lowmem.trainer.meta_model import meta_model

    try:
        model = meta_model(args.model, getattr(torch, args.dtype))
        if args.optim:
            found: Any = explain(model, args.optim, args.optim_args, ranks=args.ranks)
        else:
            found = compare(model, ranks=args.ranks)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(found.by_role() if args.optim and not args.rows else found)


def optims(argv: list[str]) -> None:
    """List the optim names, with the bytes of optimizer state per parameter."""
    Parser(prog="hf-lowmem optims", description=optims.__doc__).parse_args(argv)
    print(f"{'name':<20}{'bytes/parameter':>16}  (Llama 2 7B; AdamW in fp32 keeps 8)")
    for name, optim in OPTIM_NAMES.items():
        print(f"{name:<20}{optim.bytes_per_param:>16.3f}  {optim.summary}")


def doctor(argv: list[str]) -> int:
    """Report what is installed, which kernels are found, and whether a step of each optimizer is right."""
    parser = Parser(prog="hf-lowmem doctor", description=doctor.__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)

    from hf_lowmem.doctor import examine, report

    found = examine()
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 1 if found["broken"] else 0


def convert(argv: list[str]) -> None:
    """Convert a checkpoint of the AdamW family to one that adamw_torch resumes from."""
    from hf_lowmem.convert import convert as command

    command(argv)


def snr(argv: list[str]) -> None:
    """Measure which second moments of a training script may be averaged, and write rules for it."""
    from hf_lowmem.snr_command import main as command

    command(Parser(prog="hf-lowmem snr", description=snr.__doc__), argv)


def demo(argv: list[str]) -> None:
    """Train a small Llama on this machine's Python documentation, with AdamW and with our optimizers."""
    from hf_lowmem.demo import main as demo_main

    demo_main(argv)


TRL_TASKS = {
    "sft": "Fine-tune on text",
    "reward": "Train a reward model on chosen and rejected answers",
    "dpo": "Align with chosen and rejected answers",
    "kto": "Align with answers that are labelled good or bad",
    "grpo": "Reinforce with a reward that compares the answers of a group",
    "rloo": "Reinforce with a reward that compares each answer with the others",
    "distillation": "Distill a teacher model into a smaller one",
}
COMMANDS: dict[str, Command] = {
    "run": run,
    **{task: _training_command(task, what) for task, what in TRL_TASKS.items()},
    "inspect": inspect,
    "optims": optims,
    "doctor": doctor,
    "convert": convert,
    "snr": snr,
    "demo": demo,
}
