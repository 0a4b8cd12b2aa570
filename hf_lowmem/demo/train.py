"""The demo's training runs: SFTTrainer as a user's own script would call it, once per optim name."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from hf_lowmem.demo import Settings
from hf_lowmem.demo.data import Pair, build_pairs, train_tokenizer
from hf_lowmem.demo.report import Run, measure_state, print_table, save_json, save_png
from hf_lowmem.demo.watch import train_watched
from hf_lowmem.trainer.names import unknown_optim
from hf_lowmem.trainer.registration import register

EVALUATIONS = 3


def run_demo(settings: Settings) -> list[Run]:
    """Train once per optim name, print the table and write the figure and the JSON."""
    register()
    quieten()
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)

    train_pairs, held_out_pairs = build_pairs()
    tokenizer = train_tokenizer(train_pairs, settings.vocab_size)
    held_out_pairs = held_out_pairs[: settings.held_out_pairs]
    device = describe_device()
    console.print(
        f"{len(train_pairs)} question/answer pairs from Python's documentation, {len(held_out_pairs)} more held out\n"
        f"{settings.steps} steps of {settings.batch_size} pairs for each optimizer ({device})"
    )

    runs = [train(optim, settings, tokenizer, train_pairs, held_out_pairs, console) for optim in settings.optims]

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    figure, numbers = settings.output_dir / "demo.png", settings.output_dir / "demo.json"
    print_table(runs, console)
    save_png(runs, figure)
    save_json(runs, settings, device, numbers)
    console.print(f"{time.perf_counter() - started:.0f} s in all. Figure: {figure}, numbers: {numbers}")
    return runs


def describe_unknown_optims(optims: Sequence[str]) -> str | None:
    """One sentence about the first name that the Trainer does not know, or None."""
    register()
    known = [str(name.value) for name in OptimizerNames]
    names = [optim.split()[0] for optim in optims]
    return next((unknown_optim(name, known) for name in names if name not in known), None)


def quieten() -> None:
    """Leave the terminal to the demo's own lines."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("hf_lowmem").setLevel(logging.WARNING)
    # TRL sets the deprecated `gradient_checkpointing` itself, whatever the caller does.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def describe_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def build_model(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any], max_length: int) -> LlamaForCausalLM:
    """A Llama of these widths with new weights, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **model,
    )
    return LlamaForCausalLM(config)


def shared_arguments(optim: str, seed: int, steps: int) -> dict[str, Any]:
    """The training arguments that every run of a demo shares; `optim` is a name and the options that follow it."""
    name, *options = optim.split()
    use_gpu = torch.cuda.is_available()
    return {
        "optim": name,
        "optim_args": ",".join(options) or None,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 10),
        "eval_strategy": "steps",
        "eval_steps": math.ceil(steps / EVALUATIONS),
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": use_gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": not use_gpu,
        "seed": seed,
    }


def train(
    optim: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    train_pairs: list[Pair],
    held_out_pairs: list[Pair],
    console: Console,
) -> Run:
    """Fine-tune a fresh model with the optimizer of this name, and the options that follow it."""
    set_seed(settings.seed)
    model = build_model(tokenizer, settings.model, settings.max_length)
    args = SFTConfig(
        **shared_arguments(optim, settings.seed, settings.steps),
        output_dir=str(settings.output_dir / "trainer"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=settings.learning_rate,
        max_length=settings.max_length,
        train_sampling_strategy="group_by_length",
        logging_steps=max(1, settings.steps // 50),
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(train_pairs),
        eval_dataset=datasets.Dataset.from_list(held_out_pairs),
        processing_class=tokenizer,
    )
    watch = train_watched(optim, trainer, {"loss": "train", "eval_loss": "held-out"}, console)
    return Run(
        optim=optim,
        **measure_state(trainer.model, trainer.optimizer),
        held_out_loss=watch.last("eval_loss"),
        seconds_per_step=statistics.median(watch.step_seconds),
        train_losses=watch.curves["loss"],
        held_out_losses=watch.curves["eval_loss"],
    )
