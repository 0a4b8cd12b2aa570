"""`hf-lowmem demo`: train one small Llama with several optimizers, and compare their memory and what they learn.

Each optimizer starts from the same weights and sees the same batches; only `optim=` differs. The demo prints a table,
and writes a figure and the numbers as JSON to the output folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_lowmem.demo.settings import BASELINE, demo_settings, parse_args, rlhf_settings

__all__ = ["BASELINE", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo with these arguments, or with those of the process; `--rlhf` runs the longer one."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        from hf_lowmem.demo import train

        if args.rlhf:  # this import takes seconds
            from hf_lowmem.demo import rlhf
        problem = train.unknown_name(args.optims)
    except ModuleNotFoundError as error:
        problem = f"{error.name!r} is missing: install it with `pip install 'hf_lowmem[trl,plots]'`."
    if problem:
        sys.stderr.write(f"hf-lowmem demo: {problem}\n")
        sys.exit(2)
    if args.rlhf:
        rlhf.run_rlhf_demo(rlhf_settings(args, train.has_gpu()))
    else:
        train.run_demo(demo_settings(args))
