"""Measures the host's work in a step on a GPU, without a GPU: all of it except the launches themselves.

    python benchmarks/host_time.py                  # 16 layers: 146 small tensors, as many as in Llama 3.2 1B
    python benchmarks/host_time.py --layers 32

The code that launches the Triton kernels steps CPU tensors, with launches that do nothing. A GPU waits for this work
where weights are small. Each figure is the smallest CPU time of this process over the repeats, because anything else
that runs on the machine can only add to it. torch's fused AdamW is the scale; its times include its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from machine import describe_machine
from peers import ADAM, ROOT
from presets import PRESETS, build_model
from torch import nn

import hf_lowmem
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.triton import backend, launch, variants
from hf_lowmem.kernels.triton import step as kernels

NAMES = ("slim_adamw", "slim_adamw_8bit", "adam_mini_8bit", "lowmem_adamw_8bit", "signum_8bit")
REPEATS = 60


class NoLaunch:
    """A kernel that accepts any grid and any arguments, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


def kernels_that_do_nothing() -> SimpleNamespace:
    names = ("step", "sum_squares", "combine", "add", "write_grads")
    return SimpleNamespace(**vars(kernels) | {name: NoLaunch() for name in names})


def least_ms(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def small_model(layers: int) -> Any:
    config = deepcopy(PRESETS["tiny"])
    config.num_hidden_layers = layers
    return build_model(config, torch.float32, "cpu")


def measure(name: str, layers: int) -> dict[str, Any]:
    """Return the milliseconds of a step, of clipping and a step, and of a step in which all gradients are new."""
    model = small_model(layers)
    params = list(model.parameters())
    if name == "adamw_fused":
        optimizer: Any = torch.optim.AdamW(params, **ADAM, fused=True)
    else:
        optimizer = hf_lowmem.build_optimizer(model, name, **ADAM, optim_args=options_of(name))

    def clipped() -> None:
        if name == "adamw_fused":
            nn.utils.clip_grad_norm_(params, 1.0)
        else:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    gradients = [[torch.randn_like(param) for param in params] for _ in range(2)]
    turn = [0]

    def renewed() -> None:
        turn[0] ^= 1
        for param, grad in zip(params, gradients[turn[0]], strict=True):
            param.grad = grad
        optimizer.step()

    for warm in (optimizer.step, clipped, renewed, renewed):
        warm()
    calls = {"step_ms": optimizer.step, "clipped_ms": clipped, "two_sets_of_gradients_ms": renewed}
    return {"optim": name, "tensors": len(params), **{key: least_ms(call) for key, call in calls.items()}}


def options_of(name: str) -> str:
    """Return options with which the small weights are stepped as the large ones of a model are."""
    return "min_8bit_size=0" if name.endswith("_8bit") else ""


def render(report: dict[str, Any]) -> str:
    machine, tensors = report["machine"], report["rows"][0]["tensors"]
    lines = [
        "# The host's work of a step on a GPU, without the launches",
        "",
        f"{tensors} tensors; method: `benchmarks/host_time.py`.",
        "",
        f"- machine: {machine['cpu']}, torch {machine['versions']['torch']}",
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        "",
        "| optimizer | step, ms | us per tensor | clipping and step, ms | step, gradients elsewhere, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['optim']} | {row['step_ms']:.2f} | {1e3 * row['step_ms'] / tensors:.1f} "
            f"| {row['clipped_ms']:.2f} | {row['two_sets_of_gradients_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "host_time_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure("adamw_fused", args.layers)]
    with forced("triton"), ExitStack() as stack:
        for module in (backend, launch, variants):
            stack.enter_context(mock.patch.object(module, "triton_kernels", cache(kernels_that_do_nothing)))
        rows += [measure(name, args.layers) for name in NAMES]
    report = {"machine": describe_machine("cpu", args.commit), "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
