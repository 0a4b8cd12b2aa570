"""The demo's training runs: SFTTrainer as a user's own script would call it, once per optim name."""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from hf_lowmem.demo import report
from hf_lowmem.demo.data import build_pairs, train_tokenizer
from hf_lowmem.demo.settings import BASELINE, Settings
from hf_lowmem.trainer.names import unknown_optim
from hf_lowmem.trainer.registration import register

EVALUATIONS = 5
PANEL = report.Panel("SFT", "loss", ["eval_loss"], "loss", "nats per token")


def run_demo(settings: Settings) -> None:
    """Train once per optim name, print the table, and write the figure and the JSON."""
    started = time.perf_counter()
    prepare()
    train_pairs, held_out_pairs = build_pairs()
    tokenizer = train_tokenizer(train_pairs, settings.vocab_size)
    held_out_pairs = held_out_pairs[: settings.held_out_pairs]
    tqdm.write(
        f"{len(train_pairs)} question/answer pairs from Python's documentation, {len(held_out_pairs)} more held out\n"
        f"{settings.steps} steps of {settings.batch_size} pairs for each optimizer ({report.describe_device()})"
    )
    runs = {}
    for optim in settings.optims:
        set_seed(settings.seed)
        trainer = SFTTrainer(
            model=build_model(tokenizer, settings.model, settings.max_length),
            args=SFTConfig(
                **training_arguments(optim, settings.seed, settings.steps),
                output_dir=str(settings.output_dir / "trainer"),
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=32,
                learning_rate=settings.learning_rate,
                max_length=settings.max_length,
                train_sampling_strategy="group_by_length",
                logging_steps=max(1, settings.steps // 50),
            ),
            train_dataset=datasets.Dataset.from_list(train_pairs),
            eval_dataset=datasets.Dataset.from_list(held_out_pairs),
            processing_class=tokenizer,
        )
        runs[optim] = train(optim, trainer, {"loss": "train", "eval_loss": "held-out"})
    described = [report.describe_run(optim, run, runs.get(BASELINE)) for optim, run in runs.items()]
    report.print_runs(described)
    tqdm.write(f"{time.perf_counter() - started:.0f} s in all.")
    figure = report.draw({optim: {"SFT": run} for optim, run in runs.items()}, [PANEL])
    figure.suptitle(report.headline(described), fontsize=14, fontweight="bold")
    report.save(settings, "demo", figure, {"baseline": BASELINE, "runs": described})


def unknown_name(optims: Sequence[str]) -> str | None:
    """Return a sentence about the first name that the Trainer does not know, or None if it knows them all."""
    register()
    known = [str(name.value) for name in OptimizerNames]
    names = [optim.split()[0] for optim in optims]
    return next((unknown_optim(name, known) for name in names if name not in known), None)


def prepare() -> None:
    """Register our names, and leave the terminal to the demo's own lines."""
    register()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("hf_lowmem").setLevel(logging.WARNING)
    # TRL sets the deprecated `gradient_checkpointing` itself, whatever the caller does.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def build_model(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any], max_length: int) -> LlamaForCausalLM:
    """Return a new Llama with weights from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **model,
    )
    return LlamaForCausalLM(config)


def training_arguments(optim: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the training arguments that all runs share; `optim` is a name followed by its options."""
    name, *options = optim.split()
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
        "bf16": has_gpu() and torch.cuda.is_bf16_supported(),
        "use_cpu": not has_gpu(),
        "seed": seed,
    }


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps every number that a run logs, times its steps, and shows the values of the keys in `shown`.

    A bar shows the steps on a terminal, and a line is printed whenever the last of these keys is logged.
    """

    def __init__(self, label: str, steps: int, shown: dict[str, str]) -> None:
        self.label, self.shown = label, shown
        self.curves: defaultdict[str, report.Curve] = defaultdict(list)
        self.step_seconds: list[float] = []
        self.bar = tqdm(total=steps, desc=label, leave=False, disable=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if has_gpu():
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self.step_started)
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = with_name_of_set(logs or {})
        for key, value in logs.items():
            self.curves[key].append((state.global_step, float(value)))
        if list(self.shown)[-1] in logs:
            values = [f"{name} {self.curves[key][-1][1]:.3f}" for key, name in self.shown.items() if self.curves[key]]
            tqdm.write(f"{self.label:<16} step {state.global_step}/{args.max_steps}  {'  '.join(values)}")


def train(label: str, trainer: Any, shown: dict[str, str], evaluate_first: bool = False) -> report.Training:
    """Train, evaluate after the last step in any case, and return what was measured and logged."""
    watch = Watch(label, trainer.args.max_steps, shown)
    trainer.add_callback(watch)
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    with watch.bar:
        if evaluate_first:
            trainer.evaluate()
        trainer.train()
        if trainer.args.max_steps % trainer.args.eval_steps:
            trainer.evaluate()
    return report.Training(
        **report.measure_state(trainer.model, trainer.optimizer),
        seconds=time.perf_counter() - started,
        seconds_per_step=statistics.median(watch.step_seconds),
        curves=dict(watch.curves),
    )


def with_name_of_set(logs: dict[str, Any]) -> dict[str, Any]:
    """Return the logs of an evaluation with the name of its set in every key.

    The Trainer's own keys have it, as in `eval_another_loss`, but TRL calls its metrics `eval_accuracy` in every set.
    """
    losses = [key for key in logs if re.fullmatch("eval_.*_loss", key)]
    prefix = losses[0].removesuffix("loss") if losses else "eval_"
    return {re.sub(f"^(?!{prefix})eval_", prefix, key): value for key, value in logs.items()}
