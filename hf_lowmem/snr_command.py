"""`hf-lowmem snr`: measure a training script's second moments, and choose what may be averaged."""

from __future__ import annotations

import os
import runpy
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from pathlib import Path
from typing import Any


def add_commands(parser: ArgumentParser) -> None:
    """Add `run`, `rules` and `show` to the parser of `hf-lowmem snr`."""
    commands = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="measure the first steps of a training script, and write its rules")
    run.add_argument("--steps", type=int, default=300, help="the number of steps (default: %(default)s)")
    run.add_argument("--every", type=int, help="steps between measurements (default: 1, then every 20th of the run)")
    run.add_argument("--output", type=Path, default=Path("snr"), help="the folder for results (default: %(default)s)")
    _add_choice(run)
    run.add_argument("script", help="a script that uses a Trainer, run as `python SCRIPT ARGS` would")
    run.add_argument("args", nargs=REMAINDER, metavar="ARGS", help="the script's own arguments")
    rules = commands.add_parser("rules", help="write the rules that follow from a CSV")
    rules.add_argument("file", type=Path, help="the CSV of a calibration, of SnrCallback, or of SlimAdam's authors")
    rules.add_argument("--output", type=Path, default=Path("rules.json"), help="the file (default: %(default)s)")
    _add_choice(rules)
    show = commands.add_parser("show", help="print a CSV by layer, with what each cut-off saves, and draw it")
    show.add_argument("file", type=Path, help="the CSV")
    show.add_argument("--png", type=Path, help="the picture (default: the CSV's name with .png)")
    _add_choice(show)


def _add_choice(parser: ArgumentParser) -> None:
    parser.add_argument("--cutoff", type=float, default=1.0, help="the ratio to exceed (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="decide by the smallest ratio, not the mean")
    parser.add_argument("--no-row-col", action="store_true", help="factor no second moment, as SlimAdam's authors")
    parser.add_argument(
        "--bytes-per-param",
        type=float,
        metavar="BYTES",
        help="in place of a cut-off, the most bytes of second moment per parameter, in float32",
    )


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
        if png:
            _show(args, file, png)
        if rules:
            _write_rules(args, file, rules)
    except ValueError as error:
        parser.error(str(error))


def _calibrate(parser: ArgumentParser, args: Namespace, csv: Path) -> bool:
    """Run a script until its calibration ends it, and return whether this process is to write what follows from it."""
    for name in ("steps", "every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if not os.path.exists(args.script):
        parser.error(f"there is no script {args.script!r}")
    from hf_lowmem.log import is_first_process  # torch and transformers are slow to import
    from hf_lowmem.trainer.calibration import CalibrationDone, calibrate
    from hf_lowmem.trainer.registration import register

    sys.argv = [args.script, *args.args]
    sys.path[0] = os.path.dirname(os.path.abspath(args.script))
    register()
    calibrate(csv, args.steps, args.every or max(1, args.steps // 20))
    try:
        runpy.run_path(args.script, run_name="__main__")
    except CalibrationDone:
        return is_first_process()
    parser.error(f"{args.script!r} ended without a call of Trainer.train, so nothing was measured")


def _found(args: Namespace, file: Path) -> tuple[dict[str, Any], float]:
    """Return the ratios of a CSV, and the cut-off that was asked for or follows from the bytes."""
    from hf_lowmem.snr.ratios import read_ratios
    from hf_lowmem.snr.rules import cutoff_for

    found = read_ratios(file)
    if args.bytes_per_param is None:
        return found, args.cutoff
    return found, cutoff_for(found, args.bytes_per_param, _over(args), not args.no_row_col)


def _over(args: Namespace) -> Any:
    return "min" if args.smallest else "mean"


def _write_rules(args: Namespace, file: Path, output: Path) -> None:
    from hf_lowmem.snr.rules import rules_from_csv, write_rules

    rules = rules_from_csv(file, args.cutoff, _over(args), args.bytes_per_param, not args.no_row_col)
    write_rules(output, rules)
    sys.stdout.write(f'Train with optim="slim_adamw" and optim_args="rules={output}".\n')


def _show(args: Namespace, file: Path, png: Path) -> None:
    from hf_lowmem.snr_report import draw, report

    found, cutoff = _found(args, file)
    sys.stdout.write(report(found, cutoff, _over(args), not args.no_row_col) + "\n\n")
    try:
        draw(found, png, cutoff)
    except ModuleNotFoundError as error:
        sys.stdout.write(f"No picture: {error.name!r} is missing; `pip install 'hf_lowmem[plots]'` installs it.\n")
    else:
        sys.stdout.write(f"Picture: {png}\n")
