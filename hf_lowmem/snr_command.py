"""`hf-lowmem snr`: measure a training script's second moments, and choose what may be averaged."""

from __future__ import annotations

import math
import os
import runpy
import sys
from argparse import REMAINDER, ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_lowmem.snr.ratios import Measured
    from hf_lowmem.snr.rules import Criterion, Over

BUDGET = "--bytes-per-param"


def add_commands(parser: ArgumentParser) -> None:
    """Add `run`, `rules` and `show` to the parser of `hf-lowmem snr`."""
    commands = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="measure the first steps of a training script, and write its rules")
    run.add_argument("--steps", type=_count, default=300, help="the number of steps (default: %(default)s)")
    run.add_argument("--every", type=_count, help="steps between measurements (default: a 20th of the run)")
    run.add_argument("--output", type=Path, default=Path("snr"), help="the folder for results (default: %(default)s)")
    _add_choice(run)
    run.add_argument("script", help="a script that uses a Trainer, run as `python SCRIPT ARGS` would")
    run.add_argument("args", nargs=REMAINDER, metavar="ARGS", help="the script's own arguments")
    rules = commands.add_parser("rules", help="write the rules that follow from a CSV")
    rules.add_argument("file", type=Path, help="the CSV of a calibration, of SnrCallback, or of SlimAdam's authors")
    rules.add_argument("--output", type=Path, default=Path("rules.json"), help="the file (default: %(default)s)")
    _add_choice(rules)
    show = commands.add_parser("show", help="print a CSV by weight name, with what each cut-off saves, and draw it")
    show.add_argument("file", type=Path, help="the CSV")
    show.add_argument("--png", type=Path, help="the picture (default: the CSV's name with .png)")
    _add_choice(show)


def _add_choice(parser: ArgumentParser) -> None:
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--cutoff", type=_positive, default=1.0, help="the ratio to exceed (default: %(default)s)")
    limit.add_argument(
        BUDGET,
        type=_positive,
        metavar="BYTES",
        help="in place of a cut-off, the most bytes of second moment per parameter, in float32",
    )
    parser.add_argument("--smallest", action="store_true", help="decide by the smallest ratio, not the mean")
    parser.add_argument("--authors", action="store_true", help="choose among axes alone, as SlimAdam's authors do")


def _positive(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} must be a finite number above 0")
    return value


def _count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def main(parser: ArgumentParser, argv: list[str]) -> None:
    """Run one of the commands. What is wrong with what was given ends the process with one sentence."""
    add_commands(parser)
    args = parser.parse_args(argv)
    png: Path | None = None
    rules: Path | None = None
    if args.action == "run":
        folder = args.output.absolute()  # the script may change the working directory
        file, png, rules = folder / "snr.csv", folder / "snr.png", folder / "rules.json"
        if not _calibrate(parser, args, file):
            return
    elif args.action == "show":
        file, png = args.file, args.png or args.file.with_suffix(".png")
    else:
        file, rules = args.file, args.output
    try:
        found, criterion = _found(parser, args, file)
        if png:
            _show(found, criterion, png)
        if rules:
            _write_rules(found, criterion, rules)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _calibrate(parser: ArgumentParser, args: Namespace, csv: Path) -> bool:
    """Run a script until its calibration ends it, and return whether this process is to write what follows from it."""
    if not os.path.exists(args.script):
        parser.error(f"there is no script {args.script!r}")
    from hf_lowmem.log import is_first_process  # torch and transformers are slow to import
    from hf_lowmem.snr.choice import interval
    from hf_lowmem.trainer.calibration import CalibrationDone, calibrate
    from hf_lowmem.trainer.registration import register

    sys.argv = [args.script, *args.args]
    sys.path[0] = os.path.dirname(os.path.abspath(args.script))
    register()
    try:
        with calibrate(csv, args.steps, args.every or interval(args.steps)):
            runpy.run_path(args.script, run_name="__main__")
    except CalibrationDone as done:
        if done.refused:
            parser.error(done.refused)
        return is_first_process()
    parser.error(
        f"{args.script!r} ended before anything was measured: it must call Trainer.train, and let its errors through"
    )


def _found(parser: ArgumentParser, args: Namespace, file: Path) -> tuple[dict[str, Measured], Criterion]:
    """Return the ratios of a CSV, and the criterion that was asked for or follows from the bytes."""
    from hf_lowmem.snr.ratios import read_ratios
    from hf_lowmem.snr.rules import BudgetError, Criterion

    found = read_ratios(file)
    over: Over = "min" if args.smallest else "mean"
    if args.bytes_per_param is None:
        return found, Criterion(args.cutoff, over, args.authors)
    try:
        return found, Criterion.within(args.bytes_per_param, found, over, args.authors)
    except BudgetError as error:
        parser.error(f"{BUDGET} {args.bytes_per_param:g} is too small: {error.reason}")


def _write_rules(found: dict[str, Measured], criterion: Criterion, output: Path) -> None:
    from hf_lowmem.snr.choice import ROW_COL
    from hf_lowmem.snr.rules import as_rules, write_rules

    choices = criterion.choices(found)
    write_rules(output, as_rules(found, choices))
    optim = "factored_adamw" if ROW_COL in choices.values() else "slim_adamw"
    sys.stdout.write(f'Train with optim="{optim}" (or "{optim}_8bit") and optim_args="rules={output}".\n')


def _show(found: dict[str, Measured], criterion: Criterion, png: Path) -> None:
    from hf_lowmem.snr_report import draw, report

    sys.stdout.write(report(found, criterion) + "\n\n")
    try:
        draw(found, png, criterion.cutoff)
    except ModuleNotFoundError as error:
        sys.stdout.write(f"No picture: {error.name!r} is missing; `pip install 'hf_lowmem[plots]'` installs it.\n")
    else:
        sys.stdout.write(f"Picture: {png}\n")
