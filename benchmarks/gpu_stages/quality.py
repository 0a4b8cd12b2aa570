"""Trains a new model on the source code of installed packages for as long as the time allows, and evaluates it."""

from __future__ import annotations

import os
import tempfile
from copy import deepcopy
from typing import Any

import torch
import transformers
from corpus import Corpus, python_corpus
from presets import PRESETS
from train import StepTimes
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

import hf_lowmem
from gpu_stages.session import Session

CHARACTERS, CHARACTERS_ON_CPU = 24_000_000, 400_000
VOCABULARY, VOCABULARY_ON_CPU = 8192, 512
LENGTH, BATCH_SIZE, LENGTH_ON_CPU, BATCH_ON_CPU = 512, 32, 32, 4
HELD_OUT = 64  # rows
TRIED, FEWEST, SPARE = 6, 4, 0.4  # how many steps are timed, the fewest steps, and the share of the time for steps
LEARNING_RATE, KEPT = 1e-3, 0.1  # KEPT is the share of the time for the evaluation


class StopInTime(TrainerCallback):
    """Ends a training that could not be evaluated in time."""

    def __init__(self, session: Session) -> None:
        self.session, self.started_with = session, session.seconds_left

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.session.seconds_left < KEPT * self.started_with


def prepare(session: Session) -> None:
    """Write the Python files of installed packages as rows of tokens to a temporary folder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rows = corpus_of(session)
    session.row("text", tokens=rows.train.numel(), rows=len(rows.train), held_out_rows=len(rows.held_out))


def corpus_of(session: Session) -> Corpus:
    if session.on_gpu:
        return python_corpus(CHARACTERS, VOCABULARY, LENGTH)
    return python_corpus(CHARACTERS_ON_CPU, VOCABULARY_ON_CPU, LENGTH_ON_CPU)


def run(session: Session, optim: str) -> None:
    """Train with one optimizer for as many steps as the first one had time for."""
    hf_lowmem.register()
    corpus = corpus_of(session)
    planned = session.scratch / "steps"
    if not planned.exists():
        planned.write_text(str(affordable_steps(session, corpus, optim)))
    steps = int(planned.read_text())
    trainer, times = trainer_of(session, corpus, optim, steps)
    loss = trainer.train().training_loss
    figures = {"steps": steps, "seconds_per_step": sum(times.seconds) / len(times.seconds)}
    if trainer.state.global_step < steps:  # the loss would not be comparable
        session.row(optim, **figures)
        raise RuntimeError(f"only {trainer.state.global_step} of {steps} steps were taken in time")
    session.row(optim, **figures, training_loss=loss, held_out_loss=trainer.evaluate()["eval_loss"])


def affordable_steps(session: Session, corpus: Corpus, optim: str) -> int:
    trainer, times = trainer_of(session, corpus, optim, TRIED)
    trainer.train()
    seconds = sorted(times.seconds)[TRIED // 2]
    return max(FEWEST, int(SPARE * session.seconds_left / seconds))


def trainer_of(session: Session, corpus: Corpus, optim: str, steps: int) -> tuple[transformers.Trainer, StepTimes]:
    torch.manual_seed(0)
    config = deepcopy(PRESETS[session.preset or "100m"])
    config.vocab_size = VOCABULARY if session.on_gpu else VOCABULARY_ON_CPU
    times = StepTimes()
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=session.scratch),
        optim=optim,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE if session.on_gpu else BATCH_ON_CPU,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        bf16=session.on_gpu,
        use_cpu=not session.on_gpu,
        save_strategy="no",
        report_to="none",
        logging_steps=max(steps // 20, 1),
        disable_tqdm=True,
        seed=0,
    )
    train, held_out = ([{"input_ids": row, "labels": row} for row in rows] for rows in corpus)
    every = max(len(held_out) // HELD_OUT, 1)
    model = LlamaForCausalLM(config)
    datasets = {"train_dataset": train, "eval_dataset": held_out[::every][:HELD_OUT]}
    return transformers.Trainer(model=model, args=args, callbacks=[times, StopInTime(session)], **datasets), times
