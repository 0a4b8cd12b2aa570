"""`hf-lowmem demo`: fine-tune one small Llama with several optimizers and compare their memory and loss.

Each optimizer starts from the same weights and sees the same batches; only `optim=` differs. Prints a table and
writes `demo.png` and `demo.json` to the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

BASELINE = "adamw_torch"

# About 5 million parameters. Every width is a multiple of 256, the size of an 8-bit block.
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


HELP_OPTIMS = (
    "comma-separated optim names, each followed by its optim_args if any, as in "
    '"adamw_torch,coap_adamw_8bit rank_ratio=2 eq5_scale=rms" (default: %(default)s)'
)


@dataclass(frozen=True)
class Settings:
    """What all runs of one demo share."""

    optims: tuple[str, ...] = (BASELINE, "slim_adamw_8bit", "adam_mini_8bit")
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    output_dir: Path = Path("demo_output")
    vocab_size: int = 4096
    max_length: int = 128
    held_out_pairs: int = 96
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or with `--rlhf` the other one, with these arguments, `sys.argv[1:]` by default.

    Returns:
        The exit status.
    """
    from hf_lowmem.demo import rlhf_settings

    argv = sys.argv[1:] if argv is None else argv
    rest = [argument for argument in argv if argument != "--rlhf"]
    rlhf = len(rest) < len(argv)
    args: Any = rlhf_settings.parse_args(rest) if rlhf else parse_args(rest)
    try:
        import torch

        from hf_lowmem.demo.train import describe_unknown_optims, run_demo

        if rlhf:  # which takes seconds
            from hf_lowmem.demo.rlhf import run_rlhf_demo
    except ModuleNotFoundError as error:
        fail(f"'{error.name}' is missing, install it with `pip install 'hf_lowmem[trl,plots]'`.")
    if problem := describe_unknown_optims(args.optims):
        fail(problem)
    if rlhf:
        run_rlhf_demo(rlhf_settings.choose_settings(args, torch.cuda.is_available()))
    else:
        run_demo(args)
    return 0


def split_optims(text: str) -> tuple[str, ...]:
    """The optim names of `--optims`."""
    if names := tuple(name.strip() for name in text.split(",") if name.strip()):
        return names
    raise argparse.ArgumentTypeError("needs at least one optim name")


def fail(problem: str) -> NoReturn:
    sys.stderr.write(f"hf-lowmem demo: {problem}\n")
    raise SystemExit(2)


def parse_args(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line into Settings; a wrong value ends the program with one sentence."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="hf-lowmem demo",
        description="Fine-tune one small Llama with several optimizers and compare them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rlhf",
        action="store_true",
        default=argparse.SUPPRESS,  # `main` has taken it
        help="run SFT, a reward model, GRPO and DPO instead; `--rlhf --help` shows the options of that demo",
    )
    optims = ",".join(default.optims)
    parser.add_argument("--optims", type=split_optims, default=optims, help=HELP_OPTIMS)
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="default: %(default)s pairs")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=default.output_dir, help="default: %(default)s")
    args = parser.parse_args(argv)
    for option in ("steps", "batch_size", "learning_rate"):
        if getattr(args, option) <= 0:
            parser.error(f"--{option.replace('_', '-')} must be greater than 0, got {getattr(args, option)}")
    return Settings(**vars(args))
