"""Peak memory and time of training with released gradients against the plain run.

    python benchmarks/release_memory.py

A Llama of 100 million float32 parameters is trained on the CPU, for each optimizer in two processes, whose peak
resident memory is what the kernel says (VmHWM). What release saves is set against the bytes of all gradients. The
embedding and the head have 3 % of the weights each, as those of an 8B model: a gradient that is being computed is
alive under release, too. In a third process plain and released steps, each with its forward and backward pass, take
turns on two models; their ratio is the median over the pairs, with its quartiles. Nothing is clipped, but all steps
find the norm of their gradients, as a Trainer's do for its log. All of it goes to results/release_memory_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))

import hf_lowmem
from hf_lowmem import LowMemOptimizer

RESULT = ROOT / "benchmarks" / "results" / "release_memory_cpu.json"
OPTIMS = ("slim_adamw_8bit", "lowmem_adamw_8bit")
SIZES = dict(vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=15)
TOKENS, STEPS = 128, 3


def made(optim: str) -> tuple[LlamaForCausalLM, LowMemOptimizer, Callable[[], None]]:
    """Return a model, its optimizer and a function that takes a step with its forward and backward pass."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=12, num_key_value_heads=4))
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-4)
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.clip_grad_norm_(math.inf)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def peak(optim: str, released: bool) -> dict[str, int]:
    """Return the peak resident memory of this process after a few steps, and the bytes of all gradients."""
    model, optimizer, step = made(optim)
    if released:
        optimizer.release_gradients(clip="none")
    for _ in range(STEPS):
        step()
    status = Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": 1024 * kib, "gradients": sum(param.nbytes for param in model.parameters())}


def times(optim: str, pairs: int) -> dict[str, Any]:
    """Return the seconds of plain steps and of released ones, which take turns."""
    _, _, plain_step = made(optim)
    _, optimizer, released_step = made(optim)
    optimizer.release_gradients(clip="none")
    steps, found = {False: plain_step, True: released_step}, {False: list[float](), True: list[float]()}
    for number in range(pairs + 1):
        for released in (number % 2 == 0, number % 2 == 1):
            start = time.perf_counter()
            steps[released]()
            found[released].append(time.perf_counter() - start)
    plain, released_times = found[False][1:], found[True][1:]  # the first steps allocate the state
    ratios = [mine / theirs for mine, theirs in zip(released_times, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {"plain_ms": 1e3 * statistics.median(plain), "released_ms": 1e3 * statistics.median(released_times)}
    return {**medians, "ratio": middle, "quartiles": [low, high], "pairs": pairs}


def in_a_process(what: str, optim: str, pairs: int) -> dict[str, Any]:
    # Freed blocks go back to the system at once, so that resident memory is what is in use.
    environment = (
        {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"} if what != "times" else None
    )
    command = [sys.executable, __file__, "--measure", what, "--optims", optim, "--pairs", str(pairs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(optim: str, pairs: int) -> dict[str, Any]:
    plain, released = (in_a_process(what, optim, pairs) for what in ("plain", "released"))
    saved = (plain["peak"] - released["peak"]) / plain["gradients"]
    found = {"gradients": plain["gradients"], "plain": plain["peak"], "released": released["peak"]}
    return {"optim": optim, **found, "saved_share": saved, **in_a_process("times", optim, pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optims", default=",".join(OPTIMS), help="separated by commas")
    parser.add_argument("--pairs", type=int, default=15, help="how many pairs of steps are timed")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=("plain", "released", "times"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = (
            times(args.optims, args.pairs) if args.measure == "times" else peak(args.optims, args.measure != "plain")
        )
        print(json.dumps(found))
        return
    settings = {**SIZES, "tokens": TOKENS, "dtype": "float32"}
    rows = [row(optim, args.pairs) for optim in args.optims.split(",")]
    report = {"machine": describe_machine("cpu"), "settings": settings, "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
