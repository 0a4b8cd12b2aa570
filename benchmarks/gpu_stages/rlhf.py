"""Trains by DPO and GRPO through TRL, resumes, and measures a step's time and the peak memory."""

from __future__ import annotations

import statistics
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from presets import PRESETS
from train import StepTimes
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import hf_lowmem
from gpu_stages.session import Session
from hf_lowmem.demo.data import build_pairs, train_tokenizer
from hf_lowmem.demo.preferences import CHAT_TEMPLATE, answer_overlap, preference_pairs, short_answers

STEPS, SAVED, STEPS_ON_CPU, SAVED_ON_CPU = 8, 4, 2, 1
EXAMPLES, EXAMPLES_ON_CPU = 128, 16
WARM = 1
BATCH_SIZE, BATCH_ON_CPU = 16, 4
GENERATIONS = 4
TOKENS = 24  # the length of a completion
VOCABULARY, VOCABULARY_ON_CPU = 4096, 512


def run(session: Session, method: str, optim: str) -> None:
    """Train with one optimizer, and then again from the checkpoint in the middle."""
    if not (find_spec("trl") and find_spec("datasets")):
        session.row(f"{method} {optim}", remark="TRL or datasets is not installed")
        return
    hf_lowmem.register()
    count = EXAMPLES if session.on_gpu else EXAMPLES_ON_CPU
    pairs = build_pairs()[0][: 8 * count]
    tokenizer = train_tokenizer(pairs, VOCABULARY if session.on_gpu else VOCABULARY_ON_CPU)
    tokenizer.chat_template = CHAT_TEMPLATE
    examples = short_answers(pairs)[:count]
    with tempfile.TemporaryDirectory(dir=session.scratch) as folder:
        times = StepTimes()
        whole = trainer_of(session, method, optim, examples, tokenizer, folder, times)
        whole.train()
        peak = torch.cuda.max_memory_allocated() / 2**30 if session.on_gpu else None
        seconds = statistics.median(times.seconds[WARM:])
        session.row(f"{method} {optim}", seconds_per_step=seconds, peak_gib=peak, ended_at=whole.state.global_step)
        expected = [parameter.detach().cpu() for parameter in whole.model.parameters()]
        del whole
        resumed = trainer_of(session, method, optim, examples, tokenizer, folder, StepTimes())
        resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{saved_at(session)}"))
        found = [parameter.detach().cpu() for parameter in resumed.model.parameters()]
    off = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    session.row(
        f"{method} {optim}, resumed",
        resumed_at=saved_at(session),
        ended_at=resumed.state.global_step,
        largest_difference=off,
    )


def saved_at(session: Session) -> int:
    return SAVED if session.on_gpu else SAVED_ON_CPU


def trainer_of(
    session: Session,
    method: str,
    optim: str,
    examples: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    times: StepTimes,
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = deepcopy(PRESETS[session.preset or "100m"])
    config.vocab_size, config.bos_token_id = len(tokenizer), None
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = LlamaForCausalLM(config)
    name, _, optim_args = optim.partition(" ")
    shared = dict(
        output_dir=folder,
        optim=name,
        optim_args=optim_args or None,
        max_steps=STEPS if session.on_gpu else STEPS_ON_CPU,
        per_device_train_batch_size=BATCH_SIZE if session.on_gpu else BATCH_ON_CPU,
        learning_rate=1e-5,
        save_steps=saved_at(session),
        bf16=session.on_gpu,
        use_cpu=not session.on_gpu,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    more = dict(model=model, processing_class=tokenizer, callbacks=[times])
    if method == "dpo":
        rows = [{k: v for k, v in pair.items() if k != "kind"} for pair in preference_pairs(examples)]
        args = DPOConfig(**shared, max_length=64)
        return DPOTrainer(args=args, ref_model=deepcopy(model), train_dataset=Dataset.from_list(rows), **more)
    rows = [{"prompt": example["prompt"], "answer": example["answer"]} for example in examples]
    args = GRPOConfig(**shared, num_generations=GENERATIONS, max_completion_length=TOKENS)
    return GRPOTrainer(args=args, train_dataset=Dataset.from_list(rows), reward_funcs=answer_overlap, **more)
