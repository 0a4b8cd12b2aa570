"""The settings of both demos and their command line. They can be imported without torch."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BASELINE = "adamw_torch"


def llama(width: int, mlp_width: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    """Return the arguments of a LlamaConfig with tied embeddings."""
    shape = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return shape | attention | {"tie_word_embeddings": True} | others


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of the demo share.

    The model is so small that two cores train it past the steep first phase, where all optimizers look alike.
    """

    optims: tuple[str, ...] = (BASELINE, "factored_adamw_8bit")
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-3  # the best of AdamW's at 1.4e-3, 2e-3 and 3e-3
    seed: int = 0
    output_dir: Path = Path("demo_output")
    vocab_size: int = 1024
    max_length: int = 128
    held_out_pairs: int = 256
    # About 0.7 million parameters. The widths are multiples of 128, a size of 8-bit blocks.
    model: dict[str, Any] = field(default_factory=lambda: llama(128, 384, layers=3, heads=4, kv_heads=2))


@dataclass(frozen=True)
class StageSettings:
    """The number of optimizer steps of one stage, its rows per step, and its peak learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class RlhfSettings:
    """The settings that all pipelines of the RLHF demo share, by default at the small scale.

    The rows of a batch are answers in SFT, completions in GRPO, and preference pairs in the other stages.
    """

    scale: str = "small"
    optims: tuple[str, ...] = (BASELINE, "slim_adamw_8bit")
    seed: int = 0
    output_dir: Path = Path("demo_output")
    # About 0.8 million parameters: on two cores a larger model learns less in the same time. The wide initial weights
    # save steps, too.
    model: dict[str, Any] = field(
        default_factory=lambda: llama(128, 256, layers=3, heads=4, kv_heads=4, initializer_range=0.06)
    )
    vocab_size: int = 2048
    max_length: int = 64  # in tokens of question and answer; longer examples are left out
    held_out: int = 384  # at most so many answers are held out
    preference_rounds: int = 4  # training pairs per answer and kind of rejected answer
    sft: StageSettings = StageSettings(steps=400, batch_size=16, learning_rate=3e-3)
    reward: StageSettings = StageSettings(steps=1500, batch_size=16, learning_rate=5e-4)
    grpo: StageSettings = StageSettings(steps=80, batch_size=64, learning_rate=5e-4)
    dpo: StageSettings = StageSettings(steps=150, batch_size=16, learning_rate=1e-3)
    generations: int = 8  # completions of each question in GRPO
    completion_tokens: int = 24
    grpo_beta: float = 0.02  # the weight of the divergence from the SFT model
    dpo_beta: float = 0.1
    average_steps: int = 10  # the start and the end of a GRPO run are means over this many steps


SCALES = {
    "small": RlhfSettings(),
    "base": RlhfSettings(
        scale="base",
        model=llama(512, 1536, layers=8, heads=8, kv_heads=8, initializer_range=0.03),
        vocab_size=4096,
        sft=StageSettings(steps=600, batch_size=64, learning_rate=5e-4),
        reward=StageSettings(steps=400, batch_size=64, learning_rate=1e-4),
        grpo=StageSettings(steps=300, batch_size=256, learning_rate=1e-4),
        dpo=StageSettings(steps=200, batch_size=64, learning_rate=5e-5),
    ),
}


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line of the demo, or with `--rlhf` of the RLHF demo; a mistake ends the program."""
    rlhf = "--rlhf" in argv
    default: Any = RlhfSettings() if rlhf else Settings()
    stages = "SFT, a reward model, GRPO and DPO" if rlhf else "SFT"
    parser = ArgumentParser(
        prog="hf-lowmem demo --rlhf" if rlhf else "hf-lowmem demo",
        description=f"Train a small Llama by {stages} with each optimizer, and compare them.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rlhf", action="store_true", help="run the RLHF demo; `--rlhf --help` shows its options")
    optims = 'comma-separated names, each followed by its optim_args if any: "adamw_torch,coap_adamw rank_ratio=2"'
    parser.add_argument("--optims", type=split_optims, default=",".join(default.optims), help=optims)
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of the weights and the batches")
    parser.add_argument("--output-dir", type=Path, default=default.output_dir, help="folder for the results")
    if rlhf:
        scale = "size of the model and the runs; auto is base on a GPU and small without one"
        parser.add_argument("--scale", choices=("auto", *SCALES), default="auto", help=scale)
        return parser.parse_args(argv)
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="pairs per step")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="peak learning rate")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "learning_rate"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(args, name)}")
    return args


def split_optims(text: str) -> tuple[str, ...]:
    """Return the optim names of `--optims`."""
    if names := tuple(name.strip() for name in text.split(",") if name.strip()):
        return names
    raise ArgumentTypeError("needs at least one optim name")


def demo_settings(args: Namespace) -> Settings:
    """Return the settings of the demo with these arguments."""
    return Settings(**{name: value for name, value in vars(args).items() if name != "rlhf"})


def rlhf_settings(args: Namespace, has_gpu: bool) -> RlhfSettings:
    """Return the settings of the chosen scale, or of the one for this machine, with the other arguments."""
    scale = args.scale if args.scale in SCALES else "base" if has_gpu else "small"
    return replace(SCALES[scale], optims=args.optims, seed=args.seed, output_dir=args.output_dir)
