"""Counts COAP's optimizer memory for the paper's two LLaMA shapes, and compares it with the authors' figures.

    python benchmarks/coap_memory.py

The counts come from the declared state, and nothing is allocated. The authors count bfloat16 moments, and no scales of
8-bit codes. Ours keep second moments in float32 under `state_bits=16` and count every tensor, so both sums are shown.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine  # noqa: E402

import hf_lowmem  # noqa: E402

MIB = 2**20
SHAPES = {
    "LLaMA-1B": dict(hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32),
    "LLaMA-7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
EIGHT_BITS = {"embedding_bits": 8, "min_8bit_size": 0, "proj_bits": 16}
# Each case ends with the bytes per number that the authors count, and their figure in MiB.
CASES: list[tuple[str, str, dict[str, Any], int, float]] = [
    ("LLaMA-1B", "coap_adamw", {"rank": 512, "state_bits": 16}, 2, 1988.34),
    ("LLaMA-7B", "coap_adamw_8bit", {"rank": 1024, **EIGHT_BITS}, 1, 5380.51),
]


def measure(shape: str, optim: str, options: dict[str, Any], width: int, printed: float) -> dict[str, Any]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPES[shape]))
    explanation = hf_lowmem.explain(model, optim, options)
    entries = [(name, math.prod(size)) for row in explanation.rows for name, (size, _) in row.state.items()]
    moments = sum(count for name, count in entries if name in ("exp_avg", "exp_avg_sq"))
    bases = sum(count for name, count in entries if name == "proj")
    return {
        "model": shape,
        "optim": optim,
        "optim_args": options,
        "authors_mib": printed,
        "counted_as_authors_mib": (width * moments + 2 * bases) / MIB,
        "declared_mib": explanation.nbytes / MIB,
        "adamw_bf16_mib": 4 * explanation.numel / MIB,
        "parameters": explanation.numel,
    }


def render(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        "# COAP's optimizer memory, MiB",
        "",
        f"From declared state (`{machine['command']}`, commit {machine['commit']}). As the authors count: "
        "bfloat16 moments (8-bit codes without their scales), bfloat16 bases.",
        "",
        "| model | options | the authors print | counted as they do | all that is declared | AdamW, bfloat16 state |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        options = ", ".join(f"{key}={value}" for key, value in row["optim_args"].items())
        lines.append(
            f"| {row['model']} | `{row['optim']}` {options} | {row['authors_mib']:.2f} "
            f"| {row['counted_as_authors_mib']:.2f} | {row['declared_mib']:.2f} | {row['adamw_bf16_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    report = {"machine": describe_machine("cpu"), "rows": [measure(*case) for case in CASES]}
    output = ROOT / "benchmarks" / "results" / "coap_memory.json"
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
