"""The settings of `hf-lowmem demo --rlhf` and its command line. Importable without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_lowmem.demo import BASELINE, HELP_OPTIMS, split_optims

# About 0.8 million parameters with the small vocabulary: on two cores, a larger model learns less in the same time.
# The wide initial weights save steps, too.
SMALL_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
BASE_MODEL = SMALL_MODEL | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "initializer_range": 0.03,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class StageSettings:
    """One stage's optimizer steps, rows per step and peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class RlhfSettings:
    """What all pipelines of one demo share. A batch is of answers, of preference pairs, or in GRPO of completions."""

    scale: str = "small"
    optims: tuple[str, ...] = (BASELINE, "slim_adamw_8bit")
    seed: int = 0
    output_dir: Path = Path("demo_output")
    model: dict[str, Any] = field(default_factory=lambda: dict(SMALL_MODEL))
    vocab_size: int = 2048
    max_length: int = 64  # tokens of a question and an answer; longer ones are left out
    held_out: int = 384  # answers at most
    preference_rounds: int = 4  # training pairs of each answer and kind
    sft: StageSettings = StageSettings(steps=400, batch_size=16, learning_rate=3e-3)
    reward: StageSettings = StageSettings(steps=1500, batch_size=16, learning_rate=5e-4)
    grpo: StageSettings = StageSettings(steps=80, batch_size=64, learning_rate=5e-4)
    dpo: StageSettings = StageSettings(steps=150, batch_size=16, learning_rate=1e-3)
    generations: int = 8  # completions of each question in GRPO
    completion_tokens: int = 24
    grpo_beta: float = 0.02  # weight of the divergence from the SFT model
    dpo_beta: float = 0.1
    average_steps: int = 10  # the start and the end of a GRPO run are means over so many steps


SCALES = {
    "small": RlhfSettings(),
    "base": RlhfSettings(
        scale="base",
        model=BASE_MODEL,
        vocab_size=4096,
        sft=StageSettings(steps=600, batch_size=64, learning_rate=5e-4),
        reward=StageSettings(steps=400, batch_size=64, learning_rate=1e-4),
        grpo=StageSettings(steps=300, batch_size=256, learning_rate=1e-4),
        dpo=StageSettings(steps=200, batch_size=64, learning_rate=5e-5),
    ),
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line after `--rlhf`; a wrong value ends the program with one sentence."""
    default = RlhfSettings()
    parser = argparse.ArgumentParser(
        prog="hf-lowmem demo --rlhf",
        description="SFT, a reward model, GRPO and DPO of one small Llama, each with several optimizers.",
    )
    parser.add_argument("--optims", type=split_optims, default=",".join(default.optims), help=HELP_OPTIMS)
    parser.add_argument(
        "--scale", choices=tuple(SCALES), help="size of the model and length of the runs (default: base on a GPU)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=default.output_dir, help="default: %(default)s")
    return parser.parse_args(argv)


def choose_settings(args: argparse.Namespace, has_gpu: bool) -> RlhfSettings:
    """The preset of the scale asked for, or of this machine's, with the other arguments in it."""
    scale = SCALES[args.scale or ("base" if has_gpu else "small")]
    return replace(scale, optims=args.optims, seed=args.seed, output_dir=args.output_dir)
