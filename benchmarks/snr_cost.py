"""The time that the signal-to-noise ratios of a training run take: `python benchmarks/snr_cost.py`.

It trains a Llama of 3 M parameters, measures it, and writes the seconds of both, with the share of the authors'
schedule, to results/snr_cost_cpu.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.snr import SnrTracker
from hf_lowmem.snr.tracker import is_due

STEPS, REPEATS = 1000, 5
RESULT = Path(__file__).parent / "results" / "snr_cost_cpu.json"


def median_seconds(run: Callable[[], object]) -> float:
    """Return the median time of a few calls after one that warms up."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_key_value_heads=2, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(2048, (4, 128))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_seconds = median_seconds(step)
    with tempfile.TemporaryDirectory() as folder:
        tracker = SnrTracker(model, Path(folder, "snr.csv"))
        seconds = median_seconds(lambda: tracker.measure(optimizer, 1))
    measurements = sum(map(is_due, range(1, STEPS + 1)))
    found = {
        **describe_machine("cpu"),
        "parameters": sum(param.numel() for param in model.parameters()),
        "tokens_per_step": tokens.numel(),
        "threads": torch.get_num_threads(),
        "seconds_per_step": round(step_seconds, 4),
        "seconds_per_measurement": round(seconds, 4),
        "steps": STEPS,
        "measurements": measurements,
        "share_percent": round(100 * measurements * seconds / (STEPS * step_seconds), 3),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
