"""Trains a new model on the source code of installed packages for as long as the time allows, and evaluates it."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from presets import PRESETS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from train import StepTimes
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

import hf_lowmem
from gpu_stages.session import Session

CHARACTERS, CHARACTERS_ON_CPU = 24_000_000, 400_000
VOCABULARY, LEARNED_FROM = 8192, 4_000_000  # tokens, and the characters that the tokenizer is trained on
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
    """Write Python files as rows of tokens to the session's scratch folder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    text = sources(CHARACTERS if session.on_gpu else CHARACTERS_ON_CPU)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCABULARY if session.on_gpu else 512
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(pieces(text[:LEARNED_FROM], 10_000), trainer)
    encoded = tokenizer.encode_batch(pieces(text, 100_000))
    tokens = torch.tensor([number for each in encoded for number in each.ids])
    length = LENGTH if session.on_gpu else LENGTH_ON_CPU
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    torch.save({"rows": rows, "vocab_size": tokenizer.get_vocab_size()}, session.scratch / "tokens.pt")
    session.row("text", characters=len(text), tokens=tokens.numel(), rows=len(rows))


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def sources(most: int) -> str:
    """Return the Python files of torch and transformers in the order of their names, then those of Python itself."""
    found: list[str] = []
    folders = (Path(torch.__file__).parent, Path(transformers.__file__).parent, Path(sysconfig.get_path("stdlib")))
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if sum(map(len, found)) >= most:
                return "".join(found)[:most]
            found.append(path.read_text(errors="ignore"))
    return "".join(found)


def run(session: Session, optim: str) -> None:
    """Train with one optimizer for as many steps as the first one had time for."""
    hf_lowmem.register()
    data = torch.load(session.scratch / "tokens.pt", weights_only=True)
    planned = session.scratch / "steps"
    if not planned.exists():
        planned.write_text(str(affordable_steps(session, data, optim)))
    steps = int(planned.read_text())
    trainer, times = trainer_of(session, data, optim, steps)
    loss = trainer.train().training_loss
    figures = {"steps": steps, "seconds_per_step": sum(times.seconds) / len(times.seconds)}
    if trainer.state.global_step < steps:  # the loss would not be comparable
        session.row(optim, **figures)
        raise RuntimeError(f"only {trainer.state.global_step} of {steps} steps were taken in time")
    session.row(optim, **figures, training_loss=loss, held_out_loss=trainer.evaluate()["eval_loss"])


def affordable_steps(session: Session, data: dict[str, Any], optim: str) -> int:
    trainer, times = trainer_of(session, data, optim, TRIED)
    trainer.train()
    seconds = sorted(times.seconds)[TRIED // 2]
    return max(FEWEST, int(SPARE * session.seconds_left / seconds))


def trainer_of(
    session: Session, data: dict[str, Any], optim: str, steps: int
) -> tuple[transformers.Trainer, StepTimes]:
    torch.manual_seed(0)
    config = deepcopy(PRESETS[session.preset or "100m"])
    config.vocab_size = data["vocab_size"]
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
    rows = [{"input_ids": row, "labels": row} for row in data["rows"]]
    model = LlamaForCausalLM(config)
    datasets = {"train_dataset": rows[HELD_OUT:], "eval_dataset": rows[:HELD_OUT]}
    return transformers.Trainer(model=model, args=args, callbacks=[times, StopInTime(session)], **datasets), times
