"""Tests whether 8-bit moments of an embedding are worse than float32 for tokens that occur every few hundred steps.

    python benchmarks/rare_tokens.py

A fixed random network over random vectors of the tokens gives each pair of tokens one of 64 labels; the tokens follow
Zipf's distribution. A network with its own embedding learns the labels, so that it learns about a token only in the
steps in which the token occurs. The held-out losses are over pairs of the same distribution, and over pairs whose
first token occurs in fewer than one of 200 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peers import ROOT
from torch import Tensor, nn
from torch.nn import functional

import hf_lowmem

TOKENS, WIDTH, LABELS, BATCH = 8192, 256, 64, 128
RARE = 200  # a rare token occurs less than once in so many steps, on average
CASES = (("lowmem_adamw", ""), ("lowmem_adamw_8bit", "embedding_bits=32"), ("lowmem_adamw_8bit", "embedding_bits=8"))

Sample = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Network(nn.Module):
    """A network that labels pairs of tokens."""

    def __init__(self, generator: torch.Generator, scale: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, LABELS)
        for weight, size in ((self.tokens.weight, scale), (self.hidden.weight, 1.0), (self.head.weight, scale)):
            fan_in = 1 if weight is self.tokens.weight else WIDTH
            weight.data.normal_(0, size / fan_in**0.5, generator=generator)

    def forward(self, pairs: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(self.tokens(pairs).sum(1))))
        return logits


def make_sampler(seed: int) -> Sample:
    """Return labelled pairs, whose first token has the given distribution and whose second token has Zipf's."""
    generator = torch.Generator().manual_seed(seed)
    teacher, zipf = Network(generator, 4.0), zipf_weights()

    def sample(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
        columns = [torch.multinomial(w, count, replacement=True, generator=generator) for w in (weights, zipf)]
        pairs = torch.stack(columns, 1)
        with torch.no_grad():
            return pairs, torch.multinomial(teacher(pairs).softmax(-1), 1, generator=generator).flatten()

    return sample


def zipf_weights() -> Tensor:
    weights = 1 / torch.arange(1, TOKENS + 1, dtype=torch.float32)
    return weights / weights.sum()


def rare_weights() -> Tensor:
    """Return weights with which all rare tokens are equally likely."""
    return (2 * BATCH * zipf_weights() < 1 / RARE).float()


def losses(optim: str, options: str, seed: int, steps: int) -> dict[str, float]:
    sample, zipf = make_sampler(seed), zipf_weights()
    model = Network(torch.Generator().manual_seed(seed + 1000), 0.1)
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=3e-3, weight_decay=0.01, optim_args=options or None)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pairs, labels = sample(zipf, BATCH)
        functional.cross_entropy(model(pairs), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    held_out = {"all": sample(zipf, 1 << 14), "rare": sample(rare_weights(), 1 << 14)}
    with torch.no_grad():
        return {
            name: functional.cross_entropy(model(pairs), labels).item() for name, (pairs, labels) in held_out.items()
        }


def measure(commit: str | None, seeds: int, steps: int) -> dict[str, Any]:
    rows = []
    for optim, options in CASES:
        found = [losses(optim, options, seed, steps) for seed in range(seeds)]
        rows.append({"optim": f"{optim} {options}".strip(), **{name: [f[name] for f in found] for name in found[0]}})
        print(rows[-1], flush=True)
    settings = {"steps": steps, "rare_tokens": int(rare_weights().sum())}
    return {"machine": describe_machine("cpu", commit), **settings, "rows": rows}


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Held-out loss with rare tokens",
        "",
        f"{report['steps']} steps of {BATCH} pairs of {TOKENS} tokens. Rare are {report['rare_tokens']} that come",
        f"less than once in {RARE} steps. What is learned, and how to run it: `benchmarks/rare_tokens.py`.",
        "",
        f"- machine: {report['machine']['cpu']}, torch {report['machine']['versions']['torch']}",
        f"- commit: {report['machine']['commit']}",
        "",
        "| `optim` | all pairs, by seed | mean | pairs with a rare token | mean |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        cells = []
        for name in ("all", "rare"):
            cells += [", ".join(f"{loss:.3f}" for loss in row[name]), f"{statistics.mean(row[name]):.3f}"]
        lines.append(f"| `{row['optim']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "rare_tokens_cpu.json")
    args = parser.parse_args()
    report = measure(args.commit, args.seeds, args.steps)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
