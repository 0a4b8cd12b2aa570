"""Measures whole steps of supervised fine-tuning by optimizer: tokens per second and peak memory.

    python benchmarks/train.py --preset 1b                               # on a GPU
    python benchmarks/train.py --preset 8b --optims "adamw_torch_fused,slim_adamw_8bit,slim_adamw_8bit rounding=kahan"
    python benchmarks/train.py --preset 100m --device cpu --steps 4 --batch-size 1 --length 256

TRL's SFTTrainer, or transformers' Trainer if TRL or datasets are not installed, trains a Llama with random bfloat16
weights and gradient checkpointing on rows of random tokens, each as long as `--length`, as packing makes them. Each
optimizer runs in a process of its own: an optim name of the Trainer followed by a space and its optim_args, or a peer
of `peers.py`. A row that takes more than `--limit` seconds is stopped. The time of a step is the median after the
first WARM steps. The peak memory is that of the whole run in torch's allocator (on a CPU, the largest resident set of
the process), and the optimizer state in it is what its storages hold at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from measure import state_bytes
from peers import PEERS, ROOT
from presets import PRESETS
from processes import Job, start_server
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import hf_lowmem

OPTIMS = "adamw_torch_fused,adamw_8bit,lowmem_adamw_8bit,slim_adamw,slim_adamw_8bit,adam_mini_8bit,coap_adamw_8bit"
WARM = 3
GIB = 2**30


class StepTimes(transformers.TrainerCallback):
    """Records the seconds of each step, from the first forward pass to the end of the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.started)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, preset: str, device: str, steps: int, batch_size: int, length: int) -> dict[str, Any]:
    """Return one row, measured in this process."""
    hf_lowmem.register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(PRESETS[preset], dtype=torch.bfloat16)
    optim, _, optim_args = name.partition(" ")
    peer = PEERS.get(name)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = dict(
            output_dir=folder,
            optim="adamw_torch" if peer else optim,
            optim_args=optim_args or None,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-5,
            gradient_checkpointing=True,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=steps,
            disable_tqdm=True,
        )
        tokens = torch.randint(
            model.config.vocab_size, (steps * batch_size, length), generator=torch.Generator().manual_seed(0)
        )
        optimizers = (peer.build(model) if peer else None, None)  # the Trainer creates what is None
        trainer = trainer_of(model, arguments, tokens, callbacks=[times], optimizers=optimizers)
        loss = trainer.train().training_loss
    seconds = statistics.median(times.seconds[min(WARM, steps - 1) :])
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "optim": name,
        "seconds_per_step": seconds,
        "tokens_per_second": batch_size * length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else resident,
        "state_bytes": state_bytes(trainer.optimizer)[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_loss": loss,
        "trainer": type(trainer).__name__,
    }


def trainer_of(model: Any, arguments: dict[str, Any], tokens: torch.Tensor, **more: Any) -> transformers.Trainer:
    """Return TRL's SFTTrainer on tokens (rows, length), or transformers' Trainer, which takes the same step."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except (ImportError, RuntimeError):  # TRL raises RuntimeError for its own missing imports
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        return transformers.Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, **more)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=tokens.shape[1]),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processing_class=tokenizer(),
        **more,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer, which SFTTrainer requires although the rows are tokens already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def measure_in_new_process(limit: float, **row: Any) -> dict[str, Any]:
    """Run `measure` in a process of its own and return its row, or a row with an `error`."""
    job = Job("train:measure", row)
    try:
        return job.result(limit)
    except (RuntimeError, TimeoutError) as error:
        return {"optim": row["name"], "error": str(error)[:120]}


def render(report: dict[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# Supervised fine-tuning of a {settings['preset']} model: tokens per second and peak memory",
        "",
        f"Batches of {settings['batch_size']} x {settings['length']} tokens, {settings['steps']} steps; method: "
        "`benchmarks/train.py`.",
        "",
        f"- machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"- versions: Python {machine['python']}, {packages}",
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        "",
        "| optimizer | seconds per step | tokens/s | peak memory, GiB | optimizer state in it, GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['optim']} | {row['error'].replace('|', '/')} | | | |")
            continue
        lines.append(
            f"| {row['optim']} | {row['seconds_per_step']:.3f} | {row['tokens_per_second']:,.0f} "
            f"| {row['peak_bytes'] / GIB:.2f} | {row['state_bytes'] / GIB:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1b", help="default: %(default)s")
    parser.add_argument("--optims", default=OPTIMS, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/train_PRESET_DEVICE.json; .md beside it"
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds for a row (default: %(default)s)")
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("preset", "device", "steps", "batch_size", "length")}
    output = args.output or ROOT / "benchmarks" / "results" / f"train_{args.preset}_{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(args.device, args.commit)
    report: dict[str, Any] = {"machine": machine, "settings": settings, "rows": []}
    os.environ["HF_HUB_OFFLINE"] = "1"
    start_server(["train", "trl", "datasets"], args.device)
    for name in args.optims.split(","):
        report["rows"].append(measure_in_new_process(args.limit, name=name, **settings))
        output.write_text(json.dumps(report, indent=2) + "\n")
        output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
